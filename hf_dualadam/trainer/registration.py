"""Register the names of the optimizers with transformers.

``TrainingArguments.optim`` is a closed enum and Trainer's table of optimizers is private. :func:`register` extends
both in place, and raises an error if a release of transformers has moved them.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from typing import Any

import torch
import transformers
from transformers import trainer_callback, training_args

from ..optimizers import OPTIMIZERS
from .callback import DualAdamCallback
from .loss_scaling import CountWitness, can_witness, loss_factor, loss_factor_message
from .optim_args import parse_optim_args
from .overriding import override_from_environment

logger = logging.getLogger(__name__)


def _optimizer_cls_and_kwargs(
    args: training_args.TrainingArguments,
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The class and arguments with which Trainer builds the optimizer that ``args.optim`` names.

    ``switch_fraction`` and ``release_gradients`` are not included: :class:`DualAdamCallback` handles them once Trainer
    has determined its number of steps and its model.
    """
    optimizer_cls = OPTIMIZERS[args.optim]
    options = parse_optim_args(args.optim_args, optimizer_cls)
    for name in ("switch_fraction", "release_gradients"):
        options.pop(name, None)
    adams = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    arguments = inspect.signature(optimizer_cls).parameters
    return optimizer_cls, {name: value for name, value in adams.items() if name in arguments} | options


def register() -> None:
    """Make ``TrainingArguments(optim="dualadam")`` and ``"invadam"`` valid, here and on the command line.

    Importing hf_dualadam calls this function; it may be called repeatedly. Argument parsers created earlier do not
    accept the names, so import hf_dualadam first.

    Raises:
        ImportError: this release of transformers has none of the hooks we use to register an optimizer.
    """
    try:
        for name in OPTIMIZERS:
            _extend_enum(training_args.OptimizerNames, name.upper(), name)
        _add_handlers()
        _add_callback()
        override_from_environment()
    except (AttributeError, TypeError, ImportError) as error:
        raise ImportError(
            f"hf_dualadam cannot register its optimizers with transformers {transformers.__version__} ({error}): "
            "install transformers 4.57 to 5.x."
        ) from error


def _extend_enum(cls: Any, name: str, value: str) -> None:
    """Add a member to an enum in place; an existing member of that value is kept."""
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
    if value not in getattr(cls, "_hashable_values_", [value]):  # used by `value in cls` from Python 3.12 on
        cls._hashable_values_.append(value)
    type.__setattr__(cls, name, member)


def _add_handlers() -> None:
    """Extend how Trainer builds optimizers: since transformers 5.2 a table, before that a method."""
    try:
        from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS
    except ImportError:
        _wrap_trainer_method()
        return
    for name in OPTIMIZERS:
        _OPTIMIZER_HANDLERS[name] = lambda context: _optimizer_cls_and_kwargs(context.args)


def _wrap_trainer_method() -> None:
    from transformers.trainer import Trainer

    patched: Any = Trainer
    original = patched.get_optimizer_cls_and_kwargs
    if hasattr(original, "_supports_dualadam"):
        return

    @functools.wraps(original)
    def get_optimizer_cls_and_kwargs(args: training_args.TrainingArguments, model: Any = None) -> Any:
        if args.optim in OPTIMIZERS:
            return _optimizer_cls_and_kwargs(args)
        return original(args, model)

    get_optimizer_cls_and_kwargs._supports_dualadam = True  # type: ignore[attr-defined]
    patched.get_optimizer_cls_and_kwargs = staticmethod(get_optimizer_cls_and_kwargs)


def _add_callback() -> None:
    """Give every Trainer a :class:`DualAdamCallback`.

    It is the first in the list, so that the reporting integrations after it get what it adds to the logs. Adding it to
    Trainer's list of default callbacks would work as well, but importing that list takes 4 seconds.
    """
    handler_cls: Any = trainer_callback.CallbackHandler
    original = handler_cls.__init__
    if hasattr(original, "_supports_dualadam"):
        return

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if not any(isinstance(callback, DualAdamCallback) for callback in self.callbacks):
            self.callbacks.insert(0, DualAdamCallback())
        if "transformers.trainer" in sys.modules:
            _inform_callback(sys.modules["transformers.trainer"].Trainer)

    __init__._supports_dualadam = True  # type: ignore[attr-defined]
    handler_cls.__init__ = __init__


def _inform_callback(trainer_cls: Any) -> None:
    """Pass the planned steps and the item count to the callback, which Trainer does not do for callbacks."""
    create_scheduler, training_step = trainer_cls.create_scheduler, trainer_cls.training_step
    if hasattr(create_scheduler, "_supports_dualadam"):
        return

    @functools.wraps(create_scheduler)
    def create_scheduler_and_plan(self: Any, num_training_steps: int, optimizer: Any = None) -> Any:
        scheduler = create_scheduler(self, num_training_steps, optimizer)
        callback = _callback_of(self)
        if callback is not None:
            callback.plan(self.args, self.optimizer if optimizer is None else optimizer, num_training_steps)
        return scheduler

    compute_loss = trainer_cls.compute_loss

    @functools.wraps(training_step)
    def watched_training_step(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        callback = _callback_of(self)
        factor = loss_factor(self, compute_loss)
        if (
            callback is None
            or callback.loss_is_checked
            or factor == (1, 1)
            or not can_witness(self, model, num_items_in_batch)
        ):
            return training_step(self, model, inputs, num_items_in_batch)
        callback.loss_is_checked = True
        count = CountWitness.of(num_items_in_batch)
        loss = training_step(self, model, inputs, count)
        if not count.used and self.is_world_process_zero():
            logger.warning(loss_factor_message(self, factor, compute_loss))
        return loss

    create_scheduler_and_plan._supports_dualadam = True  # type: ignore[attr-defined]
    trainer_cls.create_scheduler, trainer_cls.training_step = create_scheduler_and_plan, watched_training_step


def _callback_of(trainer: Any) -> DualAdamCallback | None:
    handler = getattr(trainer, "callback_handler", None)
    return next((c for c in getattr(handler, "callbacks", []) if isinstance(c, DualAdamCallback)), None)
