"""Measure how sharp a minimum is: largest Hessian eigenvalue, Hessian trace, and loss rise in a small ball.

Hessian-vector products, the Lanczos eigenvalue and the trace come from ``hessian-eigenthings``, which accepts the dict
batches of Hugging Face models (including masks and labels) and needs only torch and scipy. (``curvlinops`` does the
same, but requires torchvision.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from hessian_eigenthings import (
    EigenResult,
    HessianOperator,
    hutchinson,
    lanczos,
    params_to_vector,
    vector_to_params,
)
from hessian_eigenthings.batching import move_batch_to_device
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Batch = dict[str, Any]


class Sharpness(NamedTuple):
    """Sharpness of one model on one fixed set of batches.

    Attributes:
        loss: mean loss per example.
        hessian_top_eigenvalue: largest (algebraic) eigenvalue of the Hessian of that loss.
        hessian_trace: Hutchinson's estimate of the trace.
        hessian_trace_stderr: its standard error over the random vectors; NaN for a single one.
        ball_sharpness: loss rise at distance ``rho`` along the gradient: SAM's sharpness (Foret et al. 2021).
    """

    loss: float
    hessian_top_eigenvalue: float
    hessian_trace: float
    hessian_trace_stderr: float
    ball_sharpness: float


def measure_sharpness(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    rho: float = 0.05,
    lanczos_steps: int = 15,
    trace_samples: int = 10,
    seed: int = 0,
) -> Sharpness:
    """Measure the sharpness of ``model`` on ``batches``; weights and mode are unchanged afterwards.

    The model runs in evaluation mode (no dropout). Parameters that do not affect the loss are ignored.

    Args:
        model: called as ``model(**batch)``; its output has a ``loss``, the mean over the batch's examples.
        batches: fixed batches with labels, on any device, of any sizes.
        rho: radius of the ball, in the parameters' Euclidean norm. Default 0.05.
        lanczos_steps: Hessian-vector products for the eigenvalue. Default 15.
        trace_samples: Hessian-vector products for the trace. Default 10.
        seed: of the random vectors. Default 0.

    Returns:
        The measurements.

    Raises:
        ValueError: there is no batch, or a number is out of range.
    """
    for name, value in (("lanczos_steps", lanczos_steps), ("trace_samples", trace_samples)):
        if value < 1:
            raise ValueError(f"Invalid {name}: {value} - should be at least 1.")
    if not rho > 0:
        raise ValueError(f"Invalid rho: {rho} - should be above 0.")
    with _measurable(model):
        surface = _LossSurface(model, batches)
        loss, gradient = surface.loss_and_gradient()
        top = _top_eigenpair(surface.hessian, lanczos_steps, seed)
        trace = hutchinson(surface.hessian, num_samples=trace_samples, seed=seed)
        return Sharpness(
            loss=loss,
            hessian_top_eigenvalue=top.eigenvalues[0].item(),
            hessian_trace=trace.estimate,
            hessian_trace_stderr=trace.stderr,
            ball_sharpness=surface.losses_along(gradient, [rho])[0] - loss,
        )


def loss_slice(
    model: nn.Module, batches: Sequence[Batch], distances: Sequence[float], *, lanczos_steps: int = 15, seed: int = 0
) -> dict[str, list[float]]:
    """Loss along two straight lines through the weights, which are unchanged afterwards.

    Args:
        model: as for :func:`measure_sharpness`.
        batches: as for :func:`measure_sharpness`.
        distances: where to measure, in the parameters' Euclidean norm; 0 is the model itself.
        lanczos_steps: Hessian-vector products for the top eigenvector. Default 15.
        seed: of the random vectors. Default 0.

    Returns:
        The losses at ``distances`` along ``"top eigenvector"`` and along ``"random direction"``.
    """
    with _measurable(model):
        surface = _LossSurface(model, batches)
        hessian = surface.hessian
        random = torch.randn(hessian.size, generator=torch.Generator().manual_seed(seed))
        directions = {
            "top eigenvector": _top_eigenpair(hessian, lanczos_steps, seed).eigenvectors[0],
            "random direction": random.to(hessian.device, hessian.dtype),
        }
        return {name: surface.losses_along(direction, distances) for name, direction in directions.items()}


class _LossSurface:
    """Mean loss per example over fixed batches, as a function of the parameters that it depends on."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch]):
        if not batches:
            raise ValueError("Invalid batches: none - should be at least one batch.")
        device = next(model.parameters()).device
        batches = [move_batch_to_device(dict(batch), device) for batch in batches]
        sizes = [next(value.shape[0] for value in batch.values() if isinstance(value, Tensor)) for batch in batches]
        # The library averages over batches; these weights turn it into the mean over examples.
        self.batches = [(batch, size * len(sizes) / sum(sizes)) for batch, size in zip(batches, sizes)]
        self.params = _used_parameters(model, batches[0])
        self.hessian = HessianOperator(
            model, self.batches, _weighted_loss, param_filter=lambda name, _: name in self.params
        )

    def loss_and_gradient(self) -> tuple[float, Tensor]:
        """The loss and its gradient as one vector."""
        total, gradient = 0.0, torch.zeros(self.hessian.size, dtype=self.hessian.dtype, device=self.hessian.device)
        for item in self.batches:
            loss = _weighted_loss(self.hessian.model, item) / len(self.batches)
            gradients = torch.autograd.grad(loss, list(self.params.values()))
            gradient += params_to_vector(dict(zip(self.params, gradients)))
            total += loss.item()
        return total, gradient

    @torch.no_grad()
    def losses_along(self, direction: Tensor, distances: Sequence[float]) -> list[float]:
        """The loss at each distance along a flat ``direction`` of any length; with a zero direction it is constant."""
        unit = vector_to_params(direction / direction.norm().clamp_min(1e-30), self.params)
        saved = {name: param.clone() for name, param in self.params.items()}
        losses = []
        try:
            for distance in distances:
                for name, param in self.params.items():
                    param.copy_(saved[name] + distance * unit[name])
                losses.append(sum(_weighted_loss(self.hessian.model, item).item() for item in self.batches))
        finally:
            for name, param in self.params.items():
                param.copy_(saved[name])
        return [loss / len(self.batches) for loss in losses]


def _weighted_loss(model: nn.Module, item: tuple[Batch, float]) -> Tensor:
    batch, weight = item
    return model(**batch).loss * weight


def _used_parameters(model: nn.Module, batch: Batch) -> dict[str, nn.Parameter]:
    """The trainable parameters that the loss depends on, by name."""
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    gradients = torch.autograd.grad(model(**batch).loss, list(params.values()), allow_unused=True)
    return {name: param for (name, param), gradient in zip(params.items(), gradients) if gradient is not None}


def _top_eigenpair(hessian: HessianOperator, steps: int, seed: int) -> EigenResult:
    return lanczos(hessian, k=1, max_iter=min(steps, hessian.size), which="LA", seed=seed)


@contextlib.contextmanager
def _measurable(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and attention that can be differentiated twice (the fused kernels cannot)."""
    training = model.training
    model.eval()
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        model.train(training)
