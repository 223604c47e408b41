"""Detect runs in which Trainer wrongly assumes that the loss is divided by ``num_items_in_batch``.

In Transformers 5 the forward of most models takes ``**kwargs``. Trainer concludes that their loss is a sum divided by
``num_items_in_batch``, the number of labels in the whole accumulated batch: it does not divide such a loss by the
number of accumulation steps, and multiplies it by the number of processes. Classification heads, and many custom
``compute_loss`` methods, return the mean over their micro-batch instead, so loss and gradients are too large by both
factors. Adam's update hides this; InvAdam's update, gradient clipping and the logged loss do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Methods that read a tensor's value on the host.
_READS = ("item", "tolist", "numpy", "__float__", "__int__", "__bool__", "__index__", "__array__")


class Factor(NamedTuple):
    """Factors by which the loss and gradients of a run are too large.

    Attributes:
        accumulation: due to gradient accumulation.
        processes: due to training in several processes.
    """

    accumulation: int
    processes: int


class CountWitness(Tensor):
    """``num_items_in_batch`` that records whether it has been used: combined with another tensor, or read.

    Moving or reshaping does not count as a use; the result then records its own use.
    """

    used: list[bool]

    @classmethod
    def of(cls, count: Tensor) -> CountWitness:
        """Wrap a count, without copying it."""
        return cls._wrap(count, [])

    @classmethod
    def _wrap(cls, count: Tensor, used: list[bool]) -> CountWitness:
        witness = count.as_subclass(cls)
        witness.used = used
        return witness

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Iterable[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a torch function and record whether it uses the count."""
        tensors = _tensors([*args, *(kwargs or {}).values()])
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        records = [tensor.used for tensor in tensors if isinstance(tensor, cls) and hasattr(tensor, "used")]
        combined = len(tensors) > 1 or getattr(func, "__name__", "") in _READS
        for used in records:
            if combined:
                used.append(True)
        if isinstance(result, Tensor) and records and not combined:
            return cls._wrap(result, records[0])
        return result.as_subclass(Tensor) if isinstance(result, cls) else result


def _tensors(values: list[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        found += _tensors(list(value)) if isinstance(value, (list, tuple)) else [value] * isinstance(value, Tensor)
    return found


def can_witness(trainer: Any, model: Any, count: Any) -> bool:
    """Whether a training step can be observed without side effects: not if it is compiled or uses threads.

    Args:
        trainer: the Trainer that is about to make the step.
        model: the model that it will call.
        count: ``num_items_in_batch``.
    """
    compiled = trainer.args.torch_compile or hasattr(model, "_orig_mod") or _is_compiled(model)
    return isinstance(count, Tensor) and type(count) is Tensor and trainer.args.n_gpu <= 1 and not compiled


def _is_compiled(model: Any) -> bool:
    return getattr(model, "_compiled_call_impl", None) is not None


def loss_factor(trainer: Any, base_compute_loss: Any) -> Factor:
    """The factors that Trainer applies because it expects the loss to be divided by the number of items.

    Args:
        trainer: a Trainer in whose step nothing used ``num_items_in_batch``.
        base_compute_loss: ``Trainer.compute_loss`` as defined by transformers, which multiplies by the number of
            processes.

    Returns:
        The two factors; both 1 if the loss is correct.
    """
    taken_for_divided = getattr(trainer, "loss_is_scaled_for_ga", None)
    accumulation = getattr(trainer, "current_gradient_accumulation_steps", trainer.args.gradient_accumulation_steps)
    multiplied = type(trainer).compute_loss is base_compute_loss and trainer.args.average_tokens_across_devices
    return Factor(
        accumulation=1 if taken_for_divided is False else accumulation,
        processes=trainer.accelerator.num_processes // _tensor_parallel_size(trainer) if multiplied else 1,
    )


def _tensor_parallel_size(trainer: Any) -> int:
    return trainer.get_tp_size() if hasattr(trainer, "get_tp_size") else 1


def loss_factor_message(trainer: Any, factor: Factor, base_compute_loss: Any) -> str:
    """Build the warning: what is too large, by which factor, why, and the remedy.

    Args:
        trainer: the Trainer.
        factor: from :func:`loss_factor`.
        base_compute_loss: ``Trainer.compute_loss`` as defined by transformers.
    """
    parts = [
        f"{value} {what}"
        for value, what in ((factor.accumulation, "accumulation steps"), (factor.processes, "processes"))
        if value > 1
    ]
    if trainer.compute_loss_func is not None:
        source, remedy = "compute_loss_func", "divide the sum of its losses by num_items_in_batch"
    elif type(trainer).compute_loss is not base_compute_loss:
        source = f"{type(trainer).__name__}.compute_loss"
        remedy = "divide the sum of its losses by num_items_in_batch, or set trainer.model_accepts_loss_kwargs = False"
    else:
        model = trainer.accelerator.unwrap_model(trainer.model)
        source, remedy = type(model).__name__, "set trainer.model_accepts_loss_kwargs = False"
    return (
        f"The loss and gradients of this run are {factor.accumulation * factor.processes} times too large "
        f"({' x '.join(parts)}): Trainer expects the loss to be divided by num_items_in_batch, and {source} does not "
        f"divide by it. Before training, {remedy}."
    )
