"""Incomplete checkpoints of a killed run are skipped, with one line that names the file."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from test_trainer import TinyModel, _train

from hf_dualadam.trainer.checkpoints import checkpoint_problem, last_complete_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    _train(folder, save_strategy="steps", save_steps=4)
    return folder


@pytest.fixture
def folder(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def test_takes_the_last_complete_checkpoint_by_number(folder):
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-12")
    shutil.copytree(folder / "checkpoint-4", folder / "checkpoint-100")
    (folder / "checkpoint-best").mkdir()
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-100")


def test_finds_nothing_where_nothing_is(tmp_path):
    assert last_complete_checkpoint(tmp_path) is None and last_complete_checkpoint(tmp_path / "none") is None
    assert checkpoint_problem(tmp_path / "none") == f"{tmp_path / 'none'}: no such folder"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_truncated_files_are_found(folder, caplog, name, share):
    path = folder / "checkpoint-12" / name
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert checkpoint_problem(path.parent).startswith(f"{path}: cannot be read: it is truncated")
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-8")
    assert f"Skipping an incomplete checkpoint: {path}" in caplog.text


@pytest.mark.parametrize("text", ["", '{"epoch": 1.0, "glo', "[1, 2", "\ud800".encode("utf-8", "surrogatepass")])
def test_trainers_state_cut_off(folder, text):
    path = folder / "checkpoint-12" / "trainer_state.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert checkpoint_problem(path.parent).startswith(f"{path}: cannot be read")


@pytest.mark.parametrize("name", ["trainer_state.json", "model.safetensors", "optimizer.pt"])
def test_missing_files_are_found(folder, name):
    (folder / "checkpoint-12" / name).unlink()
    problem = checkpoint_problem(folder / "checkpoint-12")
    assert problem.startswith(str(folder / "checkpoint-12")) and "\n" not in problem
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-8")


def test_missing_shard_is_found(folder):
    checkpoint = folder / "checkpoint-12"
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00002.safetensors")
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = {"weight_map": dict(zip("ab", names))}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert checkpoint_problem(checkpoint).startswith(f"{checkpoint / names[1]}: is missing")


def test_sharded_optimizer_without_its_table_of_contents(folder):
    (folder / "checkpoint-12" / "optimizer_0").mkdir()
    assert checkpoint_problem(folder / "checkpoint-12").endswith("optimizer_0: is incomplete: it holds no .metadata")


def test_checkpoint_of_another_model_is_told(folder):
    checkpoint = folder / "checkpoint-12"
    assert checkpoint_problem(checkpoint, TinyModel()) is None
    wider = torch.nn.Module()
    wider.layers = torch.nn.Sequential(torch.nn.Linear(4, 9), torch.nn.Tanh(), torch.nn.Linear(9, 1))
    problem = checkpoint_problem(checkpoint, wider)
    assert problem == (
        f"{checkpoint / 'model.safetensors'}: is of another model: its layers.0.bias has shape (8,), here (9,)"
    )
    save_file({"encoder.weight": torch.ones(2)}, checkpoint / "model.safetensors")
    assert "is of another model: none of its weights, such as encoder.weight," in checkpoint_problem(
        checkpoint, TinyModel()
    )
