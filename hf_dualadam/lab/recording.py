"""Run a script through the launcher and record the logs of its Trainer: one process of a comparison.

``python -m hf_dualadam.lab.recording LOG SCRIPT.py ARGS...`` (or ``LOG -m MODULE ARGS...``) does what ``python -m
hf_dualadam SCRIPT.py ARGS...`` does, and writes every log, evaluation and prediction of any Trainer in it to LOG, one
JSON object per line. It kills its process group as soon as the worker that started it has died.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import CallbackHandler, TrainerCallback

from ..cli import main as launch

WATCH_SECONDS = 1.0


class LogWriter(TrainerCallback):
    """Appends the values of logs and predictions to a file.

    Args:
        path: the file.
    """

    def __init__(self, path: Path):
        self.path = path

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Training logs, and the metrics of evaluations."""
        self._write(state, logs)

    def on_predict(self, args, state, control, metrics=None, **kwargs):
        """The metrics of predictions, which Trainer does not log."""
        self._write(state, metrics)

    def on_train_end(self, args, state, control, **kwargs):
        """Number of steps, and peak memory of the process or the GPU."""
        self._write(state, {"steps": state.global_step, "peak_memory_mb": peak_memory() / 2**20})

    def _write(self, state, numbers: dict[str, Any] | None) -> None:
        if not state.is_world_process_zero or not numbers:
            return
        line = {"step": state.global_step} | {k: v for k, v in numbers.items() if isinstance(v, int | float)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def peak_memory() -> int:
    """Peak memory so far in bytes: allocated on the GPU, otherwise resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().rss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def record(path: Path) -> None:
    """Make every Trainer of this process write to a file.

    Args:
        path: the file.
    """
    original = CallbackHandler.__init__

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.add_callback(LogWriter(path))

    CallbackHandler.__init__ = __init__


def end_with_parent() -> None:
    """Kill this process group when the parent has died: a killed worker cannot stop its script."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
        os.killpg(0, signal.SIGKILL)

    if hasattr(os, "killpg"):
        threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    end_with_parent()
    record(Path(sys.argv[1]))
    launch(sys.argv[2:])
