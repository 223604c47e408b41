"""A Trainer callback that stops at the first gradient that is not finite and names the parameters it came from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from ..optimizers import OPTIMIZERS
from .optim_args import parse_optim_args

NAMED = 5  # parameters in the message


class StopOnNonFinite(TrainerCallback):
    """Stops training before an optimizer step whose gradients are not all finite; no weight is changed by them.

    ``Trainer(..., callbacks=[StopOnNonFinite()])``. Gradients are looked at as they come out of the backward pass, so
    the names are those of the parameters where it went wrong, in that order, even though clipping by a norm that is
    not finite spoils all others before the step. Works with any optimizer and dense gradients, and costs two readings
    of the gradients and one host synchronisation a step. Not for fp16, whose loss scaling meets and skips such
    gradients by design, nor for DeepSpeed, which keeps its gradients to itself.
    """

    def __init__(self) -> None:
        self._largest: dict[str, Tensor] = {}  # of each gradient's absolute values, in the order of the backward pass
        self._hooks: list[RemovableHandle] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Watch the gradients of ``model``.

        Raises:
            ValueError: gradients cannot be watched, or need not be finite, with these arguments.
        """
        if args.fp16 or args.deepspeed:
            mode = "fp16, whose loss scaling skips them by design" if args.fp16 else "DeepSpeed, which hides gradients"
            raise ValueError(f"Invalid callback: StopOnNonFinite with {mode} - should be used with bf16 or fp32.")
        if args.optim in OPTIMIZERS and parse_optim_args(args.optim_args, OPTIMIZERS[args.optim]).get(
            "release_gradients"
        ):
            raise ValueError(
                "Invalid callback: StopOnNonFinite with release_gradients=true, which updates weights before all "
                "gradients have been checked - should be used without."
            )
        self._forget()
        for name, param in model.named_parameters():
            if param.requires_grad:
                self._hooks.append(param.register_post_accumulate_grad_hook(self._watch(name)))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Stop if a gradient of this step is not finite.

        Raises:
            FloatingPointError: with the names of the first parameters whose gradients were not finite.
        """
        bad = _not_finite(self._largest)
        left = _not_finite({name: _largest(p.grad) for name, p in model.named_parameters() if p.grad is not None})
        count = len(self._largest)
        self._largest.clear()
        if left:
            first = ", ".join(bad[:NAMED]) + (", ..." if len(bad) > NAMED else "")
            where = f"first in {first} ({len(bad)} of {count} parameters)" if bad else "it came from another process"
            raise FloatingPointError(
                f"The gradient is not finite at step {state.global_step + 1}: {where}. No weight has been changed by "
                "it; the last checkpoint is from before. Look at the batch and the loss, lower learning_rate, or set "
                "max_grad_norm."
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go of the model."""
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
    """The largest absolute value, of this process's shard; a NaN wins."""
    grad = grad.to_local() if hasattr(grad, "to_local") else grad
    return torch.linalg.vector_norm(grad, ord=float("inf")) if grad.numel() else grad.new_zeros(())


def _not_finite(largest: dict[str, Tensor]) -> list[str]:
    """The names whose value is not finite, read from the device at once."""
    if not largest:
        return []
    home = next(iter(largest.values())).device
    finite = torch.stack([value.isfinite().to(home) for value in largest.values()]).tolist()
    return [name for name, fine in zip(largest, finite) if not fine]
