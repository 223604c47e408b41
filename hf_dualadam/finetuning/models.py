"""Load model and configuration from the Hub, a folder, a mapping in the YAML file, or an installed package."""

import contextlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from .config import InputError
from .embedded import MINILM, resolve_model

ADAPTER_CONFIG = "adapter_config.json"


@dataclass
class ModelArguments:
    """Options for the model to fine-tune or to train from scratch."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Pretrained model: a name on the Hub, a folder, or embedded/minilm (extra [quickstart])."},
    )
    model_config: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Train a new model from scratch: its configuration, {model_type: vit, hidden_size: 192, ...}; "
            "instead of model_name_or_path."
        },
    )
    model_type: str | None = field(
        default=None,
        metadata={
            "help": "Train a new model from scratch with the default configuration of this type: gpt2, vit, ..."
        },
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Changes to that configuration: n_embd=10,resid_pdrop=0.2 (or use model_config)."},
    )
    config_name: str | None = field(
        default=None,
        metadata={
            "help": "Name on the Hub or folder of the configuration; without model_name_or_path, trains from scratch."
        },
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Cache folder for models and data from the Hub."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    token: str | None = field(
        default=None, metadata={"help": "Token for the Hub; by default that of `hf auth login`."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code of a model on the Hub. Only for sources that you trust."}
    )
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Reinitialize the head if its size in the checkpoint does not fit the task."}
    )

    def __post_init__(self):
        """Check that the options fit together."""
        given = [name for name in ("model_name_or_path", "model_config") if getattr(self, name)]
        if len(given) == 2:
            raise InputError("model_name_or_path and model_config: set only one of them")
        if self.model_config and self.model_type:
            raise InputError("model_type and model_config: set only one of them; model_config has a key model_type")
        if self.config_overrides and not self.new_config:
            raise InputError(
                "config_overrides: allowed only with model_type, without model_name_or_path and config_name"
            )

    @property
    def new_config(self) -> bool:
        """Whether the configuration is created from ``model_config`` or ``model_type``."""
        return bool(self.model_config or (self.model_type and not self.model_name_or_path and not self.config_name))

    @property
    def hub_kwargs(self) -> dict[str, Any]:
        """Arguments for all ``from_pretrained`` functions."""
        return {
            "cache_dir": self.cache_dir,
            "revision": self.model_revision,
            "token": self.token,
            "trust_remote_code": self.trust_remote_code,
        }


def load_config(args: ModelArguments, **changes: Any) -> PretrainedConfig:
    """The configuration of the model, with ``changes`` (labels, problem type) applied.

    Raises:
        InputError: no model is named, or ``model_config`` has an unknown model type or setting.
    """
    if args.new_config:
        return _new_config(args, changes)
    name = args.config_name or adapter_base(args) or args.model_name_or_path
    if not name:
        raise InputError("model_name_or_path: required, or model_config or config_name for a new model")
    with loading("config_name" if args.config_name else "model_name_or_path", name):
        config = AutoConfig.from_pretrained(resolve_model(name), **args.hub_kwargs, **changes)
    if args.model_type not in (None, config.model_type):
        raise InputError(f"model_type: {args.model_type!r}, but {name!r} is of type {config.model_type!r}")
    return config


def model_builder(
    args: ModelArguments, config: PretrainedConfig, auto_class: Any, **kwargs: Any
) -> Callable[[], PreTrainedModel]:
    """A function that returns a new model at each call, pretrained or (without ``model_name_or_path``) from scratch.

    Args:
        args: the model.
        config: its configuration.
        auto_class: for example ``AutoModelForSequenceClassification``.
        kwargs: further arguments of its ``from_pretrained``, such as dtype and quantization.
    """

    def build(trained: bool = False) -> PreTrainedModel:
        name = args.model_name_or_path
        if not name:
            return auto_class.from_config(config, trust_remote_code=args.trust_remote_code)
        adapter = adapter_base(args)
        with loading("model_name_or_path", name):
            model, report = auto_class.from_pretrained(
                resolve_model(adapter or name),
                config=config,
                ignore_mismatched_sizes=args.ignore_mismatched_sizes,
                output_loading_info=True,
                **(args.hub_kwargs | ({"revision": "main"} if adapter else {})),
                **kwargs,
            )
            if adapter:
                model = _with_adapter(model, args)
        new = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
        in_adapter = {
            name for peft in getattr(model, "peft_config", {}).values() for name in peft.modules_to_save or ()
        }
        new = [key for key in new if in_adapter.isdisjoint(key.split("."))]
        if trained and new:
            raise InputError(
                f"model_name_or_path: {name!r} has no trained weights for this task: it lacks {', '.join(new[:3])}"
                + (", ..." if len(new) > 3 else "")
            )
        return model

    return build


def adapter_base(args: ModelArguments) -> str | None:
    """The base model of a folder that holds only an adapter (as ``use_peft`` writes it), or None for other models.

    Raises:
        InputError: the folder holds an adapter, and PEFT is not installed.
    """
    folder = Path(args.model_name_or_path or "")
    whole = [*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")] if args.model_name_or_path else []
    if whole or not (folder / ADAPTER_CONFIG).is_file():
        return None
    with loading("model_name_or_path", str(folder)):
        base = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
        if not base:
            raise ValueError(f"{ADAPTER_CONFIG} names no base model (base_model_name_or_path)")
        if importlib.util.find_spec("peft") is None:
            raise ImportError('an adapter needs PEFT: pip install "hf_dualadam[clm]"')
        return base


def processor_source(args: ModelArguments, file: str) -> str | None:
    """Name of the model whose folder holds the tokenizer or image processor: an adapter's may be its base model's.

    Args:
        args: which model.
        file: the file to look for: "tokenizer_config.json".
    """
    name = args.model_name_or_path or args.config_name
    base = adapter_base(args)
    return base if base and not (Path(args.model_name_or_path) / file).is_file() else name


def _with_adapter(model: PreTrainedModel, args: ModelArguments) -> PreTrainedModel:
    """The base model with the saved adapter; only the adapter's weights are trainable."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, args.model_name_or_path, is_trainable=True)


def model_order(classes: tuple[str, ...], config: PretrainedConfig) -> tuple[str, ...]:
    """The classes in the order of the model if it was trained on them, else unchanged; exact matches come first."""
    of_model = [config.id2label[index] for index in sorted(config.id2label)]
    for write in (str, str.lower):
        place = {write(name): index for index, name in enumerate(of_model)}
        if len(place) == len(of_model) and sorted(place) == sorted(map(write, classes)):
            return tuple(sorted(classes, key=lambda name: place[write(name)]))
    return classes


def set_labels(config: PretrainedConfig, classes: tuple[str, ...]) -> None:
    """Set class names (none for a regression) and problem type of a configuration."""
    config.id2label = dict(enumerate(classes)) or {0: "score"}
    config.label2id = {name: index for index, name in config.id2label.items()}
    config.problem_type = "single_label_classification" if classes else "regression"


@contextlib.contextmanager
def loading(option: str, value: str) -> Iterator[None]:
    """Turn loading errors into one line: option, value, first line of the reason."""
    try:
        yield
    except InputError:
        raise
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"{option}: {value!r} cannot be loaded: {reason}") from error


def model_card_of_embedded(args: ModelArguments) -> dict[str, str]:
    """Entries of the model card for the embedded model, whose folder name is meaningless."""
    if args.model_name_or_path != MINILM:
        return {}
    return {"finetuned_from": "sentence-transformers/all-MiniLM-L6-v2", "license": "apache-2.0"}


def _new_config(args: ModelArguments, changes: dict[str, Any]) -> PretrainedConfig:
    """A configuration with the given settings; ``changes`` apply to the others."""
    option, settings = "model_config", dict(args.model_config or {})
    model_type = settings.pop("model_type", args.model_type)
    if args.model_type:
        option = "model_type"
    try:
        known = AutoConfig.for_model(model_type)
    except ValueError:
        raise InputError(
            f"{option}: model_type {model_type!r} is not known to transformers; examples: bert, vit"
        ) from None
    unknown = sorted(set(settings) - set(known.to_dict()))
    if unknown:
        raise InputError(f"model_config: {model_type} has no setting {', '.join(unknown)}")
    overridden = _override(known, args.config_overrides) if args.config_overrides else set()
    try:
        config = AutoConfig.for_model(model_type, **(changes | settings))
        for name in overridden:
            setattr(config, name, getattr(known, name))
    except Exception as error:  # configurations raise many types
        raise InputError(f"{option}: {model_type}: {error}") from error
    return config


def _override(config: PretrainedConfig, text: str) -> set[str]:
    """Apply ``key=value,...`` to a configuration; return the keys."""
    pairs = [pair.partition("=") for pair in text.split(",")]
    keys = [key for key, _, _ in pairs]
    try:
        if (twice := next((key for key in keys if keys.count(key) > 1), None)) is not None:
            raise ValueError(f"{twice!r} is given twice")
        if (bare := next((key for key, equals, _ in pairs if not equals), None)) is not None:
            raise ValueError(f"{bare!r} has no value; should be key=value,...")
        config.update_from_string(text)
    except (TypeError, ValueError) as error:
        raise InputError(f"config_overrides: {error}") from error
    return set(keys)
