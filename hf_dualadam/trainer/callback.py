"""The callback of a running Trainer: plans the switch, logs statistics and warns."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from ..base import MAX_COUNT
from ..diagnostics import InverseStatistics, inverse_statistics
from ..functional import inverse_weight
from ..gradient_release import GradientRelease, release_gradients, releases
from ..optimizers import OPTIMIZERS, DualAdam
from .modules import trained_module
from .optim_args import parse_optim_args

logger = logging.getLogger(__name__)

# An inverse share below the first has no visible effect; steps above the second fraction of the weights diverge.
NEGLIGIBLE_SHARE = 0.01
DIVERGING_STEP = 0.1


class DualAdamCallback(TrainerCallback):
    """Resolves ``switch_fraction``, releases gradients, logs the effect of the inverse part, and warns.

    To every training log of Trainer it adds ``alpha``, ``inverse_share`` and ``inverse_rms_ratio``
    (:class:`~hf_dualadam.diagnostics.InverseStatistics`), measured on logging steps only. Every Trainer gets one when
    ``hf_dualadam`` is imported. With other optimizers it changes nothing; it only warns about a loss that is scaled
    wrongly (:mod:`~hf_dualadam.trainer.loss_scaling`).
    """

    def __init__(self) -> None:
        self.loss_is_checked = False  # recorded at the first step of this training
        self._warned: set[str] = set()
        self._report: str | None = None
        self._planned_steps: int | None = None
        self._planned_groups: list[int] = []
        self._release: GradientRelease | None = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check ``optim_args`` as soon as there is a Trainer.

        Raises:
            ValueError: as :func:`parse_optim_args`; or ``release_gradients`` with an option that excludes it.
        """
        if args.optim in OPTIMIZERS:
            parse_optim_args(args.optim_args, OPTIMIZERS[args.optim])
            _check_release(args)

    def plan(self, args: TrainingArguments, optimizer: Any, steps: int) -> None:
        """Turn ``switch_fraction`` into a rate, each time Trainer plans a run.

        Trainer does so when ``train`` is called, and again when ``auto_find_batch_size`` changes the batch size. A
        checkpoint is loaded later, and its rates replace these. Parameter groups with their own rate keep it.

        Args:
            args: the ``TrainingArguments``.
            optimizer: the optimizer, with its wrappers.
            steps: planned optimizer steps of the whole run.

        Raises:
            ValueError: the inverse phase is longer than the largest step count.
        """
        inner = _unwrap(optimizer)[-1]
        fraction = _switch_fraction(args, inner)
        if fraction is None:
            return
        rate = switch_rate(fraction, steps)
        if rate < 1 / MAX_COUNT:
            raise ValueError(
                f"Invalid optim_args: switch_fraction={fraction:g} of {steps} steps - should be at most {MAX_COUNT:,} "
                "steps, where float32 step counts stop."
            )
        groups = inner.param_groups
        followers = [i for i, group in enumerate(groups) if group["switch_rate"] == inner.defaults["switch_rate"]]
        for index in followers:
            groups[index]["switch_rate"] = rate
        inner.defaults["switch_rate"] = rate
        self._planned_steps, self._planned_groups = steps, followers

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Report the switch, and stop if DeepSpeed has replaced the optimizer or would change its results.

        Raises:
            RuntimeError: the requested optimizer would not be used, or an option cannot be honored.
            ValueError: ``release_gradients`` is not possible with these arguments.
        """
        self._warned.clear()
        self._report, self.loss_is_checked = None, False
        inner = _unwrap(optimizer)[-1]
        self._end_stale_releases(model, inner)
        is_ours = isinstance(inner, tuple(OPTIMIZERS.values()))
        if not is_ours:
            self._check_other_optimizer(args, inner)
            return
        if _is_partitioned(optimizer) and any(group.get("normalize_inverse") for group in inner.param_groups):
            raise RuntimeError(
                "normalize_inverse needs whole tensors, and DeepSpeed's ZeRO flattens them: set "
                "normalize_inverse=false, or use FSDP2 instead of ZeRO."
            )
        if self._planned_steps != state.max_steps:  # a Trainer with its own create_scheduler does not call plan()
            self.plan(args, optimizer, state.max_steps)
        for group in inner.param_groups:  # checkpoints of version 0.1 and earlier contain these
            for key in ("switch_fraction", "planned_steps"):
                group.pop(key, None)
        if _check_release(args) and model is not None:
            self._release = release_gradients(trained_module(model), inner)
        elif releases(trained_module(model)):
            _refuse_what_excludes_release(args, "release_gradients()")
        if "switch_rate" in inner.defaults:
            self._report_switch(args, state, inner)
        self._planned_steps, self._planned_groups = None, []

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the hooks from the model."""
        if self._release is not None:
            self._release.remove()
            self._release = None

    def _end_stale_releases(self, model: torch.nn.Module | None, inner: Any) -> None:
        """Remove hooks left over from a run that was stopped by an error."""
        for release in releases(trained_module(model)):
            if release is self._release or release.optimizer is not inner:
                release.remove()
        self._release = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Add the statistics of the last step to a training log, and warn if necessary."""
        inner = _unwrap(optimizer)[-1]
        if logs is None or not isinstance(inner, DualAdam) or not _is_training_log(logs):
            return
        statistics = inverse_statistics(inner, _is_partitioned(optimizer))
        if statistics is None:
            return
        metrics = {name: getattr(statistics, name) for name in ("alpha", "inverse_share", "inverse_rms_ratio")}
        if state.log_history and logs.keys() <= state.log_history[-1].keys():
            state.log_history[-1].update(metrics)
        self._warn(statistics, _loss(logs), state.global_step, type(inner).__name__)
        logs.update(metrics)

    def _report_switch(self, args: TrainingArguments, state: TrainerState, inner: torch.optim.Optimizer) -> None:
        """Prepare a one-line warning if the switch to AdamW will not come when the options say."""
        fraction = _switch_fraction(args, inner)
        if fraction is not None and self._planned_groups:
            rate = inner.param_groups[self._planned_groups[0]]["switch_rate"]
            inner.defaults["switch_rate"] = rate  # these groups use it from now on
        else:
            rate = max(group["switch_rate"] for group in inner.param_groups)
        if rate == 0:  # InvAdam
            return
        done = int(max((float(s["step"]) for s in inner.state.values() if "step" in s), default=0))
        last = last_inverse_step(rate)
        steps = state.max_steps
        if fraction is not None and not math.isclose(rate, switch_rate(fraction, steps), rel_tol=1e-6):
            text = (
                f"This run keeps the switch of its checkpoint: alpha is 0 from step {last + 1} of {steps} on, while "
                f"switch_fraction={fraction:g} asks for step {last_inverse_step(switch_rate(fraction, steps)) + 1}. "
                "For a new plan, start a new run from the model's weights."
            )
        elif done > state.global_step:
            inverse_steps = max(0, min(last - done, steps - state.global_step))
            text = (
                f"The optimizer made {done} steps before this training, and they count towards the switch: "
                f"{inverse_steps} of {steps - state.global_step} steps have an inverse part"
                + (f", while switch_fraction={fraction:g} asks for {last}" if fraction is not None else "")
                + ". For a whole inverse phase, create a new Trainer."
            )
        elif last == 0 and (fraction is not None or rate < 1):
            asked = (
                f"switch_fraction={fraction:g} of {steps} steps" if fraction is not None else f"switch_rate={rate:g}"
            )
            text = (
                f"{asked} leaves no step for the inverse phase: alpha is 0 from step 1, so this run is AdamW's. "
                "The phase must last at least 2 steps."
            )
        else:
            return
        self._report = text
        if not args.auto_find_batch_size:  # otherwise reported once a batch size has been found
            self._say_report(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log a message about the switch, once."""
        self._say_report(state)

    def _say_report(self, state: TrainerState) -> None:
        if self._report is not None and state.is_world_process_zero:
            logger.warning(self._report)
        self._report = None

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
                f"{step} (alpha {s.alpha:.2f}). In effect, this run is AdamW with a linear warm-up; set optim_args"
                " normalize_inverse=true to give the inverse part the size of Adam's.",
            )

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning(message)

    @staticmethod
    def _check_other_optimizer(args: TrainingArguments, inner: Any) -> None:
        """Warn if the optimizer is not the one that ``optim`` names, or continues from a checkpoint of ours."""
        name = type(inner).__name__
        if args.optim in OPTIMIZERS:
            if type(inner).__module__.startswith("deepspeed"):
                raise RuntimeError(
                    f"DeepSpeed's offload has replaced {OPTIMIZERS[args.optim].__name__} by {name}: "
                    'set "zero_force_ds_cpu_optimizer": false in the DeepSpeed config.'
                )
            logger.warning(
                f"optim={str(getattr(args.optim, 'value', args.optim))} is not used: this Trainer was created with "
                f"another optimizer, {name}."
            )
        ours = {cls.__name__ for cls in OPTIMIZERS.values()}
        saved_by = {group.get("optimizer") for group in getattr(inner, "param_groups", [])} & ours
        if saved_by:
            adam = isinstance(inner, (torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam))  # AdamW is an Adam
            taken = "it keeps moments and step counts" if adam else "it does not use their moments"
            logger.warning(
                f"This run continues with {name} from a checkpoint of {', '.join(sorted(saved_by))}: {taken}, and "
                "there is no inverse phase."
            )


def switch_rate(fraction: float, steps: int) -> float:
    """The rate for an inverse phase of a fraction of the planned steps.

    Args:
        fraction: ``switch_fraction``, in (0, 1].
        steps: planned optimizer steps.

    Returns:
        ``1 / (fraction * steps)``, at most 1. It is multiplied by 1 - 1e-9 if rounding would end the phase one step
        early: an alpha below the rate counts as 0, and 1 - 9 * 0.1 is 0.0999... < 0.1.
    """
    rate = min(1.0, 1 / (fraction * max(1, steps)))
    slower = rate * (1 - 1e-9)
    return slower if rate < 1 and last_inverse_step(slower) > last_inverse_step(rate) else rate


def last_inverse_step(rate: float) -> int:
    """The last step with a nonzero alpha; 0 if there is none.

    Args:
        rate: ``switch_rate``, in (0, 1].
    """
    step = math.floor(1 / rate)
    while step > 0 and inverse_weight(step, rate) == 0:
        step -= 1
    return step


def _switch_fraction(args: TrainingArguments, inner: Any) -> float | None:
    """The requested ``switch_fraction``, if ``inner`` is the optimizer that ``args`` name."""
    cls = OPTIMIZERS.get(args.optim)
    if cls is None or type(inner) is not cls:
        return None
    return parse_optim_args(args.optim_args, cls).get("switch_fraction")


def _check_release(args: TrainingArguments) -> bool:
    """Whether ``optim_args`` ask for gradient release; a ValueError names the argument that excludes it."""
    cls = OPTIMIZERS.get(args.optim)
    if cls is None or not parse_optim_args(args.optim_args, cls).get("release_gradients"):
        return False
    _refuse_what_excludes_release(args, "Invalid optim_args: release_gradients=true")
    return True


def _refuse_what_excludes_release(args: TrainingArguments, what: str) -> None:
    problem = None
    if args.deepspeed:
        problem = "DeepSpeed, which does not expose gradients: use FSDP2"
    elif args.gradient_accumulation_steps > 1:
        problem = f"gradient_accumulation_steps={args.gradient_accumulation_steps}: set it to 1"
    elif args.max_grad_norm:
        problem = f"max_grad_norm={args.max_grad_norm}, a norm over all gradients: set it to 0"
    elif args.fp16:
        problem = "fp16, whose loss scale is divided out after the backward pass: use bf16"
    if problem:
        raise ValueError(f"{what} cannot be combined with {problem}.")


def _is_training_log(logs: dict[str, Any]) -> bool:
    """Whether these are logs of training steps, even if a subclass of Trainer renamed the keys.

    Such logs have a learning rate; those of evaluations and the final summary do not.
    """
    if any(key.startswith("eval") or key.endswith("_runtime") for key in logs):
        return False
    return "loss" in logs or any(key.endswith("learning_rate") for key in logs)


def _loss(logs: dict[str, Any]) -> float:
    """The training loss; 0 if it is not logged."""
    key = "loss" if "loss" in logs else next((key for key in logs if key.endswith("loss")), None)
    value = logs[key] if key is not None else 0.0
    return float(value) if isinstance(value, (int, float)) else 0.0


def _unwrap(optimizer: Any) -> list[Any]:
    """The optimizer and those inside its wrappers (accelerate's, DeepSpeed's), outermost first."""
    layers = [optimizer]
    while hasattr(layers[-1], "optimizer"):
        layers.append(layers[-1].optimizer)
    return layers


def _is_partitioned(optimizer: Any) -> bool:
    """Whether DeepSpeed's ZeRO passes flattened parts of the model to the inner optimizer."""
    return any(".zero." in type(layer).__module__ for layer in _unwrap(optimizer))
