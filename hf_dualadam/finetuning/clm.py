"""Causal language models: training on text and instruction tuning with TRL's SFTTrainer; arguments -> Task.

TRL tokenizes, packs, masks prompts and wraps models in LoRA; this module loads the data and the tokenizer.
"""

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from trl import ModelConfig, SFTConfig, get_peft_config, get_quantization_config

from . import data
from .clm_examples import examples, read_text, refuse_mixed
from .config import InputError
from .data import DataArguments
from .embedded import resolve_model
from .models import ModelArguments, adapter_base, load_config, loading, model_builder, processor_source
from .perplexity import ROW, PerplexityTrainer
from .tables import Table
from .tasks import Task, TaskKind

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
SPLIT_SEED = 0  # the held-out split is the same in every run
UNLIMITED = 2**31


@dataclass
class ClmArguments(DataArguments):
    """Options for the examples, the tokenizer and the samples."""

    validation_split_percentage: int = field(
        default=5,
        metadata={"help": "Percentage of the training examples to hold out where there are no held-out examples."},
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer; by default that of the model."})
    new_tokenizer_size: int | None = field(
        default=None,
        metadata={"help": "Train a byte-level BPE tokenizer with N tokens on the training texts, for a new model."},
    )
    use_fast_tokenizer: bool = field(default=True, metadata={"help": "Use a fast tokenizer (tokenizers library)."})
    block_size: int | None = field(
        default=None,
        metadata={"help": "Join texts into blocks of N tokens; by default max_length, at most what the model takes."},
    )
    join_texts: bool | None = field(
        default=None,
        metadata={
            "help": "Join plain texts into blocks of max_length tokens (the default without packing=true); otherwise "
            "each text is one example, truncated to max_length."
        },
    )
    keep_linebreaks: bool = field(default=True, metadata={"help": "Keep line breaks within the texts of .txt files."})
    generation_prompts: list[str] | None = field(
        default=None, metadata={"help": "Prompts for the samples; by default taken from held-out examples."}
    )
    generation_samples: int = field(default=3, metadata={"help": "Number of samples after training and evaluation."})
    max_new_tokens: int = field(default=64, metadata={"help": "Length of a sample in tokens."})

    def __post_init__(self):
        """Check ranges."""
        super().__post_init__()
        ranges = {
            "validation_split_percentage": (1, 99),
            "generation_samples": (0, 1000),
            "max_new_tokens": (1, 2**20),
        }
        if self.block_size is not None:
            ranges["block_size"] = (2, 2**31)
        if self.new_tokenizer_size is not None:
            ranges["new_tokenizer_size"] = (258, 2**20)  # the 256 bytes and two special tokens
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise InputError(f"{name}: {getattr(self, name)} is out of range; should be {low} to {high}")
        if self.tokenizer_name and self.new_tokenizer_size:
            raise InputError("tokenizer_name and new_tokenizer_size: set only one of them")


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
        model_args: the model.
        trl_args: TRL's model options: dtype, LoRA, quantization.
        training_args: training options of TRL and Trainer.
        splits: the splits needed, of "train" and "validation".

    Raises:
        InputError: an argument or a file cannot be used.
    """
    _check_model_arguments(model_args, trl_args)
    if "test" in splits:
        raise InputError("do_predict: not for language models; use generation_prompts")
    from_hub = {"cache_dir": model_args.cache_dir, "token": model_args.token}
    datasets, names = load_examples(args, set(splits), training_args.dataset_text_field, **from_hub)
    plain = all(isinstance(value, str | int) for value in next(iter(datasets.values()))[0].values())
    plain = plain and "prompt" not in next(iter(datasets.values())).column_names
    join_texts = plain and (not training_args.packing if args.join_texts is None else args.join_texts)
    if args.block_size is not None and not join_texts:
        raise InputError("block_size: allowed only for plain texts that are joined; other examples use max_length")
    tokenizer = load_tokenizer(args, model_args, datasets.get("train"))
    changes = {}
    if model_args.new_config:
        changes = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
        changes["pad_token_id"] = tokenizer.pad_token_id
    config = load_config(model_args, **changes)
    text_config = config.get_text_config()
    if len(tokenizer) > getattr(text_config, "vocab_size", len(tokenizer)):
        raise InputError(f"the tokenizer has {len(tokenizer)} tokens, but the model only {text_config.vocab_size}")
    positions = getattr(text_config, "max_position_embeddings", None)
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
        trainer_kwargs={
            "peft_config": get_peft_config(trl_args),
            "longest": min(positions or UNLIMITED, tokenizer.model_max_length),
            "join_texts": join_texts,
            "block_size": args.block_size,
            "names": names,
            "prepared": {},
        },
    )


def load_examples(
    args: ClmArguments, splits: set[str], text_column: str, **kwargs: Any
) -> tuple[dict[str, Dataset], dict[str, str]]:
    """Load examples by split, with the columns TRL needs and row numbers; also return names of splits for messages.

    Args:
        args: the source; a .txt file holds texts separated by blank lines.
        splits: "train", "validation"; a missing validation split is taken from the training examples.
        text_column: the column of plain texts, which has the lowest priority.
        kwargs: for ``datasets.load_dataset``.

    Raises:
        InputError: a split is missing, has no known set of columns or other ones than the other split, or holds values
            that are not text.
    """
    tables = _load_tables(args, splits | {"train"}, **kwargs)
    if "train" not in tables and "train" in splits:
        raise InputError(data.missing_split(args, "train"))
    found = {split: examples(table, text_column) for split, table in tables.items()}
    if "validation" in splits and "validation" not in found:
        if "train" not in found:
            raise InputError(data.missing_split(args, "validation"))
        share = args.validation_split_percentage / 100
        if len(found["train"]) < 2:
            raise InputError(
                f"{tables['train'].name}: holds one example, so none can be held out; set validation_file"
            )
        parts = found["train"].train_test_split(test_size=share, seed=SPLIT_SEED)
        found = {"train": parts["train"], "validation": parts["test"]}
    counts = {"train": args.max_train_samples, "validation": args.max_eval_samples}
    names = {split: tables.get(split, tables.get("train")).name for split in splits}
    if {"train", "validation"} <= splits:
        refuse_mixed(found["train"], found["validation"], names)
    return {split: data.sample(found[split], counts[split]) for split in splits}, names


def load_tokenizer(
    args: ClmArguments, model_args: ModelArguments, train_dataset: Dataset | None
) -> PreTrainedTokenizerBase:
    """Load the named tokenizer or the model's, or train a new one.

    Raises:
        InputError: no tokenizer is named, it cannot be loaded or has no end-of-text token, or there is no text to
            train one on.
    """
    if args.new_tokenizer_size:
        texts = [name for name in train_dataset.column_names if name != ROW] if train_dataset is not None else []
        if not texts or not all(isinstance(train_dataset[0][name], str) for name in texts):
            raise InputError("new_tokenizer_size: needs training examples of plain text; set tokenizer_name instead")
        columns = (train_dataset[name] for name in texts)
        return train_tokenizer((text for column in columns for text in column), args.new_tokenizer_size)
    option = "tokenizer_name" if args.tokenizer_name else "model_name_or_path"
    name = args.tokenizer_name or processor_source(model_args, "tokenizer_config.json")
    if not name:
        raise InputError("tokenizer_name: required for a new model, or new_tokenizer_size")
    with loading(option, name):
        tokenizer = AutoTokenizer.from_pretrained(
            resolve_model(name), use_fast=args.use_fast_tokenizer, **model_args.hub_kwargs
        )
    if tokenizer.eos_token is None:
        raise InputError(f"{option}: the tokenizer of {name!r} has no end-of-text token (eos_token)")
    return tokenizer


def train_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which can represent any text.

    Args:
        texts: the training texts.
        size: largest number of tokens, including 256 bytes and two special tokens.
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


def _check_model_arguments(model_args: ModelArguments, trl_args: ModelConfig) -> None:
    dtypes = ("auto", "float32", "bfloat16", "float16")
    if trl_args.dtype not in dtypes:
        raise InputError(f"dtype: {trl_args.dtype!r} should be one of {', '.join(dtypes)}")
    if trl_args.use_peft and adapter_base(model_args):
        raise InputError(
            f"use_peft: {model_args.model_name_or_path!r} is already an adapter; omit use_peft to train it further"
        )
    quantized = next((name for name in ("load_in_4bit", "load_in_8bit") if getattr(trl_args, name)), None)
    if quantized and not model_args.model_name_or_path:
        raise InputError(f"{quantized}: allowed only for a pretrained model (model_name_or_path)")
    if quantized and not trl_args.use_peft:
        raise InputError(f"{quantized}: quantized weights cannot be trained; set use_peft=true for LoRA")
    for option, package in ((quantized, "bitsandbytes"), ("use_peft" if trl_args.use_peft else None, "peft")):
        if option and importlib.util.find_spec(package) is None:
            raise InputError(f"{option}: needs the package {package}: pip install {package}")


def _load_tables(args: ClmArguments, splits: set[str], **kwargs: Any) -> dict[str, Table]:
    text_files = {split: path for split, path in args.files.items() if Path(path).suffix.lower() == ".txt"}
    if not text_files:
        return data.load_tables(args, splits, ("", None), **kwargs)
    if len(text_files) < len(args.files):
        raise InputError("train_file and validation_file: both should be .txt files, or neither")
    return {
        split: read_text(Path(path), keep_linebreaks=args.keep_linebreaks)
        for split, path in text_files.items()
        if split in splits
    }


def _name(args: ClmArguments) -> str:
    source = args.dataset_name or args.train_file or args.validation_file or args.data_dir
    return Path(source).stem if source else "clm"


KIND = TaskKind((ClmArguments, ModelArguments, ModelConfig), build, SFTConfig)
