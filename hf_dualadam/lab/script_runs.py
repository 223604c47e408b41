"""Execute runs of a user's script: each runs the unmodified script in a new process."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ..finetuning.config import InputError
from .baselines import OptimizerSetting
from .comparison import SHARE_POINTS, Comparison, RunSpec, ScriptSetting
from .metric import Metric

OUTPUT, RECORD, LOG = "output", "record.jsonl", "log.txt"
RESULT_FILES = ("train_results.json", "eval_results.json", "test_results.json", "predict_results.json")
RESULT_FILES += ("all_results.json",)
TERMINATE_SECONDS = 10.0


class ScriptRuns:
    """Executes the runs of one task that is a script.

    Args:
        name: name of the task.
        comparison: the comparison.
        folder: folder of the comparison; metrics and log of each run are in its subfolder ``runs``.
    """

    def __init__(self, name: str, comparison: Comparison, folder: Path):
        self.name, self.comparison, self.folder = name, comparison, folder / "runs"
        self.setting: ScriptSetting = comparison.tasks[name]
        self.metric: Metric = self.setting.scored_by
        self.has_run = False
        self.facts: dict[str, Any] = {"shares_selection": self.setting.heldout_metric is None}

    def run(self, spec: RunSpec, row: dict[str, Any], curves: list[dict[str, float]]) -> None:
        """Execute one run.

        Args:
            spec: the run.
            row: receives the results.
            curves: receives the logged values.

        Raises:
            InputError: the first run of the script fails before it trains (usually due to wrong arguments), or the
                script does not report the metric.
            RuntimeError: the script fails in another way.
        """
        folder = self.folder / spec.slug
        shutil.rmtree(folder, ignore_errors=True)  # left by a worker that died
        (folder / OUTPUT).mkdir(parents=True)
        command = self.command(spec, self.comparison.optimizers[spec.optimizer], folder)
        started = time.monotonic()
        status = _run_in_group(command, folder / LOG)
        seconds = time.monotonic() - started
        lines = _read_record(folder / RECORD)
        metrics = {name: value for line in lines for name, value in line.items()} | _read_results(folder / OUTPUT)
        _keep_metrics_only(folder / OUTPUT)
        if status:
            self._fail(status, folder / LOG, trained=bool(lines))
        self.has_run = True
        row |= self._scores(metrics, final=spec.role == "final")
        row |= {"steps": metrics.get("steps"), "peak_memory_mb": metrics.get("peak_memory_mb")}
        row["seconds"] = metrics.get("train_runtime", seconds)
        curves += _curves(lines, self.setting.curve_columns)
        row |= _inverse_shares(curves, row["steps"])
        scores = [row[key] for key in ("selection_metric", "selection_loss", "heldout_metric", "heldout_loss")]
        row["status"] = "ok" if all(math.isfinite(value) for value in scores if value is not None) else "diverged"

    def command(self, spec: RunSpec, optimizer: OptimizerSetting, folder: Path) -> list[str]:
        """The command line of a run."""
        target = [self.setting.script] if self.setting.script else ["-m", self.setting.module]
        ours = optimizer.training_arguments(spec.learning_rate) | {"seed": spec.seed}
        ours["output_dir"] = str((folder / OUTPUT).absolute())
        options = [part for name, value in ours.items() if value is not None for part in (f"--{name}", str(value))]
        record = [sys.executable, "-m", "hf_dualadam.lab.recording", str((folder / RECORD).absolute())]
        return [*record, *target, *self.setting.command_line(), *options]

    def _fail(self, status: int, log: Path, *, trained: bool) -> None:
        last = next((line.strip() for line in reversed(_text(log).splitlines()) if line.strip()), "no output")
        if not trained and not self.has_run:  # all its runs would fail in the same way
            raise InputError(f"tasks.{self.name}: {self.setting.target} fails before it trains: {last} (log: {log})")
        raise RuntimeError(f"{self.setting.target} ended with status {status}: {last[:160]} (log: {log})")

    def _scores(self, metrics: dict[str, float], *, final: bool) -> dict[str, float | None]:
        """Metrics and losses of the row."""

        def find(field: str, key: str) -> tuple[str, float]:
            for name in (key, f"eval_{key}"):
                if name in metrics:
                    return name, metrics[name]
            known = ", ".join(sorted(name for name in metrics if name not in ("step", "steps", "peak_memory_mb")))
            raise InputError(
                f"tasks.{self.name}.{field}: {key!r} - {self.setting.target} reports {known or 'no metrics'}"
            )

        name, value = find("metric", self.setting.metric)
        scores = {"selection_metric": value, "selection_loss": _loss_on_same_data(name, metrics)}
        if final:
            name, value = find("heldout_metric", self.setting.heldout_metric or self.setting.metric)
            scores |= {"heldout_metric": value, "heldout_loss": _loss_on_same_data(name, metrics)}
        return {"heldout_metric": None, "heldout_loss": None} | scores


def _loss_on_same_data(name: str, metrics: dict[str, float]) -> float | None:
    """The loss on the data of a metric: eval_loss for eval_accuracy."""
    return metrics.get(f"{name.partition('_')[0]}_loss")


def _run_in_group(command: list[str], log: Path) -> int:
    """Run a command with its output in a file; an interrupt stops the command and all of its processes."""
    # Without a buffer, so that what was printed before an error stands before it in the file.
    environment = {"PYTHONUNBUFFERED": "1"} | os.environ
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )
        try:
            return process.wait()
        finally:
            if process.returncode is None:
                _signal_group(process, signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(TERMINATE_SECONDS)
            _signal_group(process, getattr(signal, "SIGKILL", signal.SIGTERM))


def _signal_group(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(OSError):  # all have ended
        if hasattr(os, "killpg"):
            os.killpg(process.pid, number)
        else:
            process.terminate()


def _read_record(path: Path) -> list[dict[str, float]]:
    """The logged lines of a run; if it was killed, the last one may be incomplete."""
    lines = []
    for line in _text(path).splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def _read_results(folder: Path) -> dict[str, float]:
    """The values in the result files of Trainer's ``save_metrics``."""
    results: dict[str, float] = {}
    for name in RESULT_FILES:
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            found = json.loads((folder / name).read_text(encoding="utf-8"))
            results |= {key: value for key, value in found.items() if isinstance(value, int | float)}
    return results


def _keep_metrics_only(folder: Path) -> None:
    """Remove weights and checkpoints, which would fill the disk."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.suffix != ".json":
            path.unlink(missing_ok=True)


def _curves(lines: list[dict[str, float]], columns: dict[str, tuple[str, ...]]) -> list[dict[str, float]]:
    """The logged values by column of ``CURVE_COLUMNS``, one dict per step."""
    by_step: dict[int, dict[str, float]] = {}
    for line in lines:
        kept = {
            column: float(f"{line[name]:.5g}")
            for column, names in columns.items()
            for name in names
            if math.isfinite(line.get(name, math.nan))
        }
        if kept:
            by_step.setdefault(line["step"], {"step": line["step"]}).update(kept)
    return list(by_step.values())


def _inverse_shares(curves: list[dict[str, float]], steps: int | None) -> dict[str, float]:
    """The inverse share at the points of ``SHARE_POINTS``, from the nearest log within 25 % of the point."""
    logged = {point["step"]: point["inverse_share"] for point in curves if "inverse_share" in point}
    shares = {}
    for name, share in SHARE_POINTS.items() if logged and steps else ():
        target = share * steps
        nearest = min(logged, key=lambda step: abs(step - target))
        if abs(nearest - target) <= max(1.0, target / 4):
            shares[name] = logged[nearest]
    return shares


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
