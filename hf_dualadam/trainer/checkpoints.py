"""Find Trainer checkpoints from which a run can be resumed.

Trainer writes a checkpoint file by file into its final folder and deletes old ones file by file, so a killed run can
leave incomplete checkpoints, and ``transformers.trainer_utils.get_last_checkpoint`` returns them.
"""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

logger = logging.getLogger(__name__)

TRAINER_STATE = "trainer_state.json"  # Trainer writes it last
# One of each must exist: as a file, or as what the sharded checkpoints of FSDP and DeepSpeed contain instead.
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "adapter_model.*", "pytorch_model_fsdp*", "latest")
_OPTIMIZER = ("optimizer.pt", "optimizer.bin", "optimizer_[0-9]*", "latest")
_SHARDED = ("optimizer_[0-9]*", "pytorch_model_fsdp_[0-9]*")
_ARCHIVES = ("*.pt", "*.pth", "pytorch_model*.bin", "adapter_model.bin", "optimizer*.bin", "training_args.bin")


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """Find the checkpoint to resume a run from; incomplete ones are skipped with a warning each.

    Args:
        output_dir: Trainer's output folder, with ``checkpoint-<step>`` folders in it.

    Returns:
        The folder of the highest step for which :func:`checkpoint_problem` finds no problem, or None.
    """
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    for folder in sorted(folders, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        problem = checkpoint_problem(folder)
        if problem is None:
            return str(folder)
        logger.warning("Skipping an incomplete checkpoint: %s", problem)
    return None


def checkpoint_problem(checkpoint: str | Path, model: torch.nn.Module | None = None) -> str | None:
    """Say why a run cannot be resumed from a checkpoint, without loading it.

    Finds missing and truncated files, not flipped bits.

    Args:
        checkpoint: a ``checkpoint-<step>`` folder of Trainer.
        model: the model to resume training with, to check that the checkpoint is of the same model. Default None.

    Returns:
        One line that starts with the file name, or None if there is no problem.
    """
    checkpoint = Path(checkpoint)
    return next(_problems(checkpoint, model), None)


def _problems(checkpoint: Path, model: torch.nn.Module | None) -> Iterator[str]:
    if not checkpoint.is_dir():
        yield f"{checkpoint}: no such folder"
        return
    yield from _json_problems(checkpoint / TRAINER_STATE, "global_step")
    for patterns, content in ((_WEIGHTS, "weights"), (_OPTIMIZER, "optimizer state")):
        if not any(any(checkpoint.glob(pattern)) for pattern in patterns):
            yield f"{checkpoint}: holds no {content}"
    for index in checkpoint.glob("*.index.json"):
        yield from _json_problems(index, "weight_map")
        for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())):
            if not (checkpoint / name).is_file():
                yield f"{checkpoint / name}: is missing, though {index.name} lists it"
    for path in sorted(checkpoint.rglob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            yield f"{path}: cannot be read: it is truncated or not a safetensors file ({error})"
    for path in sorted({path for pattern in _ARCHIVES for path in checkpoint.rglob(pattern) if path.is_file()}):
        if not zipfile.is_zipfile(path):  # looks for the table of contents at the end of the file
            yield f"{path}: cannot be read: it is truncated or was not written by torch.save"
    for pattern in _SHARDED:
        for folder in filter(Path.is_dir, checkpoint.glob(pattern)):
            if not (folder / ".metadata").is_file():
                yield f"{folder}: is incomplete: it holds no .metadata"
    if model is not None:
        yield from _mismatches(checkpoint, model)


def _json_problems(path: Path, key: str) -> Iterator[str]:
    try:
        if key not in json.loads(path.read_text(encoding="utf-8")):
            yield f"{path}: holds no {key}"
    except FileNotFoundError:
        yield f"{path}: is missing: the checkpoint is incomplete or was not written by Trainer"
    except (OSError, ValueError, TypeError) as error:
        yield f"{path}: cannot be read: it is truncated or not a JSON file ({error})"


def _mismatches(checkpoint: Path, model: torch.nn.Module) -> Iterator[str]:
    """Signs that a checkpoint is of another model. Different names are not enough: saving can rename weights."""
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for path in checkpoint.glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        if saved and not saved.keys() & own.keys():
            yield f"{path}: is of another model: none of its weights, such as {next(iter(saved))}, exists in this one"
        for name in sorted(saved.keys() & own.keys()):
            if saved[name] != own[name]:
                yield f"{path}: is of another model: its {name} has shape {saved[name]}, here {own[name]}"
