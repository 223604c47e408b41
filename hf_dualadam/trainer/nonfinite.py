"""A Trainer callback that stops at the first non-finite gradient and names the parameters that have it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from ..optimizers import OPTIMIZERS
from .modules import trained_module
from .optim_args import parse_optim_args

NAMED = 5  # parameters in the message


class StopOnNonFinite(TrainerCallback):
    """Stops training before an optimizer step with non-finite gradients, so that no weight is changed by them.

    Use it as ``Trainer(..., callbacks=[StopOnNonFinite()])``. Gradients are checked during the backward pass, so the
    error can name the first non-finite ones in that order, before clipping by a non-finite norm makes all others NaN.
    Works with any optimizer and dense gradients. Each step reads the gradients twice and synchronizes with the host
    once. Refused with fp16, whose loss scaling produces and skips such gradients by design, and with DeepSpeed, which
    does not expose gradients.
    """

    def __init__(self) -> None:
        self._largest: dict[str, Tensor] = {}  # absolute value in each gradient, in the order of the backward pass
        self._hooks: list[RemovableHandle] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Watch the gradients of ``model``.

        Raises:
            ValueError: with these arguments, gradients cannot be observed or are not expected to be finite.
        """
        if args.fp16 or args.deepspeed:
            mode = "fp16, whose loss scaling skips them by design" if args.fp16 else "DeepSpeed, which hides gradients"
            raise ValueError(f"Invalid callback: StopOnNonFinite with {mode} - should be used with bf16 or fp32.")
        if args.optim in OPTIMIZERS and parse_optim_args(args.optim_args, OPTIMIZERS[args.optim]).get(
            "release_gradients"
        ):
            raise ValueError(
                "Invalid callback: StopOnNonFinite with release_gradients=true, which updates weights before all "
                "gradients have been checked - should be used without it."
            )
        self._forget()
        for name, param in trained_module(model).named_parameters():
            if param.requires_grad:
                self._hooks.append(param.register_post_accumulate_grad_hook(self._watch(name)))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Stop if a gradient of this step is not finite.

        Raises:
            FloatingPointError: a gradient is not finite; the message names the first such parameters.
        """
        bad = _not_finite(self._largest)
        params = trained_module(model).named_parameters()
        left = _not_finite({name: _largest(param.grad) for name, param in params if param.grad is not None})
        count = len(self._largest)
        self._largest.clear()
        if left:
            first = ", ".join(bad[:NAMED]) + (", ..." if len(bad) > NAMED else "")
            where = f"first in {first} ({len(bad)} of {count} parameters)" if bad else "it is from another process"
            raise FloatingPointError(
                f"The gradient is not finite at step {state.global_step + 1}: {where}. No weight has been changed by "
                "it; the last checkpoint is from before this step. Inspect the batch and the loss, lower "
                "learning_rate, or set max_grad_norm."
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the hooks."""
        self._forget()

    def _forget(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._largest.clear()

    def _watch(self, name: str) -> Callable[[Tensor], None]:
        def hook(param: Tensor) -> None:
            if param.grad is not None:
                self._largest[name] = _largest(param.grad)

        return hook


@torch.no_grad()
def _largest(grad: Tensor) -> Tensor:
    """The largest absolute value of this process's shard; NaN if there is one."""
    grad = grad.to_local() if hasattr(grad, "to_local") else grad
    return torch.linalg.vector_norm(grad, ord=float("inf")) if grad.numel() else grad.new_zeros(())


def _not_finite(largest: dict[str, Tensor]) -> list[str]:
    """The names of non-finite values, read from the device in one transfer."""
    if not largest:
        return []
    home = next(iter(largest.values())).device
    finite = torch.stack([value.isfinite().to(home) for value in largest.values()]).tolist()
    return [name for name, fine in zip(largest, finite) if not fine]
