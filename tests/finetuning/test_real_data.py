"""The scripts on the real GLUE tasks and images, with a tiny model; skipped if the folder is missing."""

from pathlib import Path

import pytest
from tiny import FAST, VIT, load_script, save_bert

DATA = Path(__file__).parents[3] / "shared" / "data"
ROWS = {"cola": (8551, 1043), "rte": (2490, 277), "sst2": (12000, 872), "wnli": (635, 71)}

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no folder {DATA}")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.mark.parametrize("name", ROWS)
def test_glue_task(tmp_path, model, name):
    paths = ["--task_name", name, "--data_dir", str(DATA / "glue" / name), "--output_dir", str(tmp_path / "out")]
    options = ["--model_name_or_path", str(model), "--eval_strategy", "no", "--per_device_eval_batch_size", "128"]
    finished = load_script("run_glue").main([*paths, *options, *FAST])
    assert (finished.metrics["train_samples"], finished.metrics["eval_samples"]) == ROWS[name]
    majority = {"cola": 0.0, "rte": 146 / 277, "sst2": 444 / 872, "wnli": 40 / 71}[name]
    assert finished.task.baseline == pytest.approx(majority)


def test_mnist_subset(tmp_path):
    paths = ["--data_dir", str(DATA / "images" / "mnist5k"), "--output_dir", str(tmp_path / "out")]
    options = ["--model_config", str(VIT | {"image_size": 28, "patch_size": 7}), "--eval_split", "test"]
    finished = load_script("run_image_classification").main([*paths, *options, *FAST, "--eval_strategy", "no"])
    assert (finished.metrics["train_samples"], finished.metrics["eval_samples"]) == (4000, 1000)
    assert finished.task.label_names == [str(digit) for digit in range(10)] and finished.task.baseline == 0.1
