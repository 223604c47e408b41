"""Train, kill the training repeatedly with SIGKILL, and resume it: ``python crashing.py FOLDER KILLS SEED``.

Every training is a process of its own, forked from this one, which has done the imports. It is killed at a random
moment of its life or, every other time, within milliseconds of a checkpoint folder's appearing. The last line printed
is a JSON object with what happened.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import hf_dualadam  # noqa: F401 - gives Trainer the names
from hf_dualadam.trainer.checkpoints import checkpoint_problem, last_complete_checkpoint

STEPS, SAVE_STEPS = 60, 3
OPTIMIZERS = {"dualadam": "switch_fraction=0.6,normalize_inverse=true", "invadam": "normalize_inverse=true"}


class Net(torch.nn.Module):
    """Large enough for a checkpoint to take a while, with dropout, so that random states matter too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(8, 1000), torch.nn.Dropout(0.2), torch.nn.Linear(1000, 500), torch.nn.Linear(500, 1)
        )

    def forward(self, x, labels=None):
        logits = self.layers(x).squeeze(-1)
        return {"loss": torch.nn.functional.mse_loss(logits, labels), "logits": logits}


class Announcement(TrainerCallback):
    """Creates a file when training begins, as a signal to the parent process."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_begin(self, args, state, control, **kwargs):
        (self.folder / "begun").touch()


def train(folder, optim):
    """Do what a user's script does: resume from the last complete checkpoint, if there is one."""
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    args = TrainingArguments(
        output_dir=str(folder),
        optim=optim,
        optim_args=OPTIMIZERS[optim],
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=SAVE_STEPS,
        save_total_limit=2,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=SAVE_STEPS,
    )
    data = [{"x": a, "labels": b} for a, b in zip(x, (x**2).sum(1))]
    trainer = Trainer(Net(), args, train_dataset=data, callbacks=[Announcement(folder)])
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    torch.save(trainer.model.state_dict(), folder / "final.tmp")
    (folder / "final.tmp").rename(folder / "final.pt")


def start(folder, optim):
    """Start a training in a new process; return its id."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "begun").unlink(missing_ok=True)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with open(folder / "log.txt", "a") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                train(folder, optim)
            status = 0
        finally:
            os._exit(status)
    return child


def run_to_the_end(folder, optim):
    """Seconds that an undisturbed training takes after its first step."""
    child = start(folder, optim)
    wait_until((folder / "begun").exists, child)
    begun = time.monotonic()
    _, status = os.waitpid(child, 0)
    assert status == 0, (folder / "log.txt").read_text()[-3000:]
    return time.monotonic() - begun


def wait_until(condition, child):
    """Poll until the condition holds; False if the training has ended before."""
    while not condition():
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False
        time.sleep(0.0005)
    return True


def kill(folder, optim, generator, duration, during_write):
    """Train and kill; return whether the process was still alive, and whether it leaves an incomplete checkpoint."""
    before = set(folder.glob("checkpoint-*"))
    child = start(folder, optim)
    alive = wait_until((folder / "begun").exists, child)
    if alive and during_write:
        saves = generator.randint(1, 3)
        alive = wait_until(lambda: len(set(folder.glob("checkpoint-*")) - before) >= saves, child)
        time.sleep(generator.uniform(0, 0.03))
    elif alive:
        time.sleep(generator.uniform(0, duration / 3))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        assert status == 0, (folder / "log.txt").read_text()[-3000:]
        return False, False
    newest = get_last_checkpoint(folder)
    return True, newest is not None and checkpoint_problem(newest) is not None


def main(folder, kills, seed):
    folder, generator = Path(folder), random.Random(int(seed))
    straight = {}
    for optim in OPTIMIZERS:
        duration = run_to_the_end(folder / f"straight-{optim}", optim)
        straight[optim] = torch.load(folder / f"straight-{optim}" / "final.pt")
    report = {"kills": 0, "half_written_checkpoints": 0, "kills_without_any_checkpoint": 0, "runs": 0, "equal": 0}
    while report["kills"] < int(kills):
        optim = list(OPTIMIZERS)[report["runs"] % len(OPTIMIZERS)]
        run = folder / f"run-{report['runs']}"
        while not (run / "final.pt").exists() and report["kills"] < int(kills):
            killed, half_written = kill(run, optim, generator, duration, report["kills"] % 2 == 1)
            report["kills"] += killed
            report["half_written_checkpoints"] += half_written
            report["kills_without_any_checkpoint"] += killed and last_complete_checkpoint(run) is None
        if not (run / "final.pt").exists():
            run_to_the_end(run, optim)
        final = torch.load(run / "final.pt")
        report["runs"] += 1
        report["equal"] += all(torch.equal(final[name], straight[optim][name]) for name in final)
        shutil.rmtree(run)
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
