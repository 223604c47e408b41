"""Does one run of a comparison, whatever its task: a run specification -> a row of results."""

from __future__ import annotations

import gc
import math
import time
from pathlib import Path
from typing import Any

from ..finetuning.config import InputError
from .comparison import Comparison, RunSpec, ScriptSetting
from .kind_runs import KindRuns
from .metric import Metric
from .script_runs import ScriptRuns


class Laboratory:
    """Executes the runs of a comparison; loads each task once.

    Args:
        comparison: what is compared.
        folder: of the comparison, for the logs of scripts.
        data_root: folder that ``data_dir`` of a task is relative to.
    """

    def __init__(self, comparison: Comparison, folder: Path, data_root: Path = Path()):
        self.comparison, self.folder, self.data_root = comparison, folder, data_root
        self._runs: dict[str, KindRuns | ScriptRuns] = {}

    def metric(self, task: str) -> Metric:
        """A task's metric.

        Raises:
            InputError: the task cannot be loaded as the file says.
        """
        return self._of(task).metric

    def facts(self, task: str) -> dict[str, Any]:
        """What a report says of a task's data: numbers of examples, where they are known here."""
        return self._of(task).facts

    def execute(self, spec: RunSpec) -> dict[str, Any]:
        """Do one run. What goes wrong in it ends up in the row's ``status``, and the process lives on.

        Args:
            spec: the run.

        Returns:
            ``row``: the results by column of ``COLUMNS``, None where there is none; ``curves``: logged numbers, a dict
            per step; ``score``: the selection metric, greater is better, or None for a run that failed;
            ``wall_seconds``: duration with loading, evaluation and sharpness.

        Raises:
            InputError: a script of one's own fails before it trains, or does not report the metric, so that all its
                runs would fail alike.
        """
        started, row = time.monotonic(), self.comparison.empty_row(spec)
        runs = self._of(spec.task)
        curves: list[dict[str, float]] = []
        try:
            runs.run(spec, row, curves)
        except Exception as error:  # the other runs go on
            if isinstance(error, InputError) and isinstance(runs, ScriptRuns):
                raise
            row["status"] = f"crashed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        gc.collect()
        row = {name: _json_number(value) for name, value in row.items()}
        score = runs.metric.sign * row["selection_metric"] if row["status"] == "ok" else None
        return {"row": row, "curves": curves, "score": score, "wall_seconds": time.monotonic() - started}

    def _of(self, task: str) -> KindRuns | ScriptRuns:
        if task not in self._runs:
            if isinstance(self.comparison.tasks[task], ScriptSetting):
                self._runs[task] = ScriptRuns(task, self.comparison, self.folder)
            else:
                self._runs[task] = KindRuns(task, self.comparison, self.data_root)
                gc.freeze()  # modules and data stay: the collections after each run need not look through them
        return self._runs[task]

    def close(self) -> None:
        """Let modules and data be collected again, so that extensions do not report them as leaked at exit."""
        self._runs.clear()
        gc.unfreeze()


def _json_number(value: Any) -> Any:
    """Floats rounded to 6 digits; those that are not finite have no place in JSON."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
