"""The former place of :mod:`hf_dualadam.lab.escape`."""

from .lab.escape import *  # noqa: F403
