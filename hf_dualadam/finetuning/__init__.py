"""Fine-tuning on GLUE and on images: everything the scripts share.

``config`` reads YAML files and command lines; ``glue`` and ``images`` turn their arguments into a
:class:`~hf_dualadam.finetuning.training.Task`; ``training.run`` trains and evaluates a task.

Needs the extra ``finetune``.
"""

from ..extras import require

require("finetune")
