"""DualAdam and InvAdam for PyTorch and the Hugging Face Trainer.

Where transformers is installed, importing this package makes ``TrainingArguments(optim="dualadam")`` and
``optim="invadam"`` valid.
"""

from .gradient_release import release_gradients
from .optimizers import DualAdam, InvAdam

__version__ = "0.2.0"
__all__ = ["DualAdam", "InvAdam", "register", "release_gradients"]

try:
    from .trainer import register
except ModuleNotFoundError as error:
    if error.name != "transformers":  # installed but broken: not to be hidden
        raise

    def register() -> None:
        """Refuse: there is no Trainer to register with.

        Raises:
            ImportError: always.
        """
        raise ImportError("Registering with Trainer needs transformers: pip install transformers")

else:
    register()
