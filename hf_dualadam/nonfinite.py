"""The former place of :mod:`hf_dualadam.trainer.nonfinite`."""

from .trainer.nonfinite import *  # noqa: F403
