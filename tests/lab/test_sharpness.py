"""The sharpness of a small Hugging Face model equals that of its explicitly built Hessian."""

import copy
import json
import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("hessian_eigenthings")

from torch.func import functional_call
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hf_dualadam.finetuning.config import InputError
from hf_dualadam.lab.sharpness import loss_slice, measure_sharpness

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import measure_sharpness as measure_saved_sharpness

RHO = 0.1


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=12,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=6,
        max_position_embeddings=8,
        initializer_range=0.5,
        num_labels=3,
        attn_implementation="sdpa",
    )
    return BertForSequenceClassification(config).double().train()


@pytest.fixture(scope="module")
def batches():
    """Two batches of unequal size, with padding."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for size, length in ((5, 6), (2, 4)):
        mask = torch.ones(size, length, dtype=torch.long)
        mask[0, length // 2 :] = 0
        made.append(
            {
                "input_ids": torch.randint(0, 12, (size, length), generator=generator),
                "attention_mask": mask,
                "labels": torch.randint(0, 3, (size,), generator=generator),
            }
        )
    return made


@pytest.fixture(scope="module")
def exact(model, batches):
    """Loss function of the flat weights, the weights, gradient and full Hessian, by torch.autograd.functional."""
    model = copy.deepcopy(model).eval()
    names = [name for name, _ in model.named_parameters()]
    shapes = [param.shape for param in model.parameters()]
    weights = torch.cat([param.detach().flatten() for param in model.parameters()])

    def loss(flat):
        parts = flat.split([shape.numel() for shape in shapes])
        params = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes)}
        losses = [functional_call(model, params, (), batch).loss * len(batch["labels"]) for batch in batches]
        return sum(losses) / sum(len(batch["labels"]) for batch in batches)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        hessian = torch.autograd.functional.hessian(loss, weights)
        gradient = torch.autograd.functional.jacobian(loss, weights)
    return loss, weights, gradient, hessian


def test_matches_the_exact_hessian(model, batches, exact):
    loss, weights, gradient, hessian = exact
    got = measure_sharpness(model, batches, rho=RHO, lanczos_steps=60, trace_samples=100)
    assert math.isclose(got.loss, loss(weights).item(), rel_tol=1e-9)
    assert math.isclose(got.hessian_top_eigenvalue, torch.linalg.eigvalsh(hessian)[-1].item(), rel_tol=1e-4)
    assert abs(got.hessian_trace - hessian.trace().item()) < 4 * got.hessian_trace_stderr
    assert got.hessian_trace_stderr < 0.15 * abs(hessian.trace().item())
    rise = loss(weights + RHO * gradient / gradient.norm()) - loss(weights)
    assert math.isclose(got.ball_sharpness, rise.item(), rel_tol=1e-6)


def test_model_is_left_as_it_was(model, batches):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = measure_sharpness(model, batches, lanczos_steps=3, trace_samples=2)
    assert model.training and all(param.grad is None for param in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert first == measure_sharpness(model, batches, lanczos_steps=3, trace_samples=2)  # dropout is disabled


def test_unused_and_frozen_parameters_are_left_out(model, batches):
    model.idle = torch.nn.Linear(2, 2).double()
    model.classifier.requires_grad_(False)
    try:
        frozen = measure_sharpness(model, batches, lanczos_steps=40, trace_samples=2)
    finally:
        model.classifier.requires_grad_(True)
        del model.idle
    whole = measure_sharpness(model, batches, lanczos_steps=40, trace_samples=2)
    assert 0 < frozen.hessian_top_eigenvalue < whole.hessian_top_eigenvalue


def test_slice_has_the_curvature_of_the_top_eigenvector(model, batches, exact):
    h = 1e-3
    losses = loss_slice(model, batches, [-h, 0.0, h], lanczos_steps=60)["top eigenvector"]
    curvature = (losses[0] - 2 * losses[1] + losses[2]) / h**2
    assert math.isclose(curvature, torch.linalg.eigvalsh(exact[3])[-1].item(), rel_tol=1e-3)


def test_bad_arguments_are_named(model, batches):
    with pytest.raises(ValueError, match="Invalid batches: none"):
        measure_sharpness(model, [])
    with pytest.raises(ValueError, match="Invalid rho: 0"):
        measure_sharpness(model, batches, rho=0)
    with pytest.raises(ValueError, match="Invalid lanczos_steps: 0"):
        measure_sharpness(model, batches, lanczos_steps=0)


def test_a_saved_model_is_measured_and_drawn(tmp_path, capsys):
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=3, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, num_labels=10,
    )  # fmt: skip
    torch.manual_seed(0)
    ViTForImageClassification(config).save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "model")
    options = "--script image_classification --dataset_name embedded/digits --max_train_samples 20 --examples 10"
    options += " --lanczos_steps 2 --trace_samples 1"
    measure_saved_sharpness.main([str(tmp_path / "model"), *options.split()])
    figures = json.loads((tmp_path / "model" / "sharpness.json").read_text())
    assert figures["examples"] == 10 and figures["hessian_top_eigenvalue"] > 0
    middle = len(figures["distances"]) // 2
    for losses in figures["slice"].values():
        assert math.isclose(losses[middle], figures["loss"], rel_tol=1e-5)
    assert (tmp_path / "model" / "loss_slice.png").stat().st_size > 5000
    assert "hessian_top_eigenvalue" in capsys.readouterr().out


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(InputError, match="CHECKPOINT: .*nowhere - should be the folder of a saved model"):
        measure_saved_sharpness.main([str(tmp_path / "nowhere"), "--task_name", "sst2"])
