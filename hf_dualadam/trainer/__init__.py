"""DualAdam and InvAdam in the Hugging Face Trainer: everything that depends on transformers."""

from ..optimizers import OPTIMIZERS
from .callback import DualAdamCallback
from .nonfinite import StopOnNonFinite
from .optim_args import OPTIM_ARGS, OptimArg, parse_optim_args
from .registration import register

__all__ = [
    "OPTIMIZERS",
    "OPTIM_ARGS",
    "DualAdamCallback",
    "OptimArg",
    "StopOnNonFinite",
    "parse_optim_args",
    "register",
]
