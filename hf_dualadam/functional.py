"""The update rule of DualAdam and InvAdam, to be read beside the paper.

Shi, Chen, Jin and Zhou, arXiv 2603.07122 (2026), with the authors' public code where the two differ. Paper letters:
theta (``param``), g (``grad``), m (``exp_avg``), v (``exp_avg_sq``), beta1, beta2, eta (``lr``), lambda
(``weight_decay``), epsilon (``eps``) and alpha (the share of the inverse update). For step t = 1, 2, ...::

    theta <- theta * (1 - eta * lambda)                          decoupled, as in AdamW
    m     <- beta1 * m + (1 - beta1) * g
    v     <- beta2 * v + (1 - beta2) * g^2
    d      = sqrt(v / (1 - beta2^t)) + epsilon                   m^ = m / (1 - beta1^t)
    theta <- theta - eta * [(1 - alpha) * m^ / d + alpha * m^ * d]

alpha = 1 is InvAdam, alpha = 0 is AdamW. The formula stands here twice, step for step: for one tensor and for lists of
tensors. The kernels in :mod:`hf_dualadam.kernels` say the same once more per language and are tested against it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class StepScalars(NamedTuple):
    """Everything in one step that is the same for all elements of a tensor.

    Each value is a float, or, where the step count may not be read on the host (CUDA graphs, ``torch.compile``), a
    0-dim tensor; for lists of tensors it is then a list of 0-dim tensors.
    """

    beta1: float
    beta2: float
    eps: float
    decay: Any  # 1 - eta * lambda
    step_size: Any  # eta / (1 - beta1^t)
    bias2_sqrt: Any  # sqrt(1 - beta2^t)
    alpha: Any  # share of the inverse update
    adam_share: Any  # 1 - alpha


def inverse_weight(step, switch_rate: float):
    """Weight alpha_t of the inverse update at step t.

    ``max(0, 1 - t * switch_rate)``, and 0 as soon as it is smaller than ``switch_rate``: the authors' code leaves the
    blend one step early, so that no step has a weight between 0 and ``switch_rate``.

    Args:
        step: t, counted from 1; a number, or a 0-dim float64 tensor.
        switch_rate: drop of the weight per step, in [0, 1]; 0 keeps it at 1 for ever (InvAdam).

    Returns:
        The weight, in [0, 1], as a float or as a tensor like ``step``.
    """
    alpha = 1 - step * switch_rate
    if isinstance(alpha, Tensor):
        return torch.where(alpha < switch_rate, 0.0, alpha)
    return 0.0 if alpha < switch_rate else float(alpha)


def step_scalars(
    step, *, lr, betas: tuple[float, float], eps: float, weight_decay: float, switch_rate: float
) -> StepScalars:
    """Work out the scalars of step t, in float64.

    Args:
        step: t, counted from 1; a number, or a 0-dim tensor, whose value is then never read on the host.
        lr: eta; a number or a 0-dim tensor.
        betas: (beta1, beta2).
        eps: epsilon.
        weight_decay: lambda.
        switch_rate: see :func:`inverse_weight`.

    Returns:
        The scalars: tensors where ``step`` is a tensor, else floats.
    """
    beta1, beta2 = betas
    if isinstance(step, Tensor):
        step = step.double()
    alpha = inverse_weight(step, switch_rate)
    return StepScalars(
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        decay=1 - lr * weight_decay,
        step_size=lr / (1 - beta1**step),
        bias2_sqrt=(1 - beta2**step) ** 0.5,
        alpha=alpha,
        adam_share=1 - alpha,
    )


def dual_update_(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, s: StepScalars, normalize_inverse: bool = False
) -> None:
    """One step of one tensor, in place: the formula of this module, line for line.

    Args:
        param: theta, any shape.
        grad: g, like ``param``; left as it is.
        exp_avg: m, like ``param``.
        exp_avg_sq: v, like ``param``.
        s: the step's scalars.
        normalize_inverse: rescale the inverse update to the root mean square of the Adam update of this tensor and
            step (ours, not the paper's). Both updates share the factor m^, so its bias correction cancels.
    """
    param.mul_(s.decay)  # theta <- theta * (1 - eta*lambda)
    exp_avg.lerp_(grad, 1 - s.beta1)  # m
    exp_avg_sq.mul_(s.beta2).addcmul_(grad, grad, value=1 - s.beta2)  # v
    denom = exp_avg_sq.sqrt().div_(s.bias2_sqrt).add_(s.eps)  # d
    update = exp_avg / denom  # m/d
    if not _is_zero(s.alpha):
        inverse = exp_avg * denom  # m*d
        if normalize_inverse:
            inverse.mul_(_norm_ratio(_norm(update), _norm(inverse)))
        update.mul_(s.adam_share).add_(_weighted(inverse, s.alpha))  # (1-alpha) * m/d + alpha * m*d
    param.sub_(update.mul_(s.step_size))  # theta <- theta - eta/(1-beta1^t) * update


def foreach_dual_update_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    s: StepScalars,
    normalize_inverse: bool = False,
) -> None:
    """One step of many tensors, in place: :func:`dual_update_` with ``torch._foreach_*``, step for step.

    Args:
        params: theta; all tensors of one device and dtype, and all at the same step unless ``s`` holds lists.
        grads: g, one per parameter; left as they are.
        exp_avgs: m, one per parameter.
        exp_avg_sqs: v, one per parameter.
        s: the step's scalars, as floats or as lists with one 0-dim tensor per parameter.
        normalize_inverse: as in :func:`dual_update_`, per tensor.
    """
    torch._foreach_mul_(params, s.decay)  # theta <- theta * (1 - eta*lambda)
    torch._foreach_lerp_(exp_avgs, grads, 1 - s.beta1)  # m
    torch._foreach_mul_(exp_avg_sqs, s.beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - s.beta2)  # v
    denom = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(denom, s.bias2_sqrt)
    torch._foreach_add_(denom, s.eps)  # d
    update = torch._foreach_div(exp_avgs, denom)  # m/d
    if not _is_zero(s.alpha):
        inverse = torch._foreach_mul(exp_avgs, denom)  # m*d
        if normalize_inverse:
            pairs = zip(update, inverse)
            torch._foreach_mul_(inverse, [_norm_ratio(_norm(u), _norm(i)) for u, i in pairs])
        if isinstance(s.alpha, float):
            torch._foreach_mul_(inverse, s.alpha)
        else:
            inverse = [_weighted(i, alpha) for i, alpha in zip(inverse, s.alpha)]
        torch._foreach_mul_(update, s.adam_share)
        torch._foreach_add_(update, inverse)  # (1-alpha) * m/d + alpha * m*d
    torch._foreach_mul_(update, s.step_size)
    torch._foreach_sub_(params, update)  # theta <- theta - eta/(1-beta1^t) * update


def update_norms(exp_avg: Tensor, exp_avg_sq: Tensor, s: StepScalars, normalize_inverse: bool = False) -> Tensor:
    """Measure the last step of one tensor from its moments; changes nothing.

    Args:
        exp_avg: m after the step, any shape.
        exp_avg_sq: v after the step, like ``exp_avg``.
        s: the scalars of that step.
        normalize_inverse: as in :func:`dual_update_`.

    Returns:
        The Euclidean norms of m/d, m*d, alpha * m*d and (1-alpha) * m/d + alpha * m*d; shape (4,). Times
        ``s.step_size`` they are distances moved.
    """
    denom = exp_avg_sq.sqrt().div_(s.bias2_sqrt).add_(s.eps)  # d
    update = exp_avg / denom  # m/d
    inverse = exp_avg * denom  # m*d
    norms = [_norm(update), _norm(inverse)]
    if normalize_inverse:
        inverse.mul_(_norm_ratio(*norms))
    inverse.mul_(s.alpha)
    norms += [_norm(inverse), _norm(update.mul_(s.adam_share).add_(inverse))]
    return torch.stack(norms)


def _is_zero(alpha) -> bool:
    """Whether the inverse part is known on the host to be switched off."""
    return isinstance(alpha, float) and alpha == 0.0


def _weighted(inverse: Tensor, alpha) -> Tensor:
    """Weight the inverse update; 0 after the switch even where m*d overflowed and the host cannot see alpha."""
    weighted = inverse.mul_(alpha)
    return weighted if isinstance(alpha, float) else torch.where(alpha > 0, weighted, 0.0)


def _norm(x: Tensor) -> Tensor:
    # In float64, since the squares of m*d underflow float32 for gradients below 1e-11; MPS has no float64.
    return torch.linalg.vector_norm(x, dtype=None if x.device.type == "mps" else torch.float64)


def _norm_ratio(adam_norm: Tensor, inverse_norm: Tensor) -> Tensor:
    """Factor that gives the inverse update the size of Adam's; 0 where there is no inverse update, NaN stays NaN."""
    return torch.where(inverse_norm == 0, 0.0, adam_norm / inverse_norm)
