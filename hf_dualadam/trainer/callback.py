"""What happens while a Trainer runs: planned steps, logged statistics, warnings."""

from __future__ import annotations

import logging
import math

from transformers.trainer_callback import TrainerCallback

from ..diagnostics import InverseStatistics, inverse_statistics
from ..optimizers import OPTIMIZERS, DualAdam
from .optim_args import parse_optim_args

logger = logging.getLogger(__name__)

# A share below this moves nothing that a longer warm-up would not; steps above this fraction of the weights diverge.
NEGLIGIBLE_SHARE = 0.01
DIVERGING_STEP = 0.1


class DualAdamCallback(TrainerCallback):
    """Resolves ``switch_fraction``, logs what the inverse part does, and warns. Idle with other optimizers.

    With every training log of Trainer it adds ``alpha``, ``inverse_share`` and ``inverse_rms_ratio``
    (:class:`~hf_dualadam.diagnostics.InverseStatistics`), measured on logging steps only.
    """

    def __init__(self):
        self._warned: set[str] = set()

    def on_init_end(self, args, state, control, **kwargs):
        """Check ``optim_args`` as soon as there is a Trainer.

        Raises:
            ValueError: see :func:`parse_optim_args`.
        """
        if args.optim in OPTIMIZERS:
            parse_optim_args(args.optim_args, OPTIMIZERS[args.optim])

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        """Turn ``switch_fraction`` into a rate, and stop if DeepSpeed has replaced or would distort the optimizer.

        Raises:
            RuntimeError: the optimizer asked for is not the one that would run, or cannot keep its promise.
        """
        self._warned.clear()
        inner = _unwrap(optimizer)[-1]
        if not isinstance(inner, DualAdam):
            if args.optim in OPTIMIZERS and type(inner).__module__.startswith("deepspeed"):
                raise RuntimeError(
                    f"DeepSpeed's offload has replaced {OPTIMIZERS[args.optim].__name__} by {type(inner).__name__}: "
                    'set "zero_force_ds_cpu_optimizer": false in the DeepSpeed config.'
                )
            self._warn_left_behind(inner)
            return
        if _is_partitioned(optimizer) and any(group["normalize_inverse"] for group in inner.param_groups):
            raise RuntimeError(
                "normalize_inverse needs whole tensors, and DeepSpeed's ZeRO flattens them: set "
                "normalize_inverse=false, or use FSDP2 instead of ZeRO."
            )
        for options in inner.param_groups:
            if options.get("planned_steps", 0) is None:
                options["planned_steps"] = state.max_steps
                options["switch_rate"] = min(1.0, 1 / (options["switch_fraction"] * max(1, state.max_steps)))
                inner.defaults["switch_rate"] = options["switch_rate"]

    def on_log(self, args, state, control, logs=None, optimizer=None, **kwargs):
        """Add the figures of the last step to a training log, and warn where they call for it."""
        inner = _unwrap(optimizer)[-1]
        if not isinstance(inner, DualAdam) or logs is None or "loss" not in logs:
            return
        statistics = inverse_statistics(inner, _is_partitioned(optimizer))
        if statistics is None:
            return
        figures = {name: getattr(statistics, name) for name in ("alpha", "inverse_share", "inverse_rms_ratio")}
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)
        self._warn(statistics, logs["loss"], state.global_step, type(inner).__name__)

    def _warn(self, s: InverseStatistics, loss: float, step: int, name: str) -> None:
        if not math.isfinite(loss) or not math.isfinite(s.relative_step):
            self._warn_once(
                "diverged",
                f"{name} has diverged by step {step}: the loss or the update is not finite. Lower learning_rate"
                " or clip gradients"
                + (", or set optim_args normalize_inverse=true to use Adam's learning rates." if s.alpha else "."),
            )
        elif s.alpha > 0 and s.inverse_share > 0.5 and s.relative_step > DIVERGING_STEP:
            self._warn_once(
                "large",
                f"The inverse part of {name} is large enough to diverge: the step at {step} is {s.relative_step:.0%} "
                "of the weights' norm. Lower learning_rate, or set optim_args normalize_inverse=true.",
            )
        elif s.alpha >= 0.5 and s.inverse_share < NEGLIGIBLE_SHARE:
            self._warn_once(
                "small",
                f"The inverse part of {name} is too small to matter: {s.inverse_share:.2g} of the update at step "
                f"{step} (alpha {s.alpha:.2f}). This run is in effect AdamW with a linear warm-up; set optim_args"
                " normalize_inverse=true to give the inverse part the size of Adam's.",
            )

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning(message)

    @staticmethod
    def _warn_left_behind(inner) -> None:
        """Say so when a DualAdam checkpoint has been loaded into another optimizer."""
        saved_by = {group.get("optimizer") for group in getattr(inner, "param_groups", [])} & {"DualAdam", "InvAdam"}
        if saved_by:
            logger.warning(
                f"This run continues with {type(inner).__name__} from a checkpoint of {', '.join(sorted(saved_by))}: "
                "moments and step counts are taken over, the inverse phase is not."
            )


def _unwrap(optimizer) -> list:
    """The optimizer and all that its wrappers (accelerate's, DeepSpeed's) hold, outermost first."""
    layers = [optimizer]
    while hasattr(layers[-1], "optimizer"):
        layers.append(layers[-1].optimizer)
    return layers


def _is_partitioned(optimizer) -> bool:
    """Whether DeepSpeed's ZeRO hands the inner optimizer flat parts of the model."""
    return any(".zero." in type(layer).__module__ for layer in _unwrap(optimizer))
