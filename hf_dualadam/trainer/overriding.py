"""Override ``optim`` and ``optim_args`` of every ``TrainingArguments``, for scripts that set their own."""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

from transformers.training_args import TrainingArguments

from ..startup import OPTIM, OPTIM_ARGS

_said: set[str] = set()


def override_from_environment() -> None:
    """Let the environment variables of :mod:`hf_dualadam.startup` override what scripts pass to TrainingArguments.

    ``hf-dualadam --optim NAME --optim_args ARGS SCRIPT`` sets them; they are read each time that arguments are
    created. Replaced values are printed once to stderr.
    """
    patched: Any = TrainingArguments
    original = patched.__post_init__
    if OPTIM not in os.environ or hasattr(original, "_overridden_by_hf_dualadam"):
        return

    @functools.wraps(original)
    def __post_init__(self: Any, *args: Any, **kwargs: Any) -> None:
        _override(self)
        original(self, *args, **kwargs)

    __post_init__._overridden_by_hf_dualadam = True  # type: ignore[attr-defined]
    patched.__post_init__ = __post_init__


def _override(arguments: Any) -> None:
    optim, optim_args = os.environ.get(OPTIM), os.environ.get(OPTIM_ARGS)
    replaced = str(getattr(arguments.optim, "value", arguments.optim)), arguments.optim_args
    if optim is None or replaced == (optim, optim_args):
        return
    arguments.optim, arguments.optim_args = optim, optim_args
    line = f"hf-dualadam: {_describe(optim, optim_args)} instead of the script's {_describe(*replaced)}"
    if line not in _said and os.environ.get("RANK", "0") == "0":
        _said.add(line)
        print(line, file=sys.stderr)


def _describe(optim: str, optim_args: str | None) -> str:
    return f"optim={optim}" + (f", optim_args={optim_args}" if optim_args else "")
