"""Makes the optimizers' names known to transformers.

``TrainingArguments.optim`` is a closed enum and Trainer's table of optimizers is private, so :func:`register` extends
both in place, and fails loudly where a release has moved them.
"""

from __future__ import annotations

import enum
import functools
from typing import Any

import transformers
from transformers import trainer_callback, training_args

from ..optimizers import OPTIMIZERS, DualAdam
from .callback import DualAdamCallback
from .optim_args import parse_optim_args


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
            _extend_enum(training_args.OptimizerNames, name.upper(), name)
        _add_handlers()
        _add_callback()
    except (AttributeError, TypeError, ImportError) as error:
        raise ImportError(
            f"hf_dualadam cannot register its optimizers with transformers {transformers.__version__} ({error}): "
            "install transformers 4.57 to 5.x."
        ) from error


def _extend_enum(cls: type[enum.Enum], name: str, value: str) -> None:
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
    original = trainer_callback.CallbackHandler.__init__
    if hasattr(original, "_adds_dualadam"):
        return

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if not any(isinstance(callback, DualAdamCallback) for callback in self.callbacks):
            self.callbacks.insert(0, DualAdamCallback())

    __init__._adds_dualadam = True
    trainer_callback.CallbackHandler.__init__ = __init__
