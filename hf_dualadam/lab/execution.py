"""Execute one run of a comparison for any task: run specification -> row of results."""

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
    """Executes the runs of a comparison; each task is loaded once.

    Args:
        comparison: the comparison.
        folder: folder of the comparison, for the logs of scripts.
        data_root: folder to which ``data_dir`` of a task is relative.
    """

    def __init__(self, comparison: Comparison, folder: Path, data_root: Path = Path()):
        self.comparison, self.folder, self.data_root = comparison, folder, data_root
        self._runs: dict[str, KindRuns | ScriptRuns] = {}

    def metric(self, task: str) -> Metric:
        """A task's metric.

        Raises:
            InputError: the task cannot be loaded.
        """
        return self._of(task).metric

    def facts(self, task: str) -> dict[str, Any]:
        """Numbers of examples of a task for the report, if known."""
        return self._of(task).facts

    def execute(self, spec: RunSpec) -> dict[str, Any]:
        """Execute one run. Errors are recorded in the row's ``status``, and the process continues.

        Args:
            spec: the run.

        Returns:
            ``row``: the results by column of ``COLUMNS``, None if missing; ``curves``: logged values, one dict per
            step; ``score``: the selection metric, greater is better, or None for a failed run; ``wall_seconds``:
            duration including loading, evaluation and sharpness.

        Raises:
            InputError: a user's script fails before it trains, or does not report the metric, so that all its runs
                would fail.
        """
        started, row = time.monotonic(), self.comparison.empty_row(spec)
        runs = self._of(spec.task)
        curves: list[dict[str, float]] = []
        try:
            runs.run(spec, row, curves)
        except Exception as error:  # the other runs continue
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
                gc.freeze()  # modules and data stay, so the collections after each run can skip them
        return self._runs[task]

    def close(self) -> None:
        """Make modules and data collectable again, so that extensions do not report leaks at exit."""
        self._runs.clear()
        gc.unfreeze()


def _json_number(value: Any) -> Any:
    """Round floats to 6 digits; replace non-finite ones, which JSON cannot represent."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
