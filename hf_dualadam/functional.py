r"""The update rule of DualAdam and InvAdam, in the notation of the paper.

Source: Shi, Chen, Jin and Zhou, arXiv 2603.07122 (2026), and the authors' public code where the two differ. Notation:
theta (``param``), g (``grad``), m (``exp_avg``), v (``exp_avg_sq``), beta1, beta2, eta (``lr``), lambda
(``weight_decay``), epsilon (``eps``) and alpha (the weight of the inverse update). For step t = 1, 2, ...::

    theta <- theta * (1 - eta * lambda)                          decoupled, as in AdamW
    m     <- beta1 * m + (1 - beta1) * g
    v     <- beta2 * v + (1 - beta2) * g^2
    d      = sqrt(v / (1 - beta2^t)) + epsilon                   m^ = m / (1 - beta1^t)
    theta <- theta - eta * [(1 - alpha) * m^ / d + alpha * m^ * d]

alpha = 1 is InvAdam, alpha = 0 is AdamW. Two factors of ours multiply the inverse update m^ * d: ``inverse_scale``, a
constant, and with ``normalize_inverse`` the ratio of the two updates' norms. A part whose weight is 0 is not computed,
so it cannot turn an overflow into NaN.

The formula appears four times, with the same names, order and factors: :func:`dual_update_` for one tensor,
:func:`foreach_dual_update_` for lists, ``kernels/formula.h`` for the CPU and ``kernels/dual_update_triton.py`` for
CUDA. The kernels are tested against the first. They differ only in the following:

|                    | Python               | C                       | Triton                                        |
|--------------------|----------------------|-------------------------|-----------------------------------------------|
| m                  | ``lerp_``            | rounded as ``lerp_``    | rounded as ``lerp_``                          |
| step scalars       | float64, on the host | float64, in each thread | float64, host; device if ``capturable``       |
| half precision     | float32 copies       | float32, block by block | float32 registers                             |
| norms              | float64 sums         | float64 sums, by lane   | float32 sums of scaled squares                |
| float32 sqrt and / | correctly rounded    | correctly rounded       | within 2 units in the last place              |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class StepScalars(NamedTuple):
    """The quantities of one step that are the same for all elements of a tensor.

    Each value is a float. If the step count must not be read on the host (CUDA graphs, ``torch.compile``), it is a
    0-dim tensor or, for lists of tensors, a list of 0-dim tensors.

    Attributes:
        lr: eta.
        beta1: decay rate of m.
        beta2: decay rate of v.
        eps: epsilon.
        sign: factor of the gradient, -1 to maximize.
        decay: 1 - eta * lambda.
        step_size: eta / (1 - beta1^t).
        bias2_rsqrt: 1 / sqrt(1 - beta2^t).
        alpha: weight of the inverse update in the paper.
        adam_weight: 1 - alpha, the factor of m/d.
        inverse_weight: alpha * inverse_scale, the factor of m*d; 0 from the switch on.
        normalize_inverse: whether m*d is first rescaled to the norm of m/d.
    """

    lr: Any
    beta1: float
    beta2: float
    eps: float
    sign: float
    decay: Any
    step_size: Any
    bias2_rsqrt: Any
    alpha: Any
    adam_weight: Any
    inverse_weight: Any
    normalize_inverse: bool


class UpdateRule(NamedTuple):
    """The formula of one optimizer, in its implementations.

    Attributes:
        single: ``single(param, grad, *moments, scalars)`` updates one tensor and its moments in place and does
            not change ``grad``. ``moments`` are the tensors named by the optimizer class; ``scalars`` is a
            :class:`StepScalars`.
        foreach: the same for lists of tensors; None to update them one by one.
        kernel: whether the CPU and CUDA kernels compute this formula. Default False.
    """

    single: Callable[..., None]
    foreach: Callable[..., None] | None = None
    kernel: bool = False


def inverse_weight(step: Any, switch_rate: float) -> Any:
    """The weight alpha_t of the inverse update at step t.

    ``max(0, 1 - t * switch_rate)``, and 0 as soon as it is smaller than ``switch_rate``: the authors' code treats any
    weight below ``switch_rate`` as 0, so the last step of the interpolation is left out.

    Args:
        step: t, counted from 1; a number, or a 0-dim float64 tensor.
        switch_rate: decrease of the weight per step, in [0, 1]; 0 keeps it at 1 (InvAdam).

    Returns:
        The weight, in [0, 1], as a float or as a tensor like ``step``.
    """
    alpha = 1 - step * switch_rate
    if isinstance(alpha, Tensor):
        return torch.where(alpha < switch_rate, 0.0, alpha)
    return 0.0 if alpha < switch_rate else float(alpha)


def step_scalars(
    step: Any,
    *,
    lr: Any,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    switch_rate: float = 1.0,
    inverse_scale: float = 1.0,
    normalize_inverse: bool = False,
    maximize: bool = False,
) -> StepScalars:
    """Compute the scalars of step t, in float64.

    Args:
        step: t, counted from 1; a number, or a 0-dim tensor, whose value is then never read on the host.
        lr: eta; a number or a 0-dim tensor.
        betas: (beta1, beta2).
        eps: epsilon.
        weight_decay: lambda.
        switch_rate: see :func:`inverse_weight`. Default 1, no inverse update.
        inverse_scale: constant factor of the inverse update, >= 0. Default 1, as in the paper.
        normalize_inverse: rescale the inverse update to the norm of Adam's. Default False.
        maximize: ascend instead of descend. Default False.

    Returns:
        The scalars: tensors if ``step`` is a tensor, else floats.
    """
    beta1, beta2 = betas
    if isinstance(step, Tensor):
        step = step.double()
    alpha = inverse_weight(step, switch_rate)
    return StepScalars(
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        sign=-1.0 if maximize else 1.0,
        decay=1 - lr * weight_decay,
        step_size=lr / (1 - beta1**step),
        bias2_rsqrt=(1 - beta2**step) ** -0.5,
        alpha=alpha,
        adam_weight=1 - alpha,
        inverse_weight=alpha * inverse_scale,
        normalize_inverse=normalize_inverse,
    )


def dual_update_(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, s: StepScalars) -> None:
    """Update one tensor in place: the formula of this module, line for line.

    Args:
        param: theta, any shape.
        grad: g, like ``param``; not changed.
        exp_avg: m, like ``param``.
        exp_avg_sq: v, like ``param``.
        s: the step's scalars.
    """
    grad = grad if s.sign == 1 else -grad
    param.mul_(s.decay)  # theta <- theta * (1 - eta*lambda)
    exp_avg.lerp_(grad, 1 - s.beta1)  # m
    exp_avg_sq.mul_(s.beta2).addcmul_(grad, grad, value=1 - s.beta2)  # v
    denom = exp_avg_sq.sqrt().mul_(s.bias2_rsqrt).add_(s.eps)  # d
    adam = exp_avg / denom  # m/d
    if _is_zero(s.inverse_weight):
        update = weight_(adam, s.adam_weight)
    else:
        inverse = exp_avg * denom  # m*d
        if s.normalize_inverse:
            inverse.mul_(norm_ratio(norm(adam), norm(inverse)))
        update = weight_(adam, s.adam_weight).add_(weight_(inverse, s.inverse_weight))  # (1-alpha) m/d + alpha m*d
    param.sub_(weight_(update, s.step_size))  # theta <- theta - eta/(1-beta1^t) * update


def foreach_dual_update_(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], s: StepScalars
) -> None:
    """Update many tensors in place: :func:`dual_update_` with ``torch._foreach_*``, line for line.

    Args:
        params: theta; all tensors of one device and dtype, and all at the same step unless ``s`` holds lists.
        grads: g, one per parameter; not changed.
        exp_avgs: m, one per parameter.
        exp_avg_sqs: v, one per parameter.
        s: the step's scalars, as floats or as lists with one 0-dim tensor per parameter.
    """
    grads = grads if s.sign == 1 else list(torch._foreach_neg(grads))
    torch._foreach_mul_(params, s.decay)  # theta <- theta * (1 - eta*lambda)
    torch._foreach_lerp_(exp_avgs, grads, 1 - s.beta1)  # m
    torch._foreach_mul_(exp_avg_sqs, s.beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - s.beta2)  # v
    denom = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_mul_(denom, s.bias2_rsqrt)
    torch._foreach_add_(denom, s.eps)  # d
    update = torch._foreach_div(exp_avgs, denom)  # m/d
    if _is_zero(s.inverse_weight):
        foreach_weight_(update, s.adam_weight)
    else:
        inverse = torch._foreach_mul(exp_avgs, denom)  # m*d
        if s.normalize_inverse:
            torch._foreach_mul_(inverse, [norm_ratio(norm(u), norm(i)) for u, i in zip(update, inverse)])
        foreach_weight_(update, s.adam_weight)
        foreach_weight_(inverse, s.inverse_weight)
        torch._foreach_add_(update, inverse)  # (1-alpha) m/d + alpha m*d
    foreach_weight_(update, s.step_size)
    torch._foreach_sub_(params, update)  # theta <- theta - eta/(1-beta1^t) * update


DUAL_UPDATE = UpdateRule(dual_update_, foreach_dual_update_, kernel=True)


def component_norms(exp_avg: Tensor, exp_avg_sq: Tensor, s: StepScalars) -> Tensor:
    """Norms of the components of one tensor's last update, computed from its moments.

    Args:
        exp_avg: m after the step, any shape.
        exp_avg_sq: v after the step, like ``exp_avg``.
        s: the scalars of that step.

    Returns:
        The Euclidean norms of m/d, m*d, the weighted inverse part, and the sum of both weighted parts; shape (4,).
        Multiplied by ``s.step_size`` they are distances.
    """
    denom = exp_avg_sq.sqrt().mul_(s.bias2_rsqrt).add_(s.eps)  # d
    update = exp_avg / denom  # m/d
    inverse = exp_avg * denom  # m*d
    norms = [norm(update), norm(inverse)]
    if s.normalize_inverse:
        inverse.mul_(norm_ratio(*norms))
    weight_(inverse, s.inverse_weight)
    norms += [norm(inverse), norm(weight_(update, s.adam_weight).add_(inverse))]
    return torch.stack(norms)


def weight_(x: Tensor, weight: Any) -> Tensor:
    """Multiply ``x`` by ``weight`` in place; a weight of 0 gives 0, even where ``x`` is not finite."""
    if isinstance(weight, Tensor):
        return x.copy_(torch.where(weight == 0, 0.0, x * weight))
    return x.zero_() if weight == 0 else x.mul_(weight)


def foreach_weight_(xs: list[Tensor] | tuple[Tensor, ...], weight: Any) -> None:
    """:func:`weight_` of many tensors, by one number or by one tensor each."""
    if isinstance(weight, list):
        for x, own_weight in zip(xs, weight):
            weight_(x, own_weight)
    elif weight == 0:
        torch._foreach_zero_(xs)
    else:
        torch._foreach_mul_(xs, weight)


def _is_zero(weight: Any) -> bool:
    """Whether a weight is a float equal to 0."""
    return isinstance(weight, float) and weight == 0.0


def norm(x: Tensor) -> Tensor:
    """Euclidean norm, in float64, since the squares of m*d underflow float32 for gradients below 1e-11."""
    return torch.linalg.vector_norm(x, dtype=None if x.device.type == "mps" else torch.float64)  # MPS has no float64


def norm_ratio(adam_norm: Tensor, inverse_norm: Tensor) -> Tensor:
    """Factor that scales the inverse update to Adam's norm; 0 if the inverse update is 0; NaN stays NaN."""
    return torch.where(inverse_norm == 0, 0.0, adam_norm / inverse_norm)
