"""Losses that do not depend on how a batch is split into micro-batches and among processes.

Transformers 5's Trainer assumes that every model whose ``forward`` accepts ``**kwargs`` divides its loss by the number
of items in the whole batch (``model_accepts_loss_kwargs``). Causal language models do, but classification heads return
the mean over the micro-batch, so that loss and gradients grow with gradient accumulation and the number of processes.
With AdamW the factor cancels; with clipping and the inverse update it does not.
"""

from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_pt_utils import find_batch_size


class ExactEvaluation(Trainer):
    """Counts every example once on any number of processes, and weights batches by their number of items.

    If the examples cannot be divided evenly among the processes, the last batches are padded with examples from the
    start of the data, whose loss does not count. A subclass defines what an item is.

    Attributes:
        evaluated_items: number of items in the latest evaluation.
        evaluated_examples: number of examples in the latest evaluation.
    """

    evaluated_items: float = 0
    evaluated_examples: int | None = None

    def items(self, inputs: dict[str, Any]) -> int:
        """The number of items over which the model averages its loss: examples, here."""
        return find_batch_size(inputs)

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        """Run Trainer's loop, and replace the loss by the mean over all items."""
        # Sum of losses, items, examples.
        self._evaluated = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        total, self.evaluated_items, examples = self.accelerator.reduce(self._evaluated, "sum").tolist()
        self.evaluated_examples = int(examples)
        if self.evaluated_items:
            output.metrics[f"{metric_key_prefix}_loss"] = total / self.evaluated_items
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Trainer's step; also adds the batch to the sums."""
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if loss is None:
            return loss, logits, labels
        counted, rows = inputs, find_batch_size(inputs)
        if self._is_padded():  # equal on all processes, as sharded models need all of them for a forward pass
            size = rows
            rows = min(max(self.accelerator.gradient_state.remainder - self.accelerator.process_index * size, 0), size)
            counted = {name: _first(value, max(rows, 1), size) for name, value in inputs.items()}
            loss_counted = super().prediction_step(model, counted, True, ignore_keys)[0]
        else:
            loss_counted = loss
        items = self.items(counted) if rows else 0
        if items:
            self._evaluated[0] += loss_counted.double() * items
            self._evaluated[1] += items
            self.count(counted)
        self._evaluated[2] += rows
        return loss, logits, labels

    def count(self, inputs: dict[str, Any]) -> None:
        """Called with each evaluated batch, without padding examples."""

    def _is_padded(self) -> bool:
        """Whether this is the last batch of all processes and padded with repeated examples."""
        state = self.accelerator.gradient_state
        return self.args.world_size > 1 and state.end_of_dataloader and state.remainder > 0


class ClassifierTrainer(ExactEvaluation):
    """Trains with the mean loss over the examples of the whole batch, however it is split.

    For models whose loss is the mean over their examples. Micro-batches are weighted by their number of examples.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Trainer's micro-batches of one step, with the number of their examples over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        examples = torch.tensor(sum(find_batch_size(batch) for batch in batches), device=device)
        return batches, self.accelerator.reduce(examples, "sum")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's loss; in training, scaled by the micro-batch's number of examples over the mean number."""
        examples = find_batch_size(inputs)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if num_items_in_batch is not None:  # Trainer and the processes then average over the parts
            parts = self.current_gradient_accumulation_steps * self.accelerator.num_processes
            loss = loss * (examples * parts / num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


def _first(value: Any, rows: int, size: int) -> Any:
    return value[:rows] if isinstance(value, torch.Tensor) and value.dim() and len(value) == size else value
