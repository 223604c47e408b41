"""TRL's SFTTrainer with exact perplexities and texts joined into blocks; reports dropped examples."""

import copy
import logging
import math
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from trl import SFTTrainer

from .config import InputError
from .exact_loss import ExactEvaluation

logger = logging.getLogger(__name__)

TRL_METRICS = ("entropy", "mean_token_accuracy", "num_tokens", "aux_loss")
# The column of row numbers in the source file.
ROW = "row"


class PerplexityTrainer(ExactEvaluation, SFTTrainer):
    """SFTTrainer that evaluates loss and perplexity per token, also for a unigram model.

    Trainer averages the mean losses of batches; with texts of different lengths, or few completion tokens in a batch,
    that is not the loss per token. TRL's evaluation metrics, which are also means over batches, are omitted.

    Args:
        longest: the largest number of tokens that model and tokenizer support, or None; caps ``args.max_length``.
        join_texts: join texts into blocks of ``args.max_length`` tokens.
        block_size: replaces ``args.max_length``.
        names: files or splits of "train" and "validation", for messages.
        prepared: cache of prepared examples for further trainers with the same task, options and tokenizer.
        train_dataset: examples with a column :data:`ROW`, or None for evaluation only.
        eval_dataset: held-out examples in the same form.
        args: TRL's arguments.
        kwargs: further arguments of SFTTrainer.

    Raises:
        InputError: an example cannot be prepared, or no example is left.
    """

    unigram_perplexity: float | None = None  # for the tokens of the latest evaluation; None without training examples

    def __init__(
        self,
        *,
        train_dataset: Dataset | None,
        eval_dataset: Dataset | None,
        args: Any,
        longest: int | None = None,
        join_texts: bool = False,
        block_size: int | None = None,
        names: dict[str, str] | None = None,
        prepared: dict[Any, Dataset] | None = None,
        **kwargs: Any,
    ):
        self._unigram_log_probs: torch.Tensor | None = None
        self._constructing = True
        self._names, self._prepared = names or {}, {} if prepared is None else prepared
        args.max_length = block_size or args.max_length
        if longest is not None and (args.max_length is None or args.max_length > longest):
            logger.info(f"max_length: {longest}, the maximum of the model and its tokenizer")
            args.max_length = longest
        if join_texts:
            args.packing, args.packing_strategy = True, "wrapped"
        # SFTTrainer requires training examples, even for evaluation only.
        given = eval_dataset if train_dataset is None else train_dataset
        super().__init__(train_dataset=given, eval_dataset=eval_dataset, args=args, **kwargs)
        self._constructing = False
        if train_dataset is not None:
            rows = self.train_dataset[ROW] if ROW in self.train_dataset.column_names else None
            places = {row: place for place, row in enumerate(train_dataset[ROW])} if rows is not None else {}
            # Indices of the remaining training examples; packing drops none.
            self.kept = [places[row] for row in rows] if rows is not None else list(range(len(train_dataset)))
            self._unigram_log_probs = self._fit_unigram_model()

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        """Tokenize, then truncate or pack, and count both; the result is cached for further trainers of the task."""
        if "input_ids" in dataset.column_names:
            return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        key = (dataset_name, dataset._fingerprint, packing, args.packing_strategy, args.max_length, args.seed)
        if key not in self._prepared:
            name = self._names.get("train" if dataset_name == "train" else "validation", dataset_name)
            whole = copy.copy(args)
            whole.max_length, whole.shuffle_dataset = None, False
            try:
                tokens = super()._prepare_dataset(
                    dataset, processing_class, whole, False, formatting_func, dataset_name
                )
            except Exception as error:
                raise InputError(self._first_failure(dataset, name, error)) from error
            left = super()._prepare_dataset(tokens, processing_class, args, packing, formatting_func, dataset_name)
            # The mean loss of a batch without targets, such as empty texts, would be NaN.
            left = left.filter(lambda row: any(label >= 0 for label in row["labels"][1:]))
            if self._constructing:  # later datasets are subsets of these
                special = [processing_class.eos_token_id, processing_class.pad_token_id]
                _report_used_tokens(name, tokens, left, args.max_length, packing, special)
            self._prepared[key] = left
        return self._prepared[key]

    def _first_failure(self, dataset: Dataset, name: str, error: Exception) -> str:
        """The error message, naming the first example that the chat template rejects."""
        reason = " ".join(str(error).split())[:300]
        for row in dataset:
            chat = row.get("messages") or row.get("prompt")
            if isinstance(chat, list):
                try:
                    self.processing_class.apply_chat_template(
                        chat, tokenize=False, **row.get("chat_template_kwargs", {})
                    )
                except Exception as failure:
                    return f"{name}: row {row[ROW]}: {' '.join(str(failure).split())[:300]}"
        return f"{name}: {reason}"

    def _fit_unigram_model(self) -> torch.Tensor:
        """Log-probability of each token from its frequency in the training targets, with add-one smoothing."""
        counts = torch.ones(len(self.processing_class), dtype=torch.float64)
        for labels in self.train_dataset.with_format("torch")["labels"]:
            counts += torch.bincount(labels[labels >= 0], minlength=len(counts))
        return (counts / counts.sum()).log()

    def get_eval_dataloader(self, eval_dataset=None):
        """Trainer's, for unprepared examples too: TRL prepares them only in ``evaluate``."""
        if isinstance(eval_dataset, Dataset):
            packing = self.args.packing if self.args.eval_packing is None else self.args.eval_packing
            eval_dataset = self._prepare_dataset(eval_dataset, self.processing_class, self.args, packing, None, "eval")
        return super().get_eval_dataloader(eval_dataset)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Evaluate, without TRL's metrics."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        return {name: value for name, value in metrics.items() if not name.endswith(TRL_METRICS)}

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        """The loss per token, and the perplexities."""
        self._unigram_loss = torch.zeros((), dtype=torch.float64, device=self.args.device)
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics[f"{metric_key_prefix}_perplexity"] = _exp(output.metrics[f"{metric_key_prefix}_loss"])
        if self._unigram_log_probs is not None:
            total = self.accelerator.reduce(self._unigram_loss, "sum").item()
            self.unigram_perplexity = _exp(total / self.evaluated_items)
        return output

    def items(self, inputs: dict[str, Any]) -> int:
        """The number of targets; the first token of a row is not a target."""
        return int((inputs["labels"][:, 1:] >= 0).sum())

    def count(self, inputs: dict[str, Any]) -> None:
        """Accumulate the loss of the unigram model."""
        if self._unigram_log_probs is not None:
            targets = inputs["labels"][:, 1:]
            self._unigram_loss -= self._unigram_log_probs[targets[targets >= 0].cpu()].sum()


def _report_used_tokens(
    name: str, whole: Dataset, left: Dataset, max_length: int | None, packing: bool, special: list[int | None]
) -> None:
    """Log the fraction of tokens used and the number of dropped examples.

    Raises:
        InputError: no example is left.
    """
    if not len(left):
        lengths = [len(ids) for ids in whole["input_ids"]]
        raise InputError(
            f"{name}: no example is left: within max_length={max_length} tokens there are no targets; the "
            f"shortest of {len(lengths)} has {min(lengths, default=0)} tokens (row {_shortest(whole, lengths)})"
        )
    dropped = len(whole) - len(left)
    if not packing and dropped:
        logger.warning(
            f"{name}: {dropped} of {len(whole)} examples dropped: within max_length={max_length} tokens there is "
            "nothing to learn from them"
        )
    share = _count_tokens(left, special) / max(1, _count_tokens(whole, special))
    if share < 1 or packing:
        blocks = f" in {len(left)} blocks of {max_length} tokens" if packing else f" within max_length={max_length}"
        logger.log(
            logging.INFO if share > 0.9 else logging.WARNING, f"{name}: {share:.1%} of the tokens are used,{blocks}"
        )


def _count_tokens(dataset: Dataset, special: list[int | None]) -> int:
    """The number of tokens to learn, without end-of-text and padding tokens."""
    ids = [number for number in special if number is not None]
    batches = dataset.select_columns("labels").with_format("numpy").iter(1000)
    return sum(int(((labels >= 0) & ~np.isin(labels, ids)).sum()) for batch in batches for labels in batch["labels"])


def _shortest(dataset: Dataset, lengths: list[int]) -> int | None:
    if not lengths or ROW not in dataset.column_names:
        return None
    return dataset[ROW][lengths.index(min(lengths))]


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
