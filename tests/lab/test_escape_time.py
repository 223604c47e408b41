"""scripts/escape_time.py: escape times follow the theory's slopes, and bad arguments are refused."""

import csv
import json
import math

import pytest
import torch
from tiny import load_script

from hf_dualadam import DualAdam
from hf_dualadam.lab import escape

THEORY = {"sgd": -1.0, "adam": -0.5, "invadam": -1.5, "dualadam": -1.0}


@pytest.fixture(scope="module")
def script():
    return load_script("escape_time")


@pytest.fixture(scope="module")
def outputs(script, tmp_path_factory):
    """A short run: fewer particles and steps than by default, so the intervals are wider."""
    folder = tmp_path_factory.mktemp("escape")
    script.main(["--output_dir", str(folder), "--particles", "256", "--steps", "4000", "--seeds", "0"])
    return folder


def test_slopes_are_those_of_the_theory(outputs):
    slopes = json.loads((outputs / "escape_times.json").read_text())
    assert set(slopes) == set(THEORY)
    for name, theory in THEORY.items():
        low, high = slopes[name]["ci95"]
        assert low < slopes[name]["slope"] < high
        assert slopes[name]["slope"] == pytest.approx(theory, abs=0.15), name
    by_alpha = [slopes["dualadam"]["by_alpha"][alpha]["slope"] for alpha in ("0.25", "0.5", "0.75")]
    assert slopes["adam"]["slope"] > by_alpha[0] > by_alpha[1] > by_alpha[2] > slopes["invadam"]["slope"]


def test_csv_has_every_point_and_agrees_with_the_json(outputs):
    with (outputs / "escape_times.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(escape.RULES) * len(escape.FITTED + escape.OUTSIDE)
    sgd = [row for row in rows if row["optimizer"] == "sgd" and row["fitted"] == "True"]
    x = torch.tensor([math.log(float(row["sharpness"])) for row in sgd], dtype=torch.float64)
    y = torch.tensor(
        [math.log(math.log(float(row["mean_escape_steps"]) / float(row["attempt_steps"]))) for row in sgd],
        dtype=torch.float64,
    )
    slope = torch.linalg.lstsq(torch.stack([x, torch.ones_like(x)], 1), y[:, None]).solution[0, 0]
    assert json.loads((outputs / "escape_times.json").read_text())["sgd"]["slope"] == pytest.approx(float(slope))


def test_pictures_are_written(outputs):
    for name in ("escape_times.png", "trajectories.png"):
        assert (outputs / name).read_bytes().startswith(b"\x89PNG")


def test_dualadam_is_the_real_class_with_alpha_held():
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = escape.build_optimizer(escape.Rule("dualadam", 0.25), param, torch.ones(3))
    assert type(optimizer) is DualAdam
    for _ in range(10):
        param.grad = torch.ones(3)
        optimizer.step()
    step, rate = float(optimizer.state[param]["step"]), optimizer.param_groups[0]["switch_rate"]
    assert 1 - step * rate == pytest.approx(0.25, abs=1e-5)


def test_invadam_leaves_the_sharp_valley_more_often_than_adam():
    shares = {
        rule.name: escape.walk_valleys(rule, particles=128, steps=1000).share_flat
        for rule in (escape.Rule("adam", 0.0), escape.Rule("invadam", 1.0))
    }
    assert shares["invadam"] > shares["adam"] + 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--particles", "0"], "--particles: 0 - should be 1 or more"),
        (["--steps", "-5"], "--steps: -5 - should be 1 or more"),
        (["--seeds", "1", "1"], "--seeds: [1, 1] - should be distinct numbers"),
    ],
)
def test_bad_numbers_are_refused(script, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        script.main(["--output_dir", str(tmp_path / "new"), *arguments])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_an_earlier_run_is_not_overwritten(script, outputs, capsys):
    before = (outputs / "escape_times.csv").read_bytes()
    with pytest.raises(SystemExit):
        script.main(["--output_dir", str(outputs)])
    assert "already has escape_times.csv" in capsys.readouterr().err
    assert (outputs / "escape_times.csv").read_bytes() == before


def test_too_few_escapes_end_in_an_error(script, tmp_path):
    with pytest.raises(SystemExit, match="increase particles or steps"):
        script.main(["--output_dir", str(tmp_path), "--particles", "1", "--steps", "10"])
    assert not list(tmp_path.iterdir())
