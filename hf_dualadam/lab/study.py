"""Execute a comparison with any number of workers: choose each learning rate, then run all seeds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

from .comparison import Comparison, RunSpec
from .run_queue import MAX_CRASHES, RunQueue

Results = dict[str, Any]
IDLE_SECONDS = 1.0


class Study:
    """The state of a comparison in a queue.

    Args:
        comparison: the comparison.
        queue: shared with the other workers.
    """

    def __init__(self, comparison: Comparison, queue: RunQueue):
        self.comparison, self.queue = comparison, queue

    def known_runs(self, results: Results) -> list[RunSpec]:
        """All runs known so far; the final runs of an optimizer depend on its selection runs."""
        runs = [run for pair in self.comparison.pairs() for run in self.comparison.selection_runs(*pair)]
        for task, optimizer in self.comparison.pairs():
            rate = chosen_learning_rate(self.comparison, task, optimizer, results)
            if rate is not None:
                runs += self.comparison.final_runs(task, optimizer, rate)
        return runs

    def work(self, execute: Callable[[RunSpec], dict[str, Any]]) -> Iterator[tuple[RunSpec, Results]]:
        """Execute runs until all are finished, by this worker or another one.

        Final runs are in the order of their seeds, so that an interrupted comparison has about the same number for
        every optimizer.

        Args:
            execute: executes one run; its result holds ``row``, ``curves`` and ``score``.

        Yields:
            After each run of this worker: the run and all results so far.
        """
        while True:
            results = self.queue.results()
            in_order = sorted(self.known_runs(results), key=lambda run: (run.role == "final", run.seed))
            runs = {run.key: run for run in in_order}
            self.queue.add(runs)
            key = self.queue.claim(runs)
            if key is not None:
                with self.queue.running(key):
                    result = self._given_up(runs[key]) or execute(runs[key])
                    self.queue.finish(key, result, result["score"])
                yield runs[key], self.queue.results()
            elif len(results) >= self.comparison.size() and set(runs) <= set(results):
                return
            elif not self.queue.reclaim():
                time.sleep(IDLE_SECONDS)

    def rows(self, results: Results) -> list[dict[str, Any]]:
        """The finished runs of the comparison, in its order."""
        return [results[run.key]["row"] for run in self.known_runs(results) if run.key in results]

    def curves(self, results: Results) -> list[dict[str, Any]]:
        """The logs of the finished runs, one row per run and step."""
        return [
            {"task": run.task, "optimizer": run.optimizer, "seed": run.seed, "learning_rate": run.learning_rate}
            | point
            for run in self.known_runs(results)
            if run.key in results and run.role == "final"
            for point in results[run.key]["curves"]
        ]

    def _given_up(self, run: RunSpec) -> dict[str, Any] | None:
        """The result of a run that crashed its worker too often to be tried again."""
        if self.queue.crashes(run.key) < MAX_CRASHES:
            return None
        status = f"crashed: its worker died {MAX_CRASHES} times"
        return {
            "row": self.comparison.empty_row(run) | {"status": status},
            "curves": [],
            "score": None,
            "wall_seconds": 0.0,
        }


def chosen_learning_rate(comparison: Comparison, task: str, optimizer: str, results: Results) -> float | None:
    """The rate with the best mean selection metric, ties broken by the loss; None while selection runs are missing.

    Runs that diverged or crashed count as the worst. A single rate needs no selection.
    """
    runs = comparison.selection_runs(task, optimizer)
    if any(run.key not in results for run in runs):
        return None

    def score(rate: float) -> tuple[float, float]:
        found = [results[run.key] for run in runs if run.learning_rate == rate]
        if any(result["score"] is None for result in found):
            return -math.inf, -math.inf
        losses = [result["row"]["selection_loss"] for result in found]
        return sum(result["score"] for result in found), -sum(loss for loss in losses if loss is not None)

    rates = comparison.learning_rates(task, optimizer)
    return max(rates, key=score) if runs else rates[0]
