"""The former place of :mod:`hf_dualadam.trainer.checkpoints`."""

from .trainer.checkpoints import *  # noqa: F403
