"""Share the runs of a comparison among processes and machines through an Optuna storage.

Optuna has one trial per run and assigns each to one worker. Two rules complete this: the trial of a run is the first
one with its key that is not lost (so two workers may add the same run), and a running trial whose heartbeat has
stopped is lost (so killed workers need no cleanup).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

RESULT = "result"
MAX_CRASHES = 5  # a run that crashed its worker this many times is not tried again


def open_storage(address: str) -> BaseStorage:
    """Open or create a storage.

    Args:
        address: a database URL (``sqlite:///...``, ``postgresql://...``), or the path of a journal file (network file
            systems need file locks).
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if "://" in address:
        return RDBStorage(address)
    Path(address).parent.mkdir(parents=True, exist_ok=True)
    # The system releases this lock when its process is killed. Optuna's own lock would block the others for 30 s, long
    # enough for them to be considered dead.
    return JournalStorage(JournalFileBackend(address, lock_obj=FileLock(f"{address}.lock")))


class RunQueue:
    """The runs of one comparison.

    Args:
        storage: shared by all workers.
        name: of the comparison; a storage can hold several.
        heartbeat: seconds between heartbeats of a running trial.
        patience: seconds without a heartbeat after which a trial is lost, on the clock of the machine that waits.
    """

    def __init__(self, storage: BaseStorage, name: str, heartbeat: float = 5.0, patience: float = 45.0):
        self.storage, self.heartbeat, self.patience = storage, heartbeat, patience
        self._study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
        self._study_id = storage.get_study_id_from_name(name)
        self._heartbeats: dict[int, tuple[Any, float]] = {}  # trial number -> last heartbeat, and when we saw it

    def trials(self) -> dict[str, FrozenTrial]:
        """The valid trial of each run, by key."""
        found: dict[str, FrozenTrial] = {}
        for trial in self._study.get_trials(deepcopy=False):
            lost = trial.state == TrialState.FAIL and RESULT not in trial.user_attrs
            if not lost:
                found.setdefault(trial.user_attrs["key"], trial)
        return found

    def results(self) -> dict[str, Any]:
        """Results of the finished runs, by key."""
        return {key: trial.user_attrs[RESULT] for key, trial in self.trials().items() if RESULT in trial.user_attrs}

    def add(self, keys: Iterable[str]) -> None:
        """Add runs; existing ones are unchanged."""
        known = self.trials()
        for key in keys:
            if key not in known:
                self._study.add_trial(optuna.trial.create_trial(state=TrialState.WAITING, user_attrs={"key": key}))

    def claim(self, keys: Iterable[str]) -> str | None:
        """Take the first of ``keys`` that waits for a worker; None if there is none."""
        trials = self.trials()
        for key in keys:
            trial = trials.get(key)
            if trial is None or trial.state != TrialState.WAITING:
                continue
            with contextlib.suppress(UpdateFinishedTrialError):  # another worker has claimed or finished it
                if self.storage.set_trial_state_values(self._id(trial), TrialState.RUNNING):
                    return key
        return None

    @contextlib.contextmanager
    def running(self, key: str) -> Iterator[None]:
        """Send heartbeats for a claimed run; an interrupt puts the run back into the queue."""
        trial_id = self._id(self.trials()[key])
        stop = threading.Event()

        def beat() -> None:
            count = 0
            while not stop.wait(self.heartbeat):
                count += 1
                with contextlib.suppress(UpdateFinishedTrialError):
                    self.storage.set_trial_user_attr(trial_id, "heartbeat", count)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            self._put_back(trial_id, key)
            raise
        finally:
            stop.set()
            thread.join()

    def finish(self, key: str, result: Any, value: float | None) -> None:
        """Store the result of a claimed run, even if the run was considered lost; the first result is kept.

        Args:
            key: the run.
            result: JSON-serializable.
            value: Optuna's objective value, None for a run that failed.
        """
        trial = self.trials()[key]
        with contextlib.suppress(UpdateFinishedTrialError):
            self.storage.set_trial_user_attr(self._id(trial), RESULT, result)
            state = TrialState.FAIL if value is None else TrialState.COMPLETE
            self.storage.set_trial_state_values(self._id(trial), state, None if value is None else [value])

    def reclaim(self) -> list[str]:
        """Return runs of dead workers to the queue; return their keys."""
        now, lost = time.monotonic(), []
        for key, trial in self.trials().items():
            if trial.state != TrialState.RUNNING or RESULT in trial.user_attrs:
                continue
            heartbeat = trial.user_attrs.get("heartbeat")
            seen, since = self._heartbeats.get(trial.number, (None, None))
            if since is None or seen != heartbeat:
                self._heartbeats[trial.number] = (heartbeat, now)
            elif now - since > self.patience:
                self._put_back(self._id(trial), key)
                lost.append(key)
        return lost

    def crashes(self, key: str) -> int:
        """How many times the run crashed its worker."""
        trials = self._study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
        return sum(trial.user_attrs["key"] == key and RESULT not in trial.user_attrs for trial in trials)

    def _put_back(self, trial_id: int, key: str) -> None:
        with contextlib.suppress(UpdateFinishedTrialError):
            self.storage.set_trial_state_values(trial_id, TrialState.FAIL)
        self.add([key])

    def _id(self, trial: FrozenTrial) -> int:
        return self.storage.get_trial_id_from_study_id_trial_number(self._study_id, trial.number)
