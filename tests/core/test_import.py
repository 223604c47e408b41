"""Importing the package is light, works without transformers, and hides no broken transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {"scipy", "sklearn", "matplotlib", "datasets", "pandas", "transformers.trainer"}
SLOWDOWN = 1.05  # of what a Trainer script imports anyway
MAX_RUNS = 20

# What a Trainer script imports anyway, then this package: seconds of each, and the modules that the second added.
MEASURE = """
import json, sys, time
start = time.perf_counter()
import torch, transformers.training_args, transformers.trainer_callback
middle = time.perf_counter()
before = set(sys.modules)
import hf_dualadam
end = time.perf_counter()
print(json.dumps([middle - start, end - middle, sorted(set(sys.modules) - before)]))
"""
WITHOUT_TRANSFORMERS = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "transformers":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import torch
import hf_dualadam

param = torch.nn.Parameter(torch.ones(2))
for cls in (hf_dualadam.DualAdam, hf_dualadam.InvAdam):
    param.grad = torch.ones(2)
    cls([param], lr=0.1).step()
assert param.max() < 1
try:
    hf_dualadam.register()
except ImportError as error:
    print(error)
"""


def run_python(code, *paths):
    path = os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", str(ROOT))])
    env = os.environ | {"PYTHONPATH": path}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)


def test_import_adds_little_time_and_nothing_heavy():
    bases, ours = [], []
    for _ in range(MAX_RUNS):  # a busy machine only makes runs slower, so the fastest of several runs counts
        done = run_python(MEASURE)
        assert done.returncode == 0, done.stderr
        base, own, added = json.loads(done.stdout)
        if "transformers.trainer" in added:
            pytest.skip("before transformers 5.2, registering changes a method of Trainer, so it imports Trainer")
        assert not HEAVY & {name.partition(".")[0] for name in added}
        bases.append(base)
        ours.append(own)
        if min(bases) + min(ours) <= SLOWDOWN * min(bases):
            return
    pytest.fail(f"import hf_dualadam adds {min(ours):.3f} s to {min(bases):.3f} s")


def test_optimizers_work_without_transformers():
    done = run_python(WITHOUT_TRANSFORMERS)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Registering with Trainer needs transformers: pip install transformers\n"


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("raise ImportError('its library is missing')", "ImportError: its library is missing"),
        ("import needed_by_it", "ModuleNotFoundError: No module named 'needed_by_it'"),
    ],
)
def test_a_broken_transformers_is_not_hidden(tmp_path, code, error):
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text(code + "\n")
    done = run_python("import hf_dualadam", tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == error


def test_an_unknown_transformers_is_refused_with_its_version(tmp_path):
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("__version__ = '4.0.1'\n")
    (tmp_path / "transformers" / "trainer_callback.py").write_text(
        "class TrainerCallback: pass\nTrainerControl = TrainerState = object\n"
    )
    (tmp_path / "transformers" / "training_args.py").write_text("class TrainingArguments: pass\n")
    done = run_python("import hf_dualadam", tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: hf_dualadam cannot register")
    assert "transformers 4.0.1" in done.stderr.splitlines()[-1]
