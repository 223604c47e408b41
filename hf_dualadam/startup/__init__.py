"""Registers the optimizers in every Python process that is started, directly or indirectly, under ``hf-dualadam``.

A child process inherits environment variables, whatever starts it: multiprocessing, subprocess, os.exec, torchrun,
accelerate, a shell script. At startup, Python imports a module named ``sitecustomize``, and finds the one in this
folder through ``PYTHONPATH``. That module waits until transformers or timm is imported, so it costs other Python
programs almost nothing. It has no effect in a process with another environment or in Python run with -I, -E or -S.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

OPTIM, OPTIM_ARGS = "HF_DUALADAM_OPTIM", "HF_DUALADAM_OPTIM_ARGS"


def reach_children(
    environment: MutableMapping[str, str], optim: str | None = None, optim_args: str | None = None
) -> None:
    """Change an environment so that Python processes started with it register the optimizers.

    Args:
        environment: environment variables, such as ``os.environ``.
        optim: replaces ``TrainingArguments.optim`` in these processes. Default None: it is not replaced.
        optim_args: the ``optim_args`` for it. Default None: no options.
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
