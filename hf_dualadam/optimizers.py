"""DualAdam and InvAdam: arguments and options.

The formula is in :mod:`hf_dualadam.functional`, the base class in :mod:`hf_dualadam.base`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import MAX_COUNT, Group, MomentOptimizer, check_flag, check_number
from .functional import DUAL_UPDATE


class DualAdam(MomentOptimizer):
    """DualAdam: interpolates linearly from InvAdam's update to AdamW's.

    At step t of a parameter::

        theta <- theta * (1 - lr * weight_decay)
        m^, v^ = Adam's bias-corrected moments,  d = sqrt(v^) + eps
        alpha  = max(0, 1 - t * switch_rate), and 0 as soon as it is smaller than switch_rate
        theta <- theta - lr * [(1 - alpha) * m^ / d + alpha * m^ * d]

    With alpha = 1 throughout it is :class:`InvAdam`; from alpha = 0 on it is ``torch.optim.AdamW``, up to rounding.
    Source: Shi, Chen, Jin and Zhou, arXiv 2603.07122, and the authors' public code. Where the two differ, this follows
    the code: the weight decay is decoupled, and any alpha below ``switch_rate`` is treated as 0. Unlike in the code,
    the step count is part of the state, so a resumed run continues where it stopped. ``normalize_inverse``,
    ``inverse_scale``, ``state_bits`` and ``master_weight_bits`` are ours.

    State per parameter: ``step`` (0-dim float32, on the CPU unless ``capturable``), ``exp_avg`` and ``exp_avg_sq``
    (like the parameter; float32 for float16 parameters, whose squares would underflow; 8-bit codes and their scales
    with ``state_bits=8``). Arithmetic on half-precision tensors is done in float32.

    Args:
        params: tensors or parameter groups; floating point, dense.
        lr: learning rate eta, a number >= 0 or a one-element tensor. Default 1e-3.
        betas: decay rates of the two moments, each in [0, 1). Default (0.9, 0.999).
        eps: added to the root of the second moment, >= 0. Default 1e-8.
        weight_decay: decoupled weight decay lambda, >= 0. Default 0.
        switch_rate: decrease of alpha per step, 0 or in [2^-24, 1]; the inverse phase lasts 1/switch_rate steps.
            Default 0.01.
        normalize_inverse: rescale, per tensor, the inverse update to the root mean square of the Adam update.
            Default False.
        inverse_scale: factor of the inverse update, >= 0. Default 1, as in the paper; 0 leaves AdamW with DualAdam's
            warm-up.
        state_bits: 32, or 8 for moments in 8-bit codes where a tensor is large enough. Default 32.
        master_weight_bits: 24 or 32 to train float16 and bfloat16 parameters as weights of that many bits, with a
            correction kept in the state. Default None: train the parameters themselves.
        foreach: True to force the multi-tensor path, False to disable it. Default None: the fastest available.
        fused: True to force the one-pass kernel, False to disable it; True is refused for parameters on the meta
            device. Default None: the fastest available, chosen once the parameters are materialized.
        maximize: ascend instead of descend. Default False.
        capturable: never read a device value on the host, for CUDA graphs. Default False.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong type; a parameter is sparse or complex; a
            path was forced that is not available.
    """

    rule = DUAL_UPDATE
    own_options = frozenset({"switch_rate", "normalize_inverse", "inverse_scale"})

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        switch_rate: float = 0.01,
        normalize_inverse: bool = False,
        inverse_scale: float = 1.0,
        state_bits: int = 32,
        master_weight_bits: int | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            switch_rate=switch_rate,
            normalize_inverse=normalize_inverse,
            inverse_scale=inverse_scale,
            state_bits=state_bits,
            master_weight_bits=master_weight_bits,
            foreach=foreach,
            fused=fused,
            maximize=maximize,
            capturable=capturable,
        )

    @classmethod
    def _check_options(cls, options: Group) -> None:
        super()._check_options(options)
        check_number(options, "switch_rate", 0.0, 1.0)
        if 0 < options["switch_rate"] < 1 / MAX_COUNT:
            raise ValueError(
                f"Invalid switch_rate: {options['switch_rate']} - should be 0 or in [{1 / MAX_COUNT}, 1.0]: float32 "
                f"step counts stop at {MAX_COUNT:,}, so the switch would never come."
            )
        check_number(options, "inverse_scale", 0.0)
        check_flag(options, "normalize_inverse")


class InvAdam(DualAdam):
    """InvAdam: multiplies the bias-corrected first moment by the root of the second, instead of dividing by it.

    :class:`DualAdam` with alpha = 1 throughout: ``theta <- theta - lr * m^ * (sqrt(v^) + eps)``. Its step is of the
    order of lr * g^2, so it needs a much larger lr than Adam, or ``normalize_inverse=True``, which makes it usable at
    Adam's learning rates. Source: arXiv 2603.07122; ``normalize_inverse``, ``inverse_scale``, ``state_bits`` and
    ``master_weight_bits`` are ours.

    All arguments and errors are those of :class:`DualAdam`, without ``switch_rate``. Two have another meaning:

    Args:
        normalize_inverse: rescale the update, per tensor, to the root mean square of Adam's. Default False.
        inverse_scale: factor of the update, >= 0. Default 1.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        normalize_inverse: bool = False,
        inverse_scale: float = 1.0,
        state_bits: int = 32,
        master_weight_bits: int | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            switch_rate=0.0,
            normalize_inverse=normalize_inverse,
            inverse_scale=inverse_scale,
            state_bits=state_bits,
            master_weight_bits=master_weight_bits,
            foreach=foreach,
            fused=fused,
            maximize=maximize,
            capturable=capturable,
        )


# The names of the optimizers in Trainer, the launcher and other registries.
OPTIMIZERS: dict[str, type[MomentOptimizer]] = {"dualadam": DualAdam, "invadam": InvAdam}
