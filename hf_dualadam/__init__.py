"""DualAdam and InvAdam for PyTorch and the Hugging Face Trainer.

Importing this package makes ``TrainingArguments(optim="dualadam")`` and ``optim="invadam"`` valid.
"""

from .optimizers import DualAdam, InvAdam
from .trainer import register

__version__ = "0.1.0"
__all__ = ["DualAdam", "InvAdam", "register"]

register()
