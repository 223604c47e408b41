"""Causal language models: training on text and instruction tuning with TRL's SFTTrainer: arguments -> Task.

TRL tokenizes, packs, masks prompts and wraps models in LoRA; this module finds the data and a tokenizer, and measures
perplexity per token.
"""

import importlib.util
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    set_seed,
)
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config

from . import data
from .config import InputError
from .data import DataArguments
from .embedded import resolve_model
from .exact_loss import ExactEvaluation
from .labels import texts
from .models import ModelArguments, load_config, loading, model_builder, processor_source
from .tables import Table
from .tasks import Task, TaskKind
from .training import Run

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
SPLIT_SEED = 0  # the held-out part is the same in every run
PROMPT_TOKENS = 24  # of a held-out text, for a sample to go on from
TRL_METRICS = ("entropy", "mean_token_accuracy", "num_tokens", "aux_loss")


@dataclass
class ClmArguments(DataArguments):
    """Texts or prompts with completions, tokenizer and samples."""

    validation_split_percentage: int = field(
        default=5, metadata={"help": "Without held-out examples: hold out so many percent of the training examples."}
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "By default the model's."})
    new_tokenizer_size: int | None = field(
        default=None,
        metadata={
            "help": "Train a byte-level BPE tokenizer of so many tokens on the training texts, for a new model."
        },
    )
    generation_prompts: list[str] | None = field(
        default=None, metadata={"help": "Prompts of the samples; by default from held-out examples."}
    )
    generation_samples: int = field(default=3, metadata={"help": "So many samples after training and evaluation."})
    max_new_tokens: int = field(default=64, metadata={"help": "Length of a sample in tokens."})

    def __post_init__(self):
        """Check ranges."""
        super().__post_init__()
        ranges = {
            "validation_split_percentage": (1, 99),
            "generation_samples": (0, 1000),
            "max_new_tokens": (1, 2**20),
        }
        if self.new_tokenizer_size is not None:
            ranges["new_tokenizer_size"] = (258, 2**20)  # the 256 bytes and two special tokens
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise InputError(f"{name}: {getattr(self, name)} is out of range, {low} to {high} is needed")
        if self.tokenizer_name and self.new_tokenizer_size:
            raise InputError("tokenizer_name and new_tokenizer_size: give one of them, not both")


class PerplexityTrainer(ExactEvaluation, SFTTrainer):
    """SFTTrainer whose evaluation is per token: loss and perplexity, and those of a unigram model beside them.

    Trainer averages the mean losses of batches; with texts of different lengths, or few completion tokens in a batch,
    that is not the loss per token. TRL's own evaluation metrics (means over batches too) are left out.
    """

    unigram_perplexity: float | None = None  # on the tokens of the latest evaluation; None without training examples

    def __init__(self, *, train_dataset: Dataset | None, eval_dataset: Dataset | None, **kwargs: Any):
        self._unigram_log_probs: torch.Tensor | None = None
        # SFTTrainer wants training examples, even to evaluate only.
        super().__init__(
            train_dataset=eval_dataset if train_dataset is None else train_dataset, eval_dataset=eval_dataset, **kwargs
        )
        if train_dataset is not None:
            self._unigram_log_probs = self._fit_unigram_model()

    def _fit_unigram_model(self) -> torch.Tensor:
        """Log-probability of each token by its share of the training targets, every count raised by one."""
        counts = torch.ones(len(self.processing_class), dtype=torch.float64)
        for labels in self.train_dataset.with_format("torch")["labels"]:
            counts += torch.bincount(labels[labels >= 0], minlength=len(counts))
        return (counts / counts.sum()).log()

    def get_eval_dataloader(self, eval_dataset=None):
        """Trainer's, for texts too: TRL prepares them only where ``evaluate`` is called."""
        if isinstance(eval_dataset, Dataset):
            packing = self.args.packing if self.args.eval_packing is None else self.args.eval_packing
            eval_dataset = self._prepare_dataset(
                eval_dataset, self.processing_class, self.args, packing, None, "evaluation"
            )
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
            tokens = self.accelerator.reduce(self._evaluated[1], "sum").item()
            self.unigram_perplexity = _exp(self.accelerator.reduce(self._unigram_loss, "sum").item() / tokens)
        return output

    def items(self, inputs: dict[str, Any]) -> int:
        """The number of targets: the first token of a row is none."""
        return int((inputs["labels"][:, 1:] >= 0).sum())

    def count(self, inputs: dict[str, Any]) -> None:
        """Add up the loss of the unigram model."""
        if self._unigram_log_probs is not None:
            targets = inputs["labels"][:, 1:]
            self._unigram_loss -= self._unigram_log_probs[targets[targets >= 0].cpu()].sum()


def build(
    args: ClmArguments,
    model_args: ModelArguments,
    trl_args: ModelConfig,
    *,
    training_args: SFTConfig,
    splits: Iterable[str] = ("train", "validation"),
) -> Task:
    """Load data, tokenizer and model configuration.

    Args:
        args: data, tokenizer and samples.
        model_args: which model.
        trl_args: TRL's options of models: dtype, LoRA, quantization.
        training_args: TRL's and Trainer's options of training.
        splits: those needed, of "train" and "validation".

    Raises:
        InputError: something given cannot be used.
    """
    _check_model_arguments(model_args, trl_args)
    from_hub = {"cache_dir": model_args.cache_dir, "token": model_args.token}
    datasets = load_examples(args, set(splits), training_args.dataset_text_field, **from_hub)
    tokenizer = load_tokenizer(args, model_args, datasets.get("train"))
    changes = {}
    if model_args.model_config:
        changes = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
        changes["pad_token_id"] = tokenizer.pad_token_id
    config = load_config(model_args, **changes)
    kwargs: dict[str, Any] = {"dtype": trl_args.dtype, "attn_implementation": trl_args.attn_implementation}
    if quantization_config := get_quantization_config(trl_args):
        kwargs["quantization_config"] = quantization_config
    held_out = datasets.get("validation")
    return Task(
        name=_name(args),
        build_model=model_builder(model_args, config, AutoModelForCausalLM, **kwargs),
        train_dataset=datasets.get("train"),
        eval_datasets={} if held_out is None else {"": held_out},
        compute_metrics=None,
        main_metric="perplexity",
        greater_is_better=False,
        processing_class=tokenizer,
        card={"dataset_name": args.dataset_name} if args.dataset_name else {},
        trainer_cls=PerplexityTrainer,
        trainer_kwargs={"peft_config": get_peft_config(trl_args)},
    )


def load_examples(args: ClmArguments, splits: set[str], text_column: str, **kwargs: Any) -> dict[str, Dataset]:
    """Examples by split, with the columns that TRL wants and no others.

    Args:
        args: the source; a .txt file holds texts separated by blank lines.
        splits: "train", "validation"; a validation split that the source lacks is carved out of the training examples.
        text_column: name of the column with plain texts, which TRL looks for last.
        kwargs: for ``datasets.load_dataset``.

    Raises:
        InputError: there is no such split, or no known set of columns, or something in them is not text.
    """
    tables = _load_tables(args, splits | {"train"}, **kwargs)
    if "train" not in tables and "train" in splits:
        raise InputError(data.missing_split(args, "train"))
    examples = {split: _examples(table, text_column) for split, table in tables.items()}
    if "validation" in splits and "validation" not in examples:
        if "train" not in examples:
            raise InputError(data.missing_split(args, "validation"))
        share = args.validation_split_percentage / 100
        if len(examples["train"]) < 2:
            raise InputError(
                f"{tables['train'].name}: one example only, nothing can be held out; give validation_file"
            )
        parts = examples["train"].train_test_split(test_size=share, seed=SPLIT_SEED)
        examples = {"train": parts["train"], "validation": parts["test"]}
    counts = {"train": args.max_train_samples, "validation": args.max_eval_samples}
    return {split: data.sample(examples[split], counts[split]) for split in splits}


def load_tokenizer(
    args: ClmArguments, model_args: ModelArguments, train_dataset: Dataset | None
) -> PreTrainedTokenizerBase:
    """The named tokenizer, the model's, or a new one.

    Raises:
        InputError: there is none, it cannot be loaded, it has no end-of-text token, or nothing to train on is there.
    """
    if args.new_tokenizer_size:
        if train_dataset is None or not all(isinstance(value, str) for value in train_dataset[0].values()):
            raise InputError("new_tokenizer_size: needs training examples of plain text; give tokenizer_name")
        columns = (train_dataset[column] for column in train_dataset.column_names)
        return train_tokenizer((text for column in columns for text in column), args.new_tokenizer_size)
    option = "tokenizer_name" if args.tokenizer_name else "model_name_or_path"
    name = args.tokenizer_name or processor_source(model_args, "tokenizer_config.json")
    if not name:
        raise InputError("tokenizer_name: missing; a new model needs it, or new_tokenizer_size")
    with loading(option, name):
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(name), **model_args.hub_kwargs)
    if tokenizer.eos_token is None:
        raise InputError(f"{option}: the tokenizer of {name!r} has no end-of-text token (eos_token)")
    return tokenizer


def train_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which can write every text.

    Args:
        texts: what it is trained on.
        size: number of tokens at most, the 256 bytes and two special tokens among them.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=PADDING)


def write_unigram_perplexity(run: Run) -> None:
    """Add the unigram model's perplexity on the held-out tokens to the run's metrics and files, if there is one."""
    perplexity = run.trainer.unigram_perplexity
    if perplexity is not None:
        run.metrics["unigram_perplexity"] = perplexity
        run.trainer.save_metrics("unigram", {"unigram_perplexity": perplexity})


def generate_samples(run: Run, args: ClmArguments) -> list[dict[str, str]]:
    """Let the trained model go on from prompts; written to generation_results.json in the output folder.

    Args:
        run: a finished run of a task of :func:`build`.
        args: which prompts, how many, how long.

    Returns:
        ``prompt``, ``generated``, and for held-out examples ``reference``, as text.
    """
    tokenizer, trainer = run.trainer.processing_class, run.trainer
    if args.generation_prompts:
        samples = [{"prompt": prompt} for prompt in args.generation_prompts]
    else:
        held_out = run.task.eval_datasets.get("")
        rows = [] if held_out is None else data.sample(held_out, args.generation_samples)
        samples = [_prompt_and_reference(row, tokenizer) for row in rows] if args.generation_samples else []
    set_seed(trainer.args.seed)
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    for sample in samples:
        inputs = tokenizer(sample["prompt"], return_tensors="pt", return_token_type_ids=False).to(model.device)
        with torch.no_grad():
            output = model.generate(
                **inputs,
                max_new_tokens=args.max_new_tokens,
                do_sample=True,
                temperature=0.8,
                top_p=0.95,
                pad_token_id=tokenizer.pad_token_id,
            )
        sample["generated"] = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    if samples and trainer.is_world_process_zero():
        path = Path(trainer.args.output_dir) / "generation_results.json"
        path.write_text(json.dumps(samples, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return samples


def _check_model_arguments(model_args: ModelArguments, trl_args: ModelConfig) -> None:
    dtypes = ("auto", "float32", "bfloat16", "float16")
    if trl_args.dtype not in dtypes:
        raise InputError(f"dtype: {trl_args.dtype!r} should be one of {', '.join(dtypes)}")
    quantized = next((name for name in ("load_in_4bit", "load_in_8bit") if getattr(trl_args, name)), None)
    if quantized and not model_args.model_name_or_path:
        raise InputError(f"{quantized}: only for a pretrained model (model_name_or_path)")
    if quantized and not trl_args.use_peft:
        raise InputError(
            f"{quantized}: quantized weights cannot be trained; give use_peft=true for LoRA on top of them"
        )
    for option, package in ((quantized, "bitsandbytes"), ("use_peft" if trl_args.use_peft else None, "peft")):
        if option and importlib.util.find_spec(package) is None:
            raise InputError(f"{option}: needs the package {package}: pip install {package}")


def _load_tables(args: ClmArguments, splits: set[str], **kwargs: Any) -> dict[str, Table]:
    text_files = {split: path for split, path in args.files.items() if Path(path).suffix.lower() == ".txt"}
    if not text_files:
        return data.load_tables(args, splits, ("", None), **kwargs)
    if len(text_files) < len(args.files):
        raise InputError("train_file and validation_file: both should be .txt files, or neither")
    return {split: _read_text(Path(path)) for split, path in text_files.items() if split in splits}


def _read_text(path: Path) -> Table:
    """Texts separated by blank lines."""
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    return Table(str(path), {"text": [text for part in content.split("\n\n") if (text := part.strip("\n"))]})


def _examples(table: Table, text_column: str) -> Dataset:
    """The columns that say what is to be learned: prompt and completion, messages, or text."""
    if "text" in table.columns and text_column not in table.columns and len(table.columns) == 1:
        text_column = "text"
    known = (("prompt", "completion"), ("messages",), (text_column,))
    columns = next((names for names in known if set(names) <= set(table.columns)), None)
    if columns is None:
        there = ", ".join(table.columns) or "none"
        raise InputError(
            f"{table.name}: has neither prompt and completion, nor messages, nor {text_column!r} (dataset_text_field) "
            f"among its columns: {there}"
        )
    table.require(columns)
    for column in columns:
        if column != "messages" and not isinstance(table.columns[column][0], list):  # a list holds chat messages
            texts(table, column)
    return Dataset.from_dict({column: table.columns[column] for column in columns})


def _prompt_and_reference(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Where a sample starts and what the held-out example has there."""
    if "messages" in row:
        row = {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}
    if "prompt" in row:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, list):
            prompt = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            completion = "\n".join(message["content"] for message in completion)
        return {"prompt": prompt, "reference": completion}
    tokens = tokenizer(next(iter(row.values())), add_special_tokens=False)["input_ids"]
    start = min(PROMPT_TOKENS, max(1, len(tokens) // 2))
    return {"prompt": tokenizer.decode(tokens[:start]), "reference": tokenizer.decode(tokens[start:])}


def _name(args: ClmArguments) -> str:
    source = args.dataset_name or args.train_file or args.validation_file or args.data_dir
    return Path(source).stem if source else "clm"


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


KIND = TaskKind((ClmArguments, ModelArguments, ModelConfig), build, SFTConfig)
