"""Makes the optimizers known to every Python process that one started under ``hf-dualadam`` starts.

A child process inherits environment variables, whoever starts it: multiprocessing, subprocess, os.exec, torchrun,
accelerate, a shell script. Python imports a module named ``sitecustomize`` at its start, and finds the one in this
folder through ``PYTHONPATH``. That one waits until transformers or timm is imported, so other Python programs pay next
to nothing. Processes that get another environment, or run Python with -I, -E or -S, are not reached.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

OPTIM, OPTIM_ARGS = "HF_DUALADAM_OPTIM", "HF_DUALADAM_OPTIM_ARGS"


def reach_children(
    environment: MutableMapping[str, str], optim: str | None = None, optim_args: str | None = None
) -> None:
    """Change an environment so that the Python processes started with it know the optimizers.

    Args:
        environment: environment variables, such as ``os.environ``.
        optim: what these processes use in place of any other ``TrainingArguments.optim``. Default None: as their
            arguments say.
        optim_args: the ``optim_args`` for it. Default None: none.
    """
    here = str(Path(__file__).parent)
    path = environment.get("PYTHONPATH")
    if here not in (path or "").split(os.pathsep):
        environment["PYTHONPATH"] = os.pathsep.join([here, path]) if path else here
    if optim is not None:
        environment[OPTIM] = optim
        environment.pop(OPTIM_ARGS, None)
        if optim_args:
            environment[OPTIM_ARGS] = optim_args
