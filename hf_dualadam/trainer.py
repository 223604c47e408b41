"""DualAdam and InvAdam in the Hugging Face Trainer: names, ``optim_args``, planned steps, logs and warnings.

The only module of the core that imports transformers. ``TrainingArguments.optim`` is a closed enum and Trainer's table
of optimizers is private, so :func:`register` extends both in place, and fails loudly where a release has moved them.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import transformers
from transformers.trainer_callback import CallbackHandler, TrainerCallback
from transformers.training_args import OptimizerNames

from .diagnostics import InverseStatistics, inverse_statistics
from .optimizers import DualAdam, InvAdam

logger = logging.getLogger(__name__)

OPTIMIZERS = {"dualadam": DualAdam, "invadam": InvAdam}

# A share below this moves nothing that a longer warm-up would not; steps above this fraction of the weights diverge.
NEGLIGIBLE_SHARE = 0.01
DIVERGING_STEP = 0.1


class OptimArg(NamedTuple):
    """One key of ``optim_args``: how its text is read, what is allowed, what it means."""

    parse: Callable[[str], Any]
    allowed: str
    meaning: str


def _number(text: str, allow_zero: bool) -> float:
    value = float(text)
    if not (0 <= value <= 1) or (value == 0 and not allow_zero):
        raise ValueError
    return value


def _flag(text: str) -> bool:
    return {"true": True, "1": True, "false": False, "0": False}[text.lower()]


OPTIM_ARGS = {
    "switch_rate": OptimArg(
        functools.partial(_number, allow_zero=True), "a number in [0, 1]", "drop of alpha per optimizer step"
    ),
    "switch_fraction": OptimArg(
        functools.partial(_number, allow_zero=False),
        "a number in (0, 1]",
        "the inverse phase's share of the planned optimizer steps; instead of switch_rate",
    ),
    "normalize_inverse": OptimArg(_flag, "true or false", "rescale the inverse update to the size of Adam's"),
    "foreach": OptimArg(_flag, "true or false", "choose or forbid the multi-tensor path"),
    "fused": OptimArg(_flag, "true or false", "choose or forbid the one-pass kernel"),
}


def parse_optim_args(text: str | None, optimizer_cls: type[DualAdam] = DualAdam) -> dict[str, Any]:
    """Read Trainer's ``optim_args`` text into keyword arguments.

    Args:
        text: ``"key=value,key=value"``; None or empty for no options.
        optimizer_cls: whose options are allowed: InvAdam has none about the switch.

    Returns:
        The options with their types.

    Raises:
        ValueError: a key is unknown or given twice, a value is bad, or both switch options are given.
    """
    valid = {k: v for k, v in OPTIM_ARGS.items() if optimizer_cls is DualAdam or not k.startswith("switch_")}
    options: dict[str, Any] = {}
    for item in (text or "").split(",") if (text or "").strip() else []:
        key, separator, value = (part.strip() for part in item.partition("="))
        if not separator:
            raise ValueError(f"Invalid optim_args: {item.strip()!r} in {text!r} - should be key=value,key=value,...")
        if key not in valid:
            raise ValueError(
                f"Invalid optim_args: unknown key {key!r} for {optimizer_cls.__name__} - should be one of "
                + ", ".join(valid)
                + "."
            )
        if key in options:
            raise ValueError(f"Invalid optim_args: {key} is given twice in {text!r} - should be given once.")
        try:
            options[key] = valid[key].parse(value)
        except (ValueError, KeyError):
            raise ValueError(f"Invalid optim_args: {key}={value} - should be {valid[key].allowed}.") from None
    if "switch_rate" in options and "switch_fraction" in options:
        raise ValueError(
            f"Invalid optim_args: both switch_rate and switch_fraction in {text!r} - should be at most one of them."
        )
    if options.get("foreach") and options.get("fused"):
        raise ValueError(f"Invalid optim_args: both foreach and fused in {text!r} - should be at most one of them.")
    return options


class _DualAdamWithFraction(DualAdam):
    """Builds a DualAdam whose groups carry ``switch_fraction`` until Trainer knows its number of steps.

    Trainer takes only Optimizer subclasses, calls them with its parameter groups, and tells nobody in between how
    many steps it plans; the rest is done by :class:`DualAdamCallback` when training begins.
    """

    def __new__(cls, params, switch_fraction: float, **kwargs) -> DualAdam:
        optimizer = DualAdam(params, **kwargs)
        for group in optimizer.param_groups:
            group.update(switch_fraction=switch_fraction, planned_steps=None)
        return optimizer


def _optimizer_cls_and_kwargs(args) -> tuple[type[DualAdam], dict[str, Any]]:
    """What Trainer needs to build the optimizer that ``args.optim`` names."""
    optimizer_cls = OPTIMIZERS[args.optim]
    options = parse_optim_args(args.optim_args, optimizer_cls)
    kwargs = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        **options,
    }
    return (_DualAdamWithFraction if "switch_fraction" in options else optimizer_cls), kwargs


def register() -> None:
    """Make ``TrainingArguments(optim="dualadam")`` and ``"invadam"`` valid, here and on the command line.

    Done by importing hf_dualadam; may be called any number of times. An argument parser built earlier does not know
    the names: import first.

    Raises:
        ImportError: this release of transformers has no place for foreign optimizers that we know of.
    """
    try:
        for name in OPTIMIZERS:
            _extend_enum(OptimizerNames, name.upper(), name)
        _add_handlers()
        _add_callback()
    except (AttributeError, TypeError, ImportError) as error:
        raise ImportError(
            f"hf_dualadam cannot register its optimizers with transformers {transformers.__version__} ({error}); "
            "DualAdam still works through Trainer(optimizer_cls_and_kwargs=...)."
        ) from error


def _extend_enum(cls: type[OptimizerNames], name: str, value: str) -> None:
    """Add a member to an enum in place; a member of that value stays as it is."""
    if value in cls._value2member_map_:
        return
    member = str.__new__(cls, value)
    member._name_, member._value_, member.__objclass__ = name, value, cls
    member._sort_order_ = len(cls._member_names_)
    # Pickled as plain text: training_args.bin then loads where hf_dualadam is not imported, and compares the same.
    member.__reduce_ex__ = lambda protocol: (str, (value,))
    member.__deepcopy__ = lambda memo: member
    cls._member_names_.append(name)
    cls._member_map_[name] = member
    cls._value2member_map_[value] = member
    if value not in getattr(cls, "_hashable_values_", [value]):  # newer Pythons look here for `value in cls`
        cls._hashable_values_.append(value)
    type.__setattr__(cls, name, member)


def _add_handlers() -> None:
    """Tell Trainer how to build the optimizers: a table from transformers 5.2 on, a method before."""
    try:
        from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS
    except ImportError:
        _wrap_trainer_method()
        return
    for name in OPTIMIZERS:
        _OPTIMIZER_HANDLERS[name] = lambda context: _optimizer_cls_and_kwargs(context.args)


def _wrap_trainer_method() -> None:
    from transformers.trainer import Trainer

    original = Trainer.get_optimizer_cls_and_kwargs
    if hasattr(original, "_knows_dualadam"):
        return

    @functools.wraps(original)
    def get_optimizer_cls_and_kwargs(args, model=None):
        if args.optim in OPTIMIZERS:
            return _optimizer_cls_and_kwargs(args)
        return original(args, model)

    get_optimizer_cls_and_kwargs._knows_dualadam = True
    Trainer.get_optimizer_cls_and_kwargs = staticmethod(get_optimizer_cls_and_kwargs)


def _add_callback() -> None:
    """Give every Trainer a :class:`DualAdamCallback`.

    It goes first in the list, so that the reporting integrations after it see what it adds to the logs; Trainer's own
    list of default callbacks would do as well, but importing it costs 4 seconds.
    """
    original = CallbackHandler.__init__
    if hasattr(original, "_adds_dualadam"):
        return

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if not any(isinstance(callback, DualAdamCallback) for callback in self.callbacks):
            self.callbacks.insert(0, DualAdamCallback())

    __init__._adds_dualadam = True
    CallbackHandler.__init__ = __init__


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
