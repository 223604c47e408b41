"""``python -m hf_dualadam`` and ``hf-dualadam`` run a script as plain Python does, with the optimizers registered."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hf_dualadam
from hf_dualadam import cli

ROOT = Path(__file__).parents[2]
LAUNCHER = [sys.executable, "-m", "hf_dualadam"]

# Inspects everything that a launcher could get wrong, then fails.
PROBE = '''
"""A script."""
import atexit
import pickle
import sys
import threading


class Thing:
    def __eq__(self, other):
        return type(self) is type(other)


def at_exit():
    print("at exit", pickle.loads(pickle.dumps(Thing())) == Thing(), sys.modules["__main__"].__dict__ is globals())


def f(x: int):
    return f.__annotations__  # text if the launcher's __future__ imports leaked in


atexit.register(at_exit)
print(__doc__, __name__, __file__, __package__, __spec__, type(__loader__).__name__)
print(sys.argv, sys.path[0], f(1), threading.current_thread() is threading.main_thread())
print(sorted(set(globals()) - {"__annotations__"}), flush=True)
try:
    1 / 0
except ZeroDivisionError as error:
    raise ValueError("the script's own error") from error
'''

# A user's Trainer script; at the end it spawns a process.
TRAINER_SCRIPT = """
import multiprocessing

import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        return {"x": torch.full((4,), index / 16), "labels": torch.tensor(index % 2)}


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 2)

    def forward(self, x, labels=None):
        logits = self.linear(x)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def in_child(data, queue):
    args = TrainingArguments("unused", optim="invadam", use_cpu=True)
    queue.put(f"{__name__} {type(data) is Data} {args.optim.value}")


def main():
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    trainer = Trainer(Model(), args, train_dataset=Data())
    trainer.train()
    print("trained with", type(trainer.optimizer.optimizer).__name__, "for", trainer.state.global_step, "steps")
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=in_child, args=(Data(), queue))
    process.start()
    print("child:", queue.get(timeout=60))
    process.join()


if __name__ == "__main__":
    main()
"""

# The same for a module.
SPAWNING_TOOL = """
import multiprocessing


def in_child(queue):
    from transformers import TrainingArguments

    queue.put((__name__, __package__, TrainingArguments("unused", optim="invadam", use_cpu=True).optim.value))


if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=in_child, args=(queue,))
    process.start()
    print(*queue.get(timeout=60))
    process.join()
"""


@pytest.fixture(autouse=True)
def environment():
    """The launcher's changes of the environment are undone after each test."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def run(command, cwd, PYTHONPATH=None):
    path = os.pathsep.join(filter(None, [str(ROOT), PYTHONPATH]))
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def assert_same(ours, plain):
    assert (ours.stdout, ours.stderr, ours.returncode) == (plain.stdout, plain.stderr, plain.returncode)


def test_console_command_shows_a_script_what_plain_python_shows_it(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "probe.py").write_text(PROBE)
    console = tmp_path / "bin" / "hf-dualadam"
    console.parent.mkdir()
    console.write_text("import sys\nfrom hf_dualadam.cli import main\nsys.exit(main())\n")
    command = ["folder/probe.py", "--version", "a b", "-m"]
    plain = run([sys.executable, *command], tmp_path)
    assert "at exit True True" in plain.stdout and plain.returncode == 1
    assert_same(run([sys.executable, str(console), *command], tmp_path), plain)


# Ways to end without an error, and an error in a thread other than the main one.
ENDINGS = {
    "text.py": "import sys\nsys.exit('no data')",
    "none.py": "import sys\nsys.exit()",
    # These are tested with Transformers, whose exit handlers change the status of every script that imports it.
    "interrupt.py": "from transformers import TrainingArguments\nraise KeyboardInterrupt",
    "at_once.py": "import os\nos._exit(9)",
    "thread.py": "import threading\nthreading.Thread(target=lambda: 1 / 0, name='worker').start()",
    "group.py": "class Stop(BaseException):\n    pass\n\n\nraise Stop('here') from KeyError('why')",
}
# The package is imported once; each script then runs in its own process, which ends as the script does.
RUN_EACH = """
import os
import sys

from hf_dualadam import cli

for script in sys.argv[1:]:
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        file = os.open(script + ".err", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 2)
        cli.main([script])
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_every_way_to_end_is_plain_pythons(tmp_path):
    for name, code in ENDINGS.items():
        (tmp_path / name).write_text(code + "\n")
    (tmp_path / "run_each.py").write_text(RUN_EACH)
    ours = run([sys.executable, "run_each.py", *ENDINGS], tmp_path)
    statuses = [int(line) for line in ours.stdout.split()]
    for name, status in zip(ENDINGS, statuses, strict=True):
        plain = run([sys.executable, name], tmp_path)
        assert ((tmp_path / f"{name}.err").read_text(), status) == (plain.stderr, plain.returncode), name
    assert {0, 1, 9} <= set(statuses)


def test_module_target_behaves_as_with_python_m(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "package" / "__main__.py").write_text(
        "import sys\nfrom . import __name__ as name\n"
        "print(name, sys.argv, sys.path[0], __package__, __spec__.name, __file__)\nsys.exit(7)\n"
    )
    plain = run([sys.executable, "-m", "package", "x"], tmp_path)
    assert plain.returncode == 7
    assert_same(run([*LAUNCHER, "-m", "package", "x"], tmp_path), plain)


def test_syntax_error_is_reported_without_frames_of_the_launcher(tmp_path, monkeypatch, capsys):
    script = tmp_path / "broken.py"
    script.write_text("print('never')\nfor\n")
    plain = run([sys.executable, str(script)], tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    with pytest.raises(SyntaxError) as error:
        cli.run_script(str(script), [])
    sys.excepthook(error.type, error.value, error.tb)
    assert capsys.readouterr().err == plain.stderr


def test_trainer_script_takes_optim_dualadam_under_accelerate_launch(tmp_path):
    (tmp_path / "train.py").write_text(TRAINER_SCRIPT)
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "-m", "hf_dualadam"]
    options = ["--output_dir", "out", "--optim", "dualadam", "--optim_args", "switch_fraction=0.5", "--use_cpu"]
    options += ["--max_steps", "3", "--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "true"]
    result = run([*launch, "train.py", *options], tmp_path)
    assert result.returncode == 0, result.stderr
    assert "trained with DualAdam for 3 steps" in result.stdout
    assert "child: __mp_main__ True invadam" in result.stdout


def test_processes_spawned_by_a_module_target_know_the_optimizers(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "package" / "tool.py").write_text(SPAWNING_TOOL)
    result = run([*LAUNCHER, "-m", "package.tool"], tmp_path)
    assert result.stdout.split() == ["__mp_main__", "package", "invadam"], result.stderr


# Every other way to start a Python process; each process prints the optimizer of its own TrainingArguments.
CHILD = """
import sys

from {first_import}
from transformers import TrainingArguments

print(sys.argv[1], TrainingArguments("unused", optim="invadam", use_cpu=True).optim.value)
"""
FIRST_IMPORTS = {
    "args": "transformers import TrainingArguments",
    "callback": "transformers import TrainerCallback",
    "ours": "hf_dualadam import DualAdam",
}
PARENT = """
import os
import subprocess
import sys

print("sitecustomize of this environment:", getattr(sys.modules.get("sitecustomize"), "name", None), flush=True)
for name in sys.argv[1:]:
    subprocess.run([sys.executable, f"{name}.py", name], check=True)
subprocess.run([sys.executable, "-c", "import sys, sitecustomize; print('chained', sitecustomize.name, sys.path)"])
subprocess.run([sys.executable, "-S", "-c", "print('without site')"], check=True)
subprocess.run([sys.executable, "-I", "-c", "import json; print('isolated')"], check=True)
subprocess.run([sys.executable, "-c", "import sys; print('unrelated', 'torch' in sys.modules)"])
sys.stdout.flush()
os.execv(sys.executable, [sys.executable, "args.py", "exec"])
"""


def test_children_know_the_optimizers_however_they_are_started(tmp_path):
    for name, first_import in FIRST_IMPORTS.items():
        (tmp_path / f"{name}.py").write_text(CHILD.format(first_import=first_import))
    (tmp_path / "parent.py").write_text(PARENT)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "sitecustomize.py").write_text("name = 'own'\n")
    result = run([*LAUNCHER, "parent.py", *FIRST_IMPORTS], tmp_path, PYTHONPATH=str(tmp_path / "own"))
    assert result.returncode == 0 and not result.stderr, result.stderr
    first, *lines = result.stdout.splitlines()
    assert first == "sitecustomize of this environment: own"
    plain = run([sys.executable, "-c", "import sys; print(sys.path)"], tmp_path, PYTHONPATH=str(tmp_path / "own"))
    assert lines == [
        *(f"{name} invadam" for name in FIRST_IMPORTS),
        f"chained own {plain.stdout.strip()}",
        "without site",
        "isolated",
        "unrelated False",
        "exec invadam",
    ]


FIXED_SCRIPT = """
import subprocess
import sys
from dataclasses import dataclass

from transformers import Seq2SeqTrainingArguments, TrainingArguments


@dataclass
class Own(TrainingArguments):
    def __post_init__(self):
        super().__post_init__()


for cls in (TrainingArguments, Seq2SeqTrainingArguments, Own):
    args = cls("unused", optim="adamw_torch", optim_args="fused=true", use_cpu=True)
    print(cls.__name__, args.optim.value, args.optim_args, flush=True)
if len(sys.argv) < 2:
    subprocess.run([sys.executable, __file__, "child"], check=True)
"""


def test_optim_before_the_script_replaces_what_the_script_sets(tmp_path):
    (tmp_path / "fixed.py").write_text(FIXED_SCRIPT)
    options = ["--optim", "dualadam", "--optim_args", "switch_fraction=0.3"]
    result = run([*LAUNCHER, *options, "fixed.py"], tmp_path)
    names = ("TrainingArguments", "Seq2SeqTrainingArguments", "Own")
    assert result.stdout.splitlines() == [f"{name} dualadam switch_fraction=0.3" for name in 2 * names], result.stderr
    line = (
        "hf-dualadam: optim=dualadam, optim_args=switch_fraction=0.3 instead of the script's optim=adamw_torch, "
        "optim_args=fused=true"
    )
    assert result.stderr.splitlines() == [line, line]  # once per process
    plain = run([*LAUNCHER, "fixed.py", "child"], tmp_path)
    assert plain.stdout.splitlines() == [f"{name} adamw_torch fused=true" for name in names] and not plain.stderr


def test_a_command_is_run_with_the_optimizers_known_to_what_it_starts(tmp_path):
    (tmp_path / "fixed.py").write_text(FIXED_SCRIPT)
    (tmp_path / "train.sh").write_text(f"{sys.executable} fixed.py child\n")
    result = run([*LAUNCHER, "--optim=invadam", "bash", "train.sh"], tmp_path)
    assert "TrainingArguments invadam None" in result.stdout.splitlines(), result.stderr
    assert "instead of the script's optim=adamw_torch, optim_args=fused=true" in result.stderr


def test_env_prints_versions_paths_and_kernels(capsys):
    cli.main(["env"])
    lines = dict(re.split("  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["hf_dualadam"] == f"{hf_dualadam.__version__} ({Path(hf_dualadam.__file__).parent})"
    assert sys.executable in lines["python"]
    assert lines["cpu kernel"].startswith(("active", "inactive: "))


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        ([], 2, "required: target"),
        (["--fast", "x.py"], 2, "unrecognized arguments: --fast"),
        (["env", "x"], 2, "env takes no arguments, got x"),
        (["missing.py"], 2, "can't open file"),
        (["--optim", "adm", "x.py"], 2, "Invalid --optim: adm - should be one of dualadam, invadam, adafactor"),
        (["--optim"], 2, "expected one argument"),
        (["--optim", "dualadam", "env"], 2, "--optim is for scripts, not for env"),
        (["--optim_args", "switch_rate=1", "x.py"], 2, "--optim_args needs --optim"),
        (["--optim", "dualadam", "--optim_args", "rate=1", "x.py"], 2, "Invalid optim_args: unknown key 'rate'"),
        (["--optim", "dualadam"], 2, "required: target"),
    ],
)
def test_bad_calls_end_in_one_clear_error(argv, status, message, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(argv)
    assert error.value.code == status
    assert message in capsys.readouterr().err
