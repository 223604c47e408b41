"""Read one YAML file and command-line overrides into checked dataclasses, for every script.

``python scripts/run_glue.py configs/glue/sst2.yaml --learning_rate 5e-5 --optim adamw_torch``: the YAML file is
optional and comes first. The file and the command line take the same keys. A key that no dataclass declares, or a
value of the wrong type, is an error before anything else happens.
"""

import argparse
import dataclasses
import difflib
import json
import logging
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.training_args import trainer_log_levels

from ..trainer import OPTIMIZERS, parse_optim_args

# Options of Transformers' example scripts and of older TrainingArguments that have other names here.
RENAMED = {
    "torch_dtype": "dtype",
    "preprocessing_num_workers": "dataset_num_proc",
    "feature_extractor_name": "image_processor_name",
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
}
# Options that do not exist here, and what to do instead. They are ignored if they are false or null.
INSTEAD = {
    "streaming": "examples are loaded completely; use max_train_samples for fewer",
    "use_auth_token": "set token, or log in with `hf auth login`",
    "low_cpu_mem_usage": "remove it, models are always loaded this way",
    "block_size": "use max_seq_length (run_glue.py) or block_size (run_clm.py)",
    "max_seq_length": "use max_length or block_size (run_clm.py), or max_seq_length (run_glue.py)",
    "preprocessing_num_workers": "remove it, examples are prepared in one process",
    "push_to_hub_model_id": "give hub_model_id",
    "push_to_hub_token": "give hub_token",
}
DO_FLAGS = ("do_train", "do_eval", "do_predict")


class InputError(ValueError):
    """An error in the user's input; scripts print it as one line and exit with status 2."""


def training_defaults(given: dict[str, Any]) -> dict[str, Any]:
    """Defaults of the scripts that differ from those of ``TrainingArguments``.

    Args:
        given: what the YAML file and the command line set, by name.

    Returns:
        Values for keys that the user has not set: DualAdam with an inverse phase of 16 % of the run,
        training and evaluation when none of do_train, do_eval and do_predict is given, logs and evaluations often
        enough for a learning curve, and no reporting integration.
    """
    values: dict[str, Any] = {
        "optim": "dualadam",
        "report_to": "none",
        "logging_steps": 0.02,
        "logging_first_step": True,
        "save_total_limit": 2,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    if given.get("optim", "dualadam") == "dualadam":
        values["optim_args"] = "switch_fraction=0.16"
    if not any(flag in given for flag in DO_FLAGS):
        values |= {"do_train": True, "do_eval": True}
    if {"do_train", "do_eval"} <= {flag for flag in DO_FLAGS if (values | given).get(flag)}:
        values |= {"eval_strategy": "steps"}
        if given.get("eval_strategy", "steps") == "steps":
            values |= {"eval_steps": 0.2}
    return values


def parse(
    dataclass_types: Sequence[type],
    argv: Sequence[str] | None = None,
    *,
    defaults: Callable[[dict[str, Any]], dict[str, Any]] = training_defaults,
    description: str | None = None,
) -> tuple[Any, ...]:
    """Read ``[CONFIG.yaml] [--key value ...]`` into one instance of each dataclass.

    The file may also be JSON (``.json``). Options of Transformers' example scripts are accepted under their names.
    A key that several dataclasses declare is passed to all of them. If the command line sets an ``optim`` that differs
    from the file's, the ``optim_args`` of the file are ignored.

    Args:
        dataclass_types: the dataclasses, with or without ``TrainingArguments``.
        argv: the command line without the program's name; ``sys.argv[1:]`` by default.
        defaults: takes the given values and returns values for other keys (keys that no dataclass declares are
            ignored).
        description: text above the options in ``--help``.

    Returns:
        The instances, in the order of ``dataclass_types``.

    Raises:
        InputError: an unreadable file, an unknown key, a value of the wrong type or out of range.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    hints = {name: hint for cls in dataclass_types for name, hint in _fields(cls).items()}
    names = hints if "warmup_steps" not in hints else {"warmup_ratio": float} | hints
    config = argv.pop(0) if argv and not argv[0].startswith("-") else None
    from_file = _bridge_versions(_read_config(Path(config), names), hints) if config is not None else {}
    argv = _rename_options(argv, hints)
    from_argv = _bridge_versions(_read_command_line(dataclass_types, argv, names, description), hints)
    if from_argv.get("optim", from_file.get("optim")) != from_file.get("optim") and "optim_args" not in from_argv:
        from_file.pop("optim_args", None)
    return from_values(dataclass_types, from_file | from_argv, defaults=defaults)


def from_values(
    dataclass_types: Sequence[type],
    given: dict[str, Any],
    *,
    defaults: Callable[[dict[str, Any]], dict[str, Any]] = training_defaults,
) -> tuple[Any, ...]:
    """One instance of each dataclass from values by name; arguments, checks and errors as for :func:`parse`."""
    hints = {name: hint for cls in dataclass_types for name, hint in _fields(cls).items()}
    given = _bridge_versions(given, hints)
    for name, value in given.items():
        if name not in hints:
            raise InputError(_unknown(name, hints))
        check_type(name, value, hints[name])
    if isinstance(folder := given.get("output_dir"), str) and not folder.strip():
        raise InputError(f"output_dir: {folder!r} is blank; name a folder")
    filled = _bridge_versions(defaults(dict(given)), hints)
    values = {name: value for name, value in filled.items() if name in hints} | given
    return tuple(_build(cls, values) for cls in dataclass_types)


def check_type(name: str, value: Any, hint: Any) -> None:
    """Raise InputError unless ``value`` is of the annotated type ``hint``.

    Whole numbers are accepted for fractional ones, and values of an enumeration for its members; text is never
    accepted for a number.
    """
    if not _matches(value, hint):
        note = ""
        if isinstance(value, str) and _is_number(value):
            plain = re.fullmatch(r"[-+.0-9eE]+", value)
            note = " (write it without quotes)" if plain else " (numbers are written as 1000, 0.5 or 5e-5)"
        elif str in _options(hint) and isinstance(value, bool | int | float):
            note = " (put it in quotes)"
        if isinstance(value, str) and _choices(hint):
            raise InputError(f"{name}: {value!r} is not {_describe(hint)}")
        raise InputError(f"{name}: {value!r} is {_describe(type(value))}, but should be {_describe(hint)}{note}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{name}: {value} is not a finite number")


def run_main(main: Callable[[], Any]) -> None:
    """Call a script's main function; a user error ends in one line on stderr and exit status 2.

    Characters that standard output cannot encode are printed as question marks.
    """
    _show_information()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    try:
        main()
    except InputError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None


def _show_information() -> None:
    """Log to stderr what is used, skipped or omitted, from one process of a job; the others log only errors."""
    ours = logging.getLogger("hf_dualadam")
    if ours.level == logging.NOTSET:
        ours.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    if not ours.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        ours.addHandler(handler)
        ours.propagate = False


def _fields(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    if issubclass(cls, TrainingArguments):
        hints["resume_from_checkpoint"] = bool | str | None  # `true` in YAML: the last checkpoint
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _build(cls: type, values: dict[str, Any]) -> Any:
    known = {name: value for name, value in values.items() if name in _fields(cls)}
    missing = [
        field.name
        for field in dataclasses.fields(cls)
        if field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
        and field.init
        and field.name not in known
    ]
    if missing:
        raise InputError(f"{', '.join(missing)}: required; set it in a YAML file or as --{missing[0]}")
    try:
        if issubclass(cls, TrainingArguments):
            known = _checked(known)
        return cls(**known)
    except InputError:
        raise
    except Exception as error:  # many types: TrainingArguments looks up names, opens files, converts numbers
        raise InputError(f"{error}") from error


def _checked(values: dict[str, Any]) -> dict[str, Any]:
    """Refuse values that TrainingArguments accepts but that would fail, or produce nonsense, much later."""
    smallest = {
        "learning_rate": 0,
        "weight_decay": 0,
        "max_grad_norm": 0,
        "seed": 0,
        "data_seed": 0,
        "warmup_steps": 0,
    }
    smallest |= {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1}
    smallest |= {"eval_accumulation_steps": 1, "neftune_noise_alpha": 0, "dataloader_num_workers": 0}
    for name, low in smallest.items():
        if values.get(name) is not None and not low <= values[name] < 2**32:
            raise InputError(f"{name}: {values[name]} is out of range; should be at least {low} and below 2**32")
    epochs = values.get("num_train_epochs", 1)
    if not 0 < epochs < 2**32:
        raise InputError(f"num_train_epochs: {epochs} is out of range; should be more than 0")
    for name in ("log_level", "log_level_replica"):
        if values.get(name, "passive") not in trainer_log_levels:
            raise InputError(f"{name}: {values[name]!r} is not one of {', '.join(trainer_log_levels)}")
    if values.get("optim") in OPTIMIZERS:
        parse_optim_args(values.get("optim_args"), OPTIMIZERS[values["optim"]])
    if isinstance(values.get("resume_from_checkpoint"), bool):
        values = values | {"resume_from_checkpoint": "true" if values["resume_from_checkpoint"] else None}
    return values


def _bridge_versions(values: dict[str, Any], hints: dict[str, Any]) -> dict[str, Any]:
    """Accept the fraction of warm-up steps under either name.

    Transformers 4.57 calls it ``warmup_ratio``; Transformers 5 uses ``warmup_steps`` below 1 instead.
    """
    values = dict(values)
    if "warmup_ratio" in values and "warmup_ratio" not in hints:
        values["warmup_steps"] = values.pop("warmup_ratio")
    steps = values.get("warmup_steps")
    if hints.get("warmup_steps") is int and isinstance(steps, float):
        if 0 < steps < 1:
            values["warmup_ratio"] = values.pop("warmup_steps")
        elif steps.is_integer():
            values["warmup_steps"] = int(steps)
    return values


def _rename_options(argv: list[str], hints: dict[str, Any]) -> list[str]:
    """Rename options of Transformers' scripts to ours; drop those that are false or null."""
    renamed: list[str] = []
    rest = iter(argv)
    for part in rest:
        option, equals, value = part.partition("=")
        name = option.removeprefix("--").replace("-", "_") if option.startswith("--") else ""
        if name and name not in hints and RENAMED.get(name) in hints:
            renamed.append(f"--{RENAMED[name]}{equals}{value}")
            continue
        if name in INSTEAD and name not in hints:
            asked = value if equals else next(rest, "true")
            if asked.lower() not in ("false", "none", "null"):
                raise InputError(_unknown(name, hints))
            continue
        renamed.append(part)
    return renamed


def _read_config(path: Path, hints: dict[str, Any]) -> dict[str, Any]:
    kind = "JSON" if path.suffix.lower() == ".json" else "YAML"
    try:
        text = path.read_text(encoding="utf-8-sig")
        values = _load_json(text) if kind == "JSON" else _load_yaml(text)
    except FileNotFoundError:
        raise InputError(f"{path}: no such config file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as {kind}: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: should hold `key: value` lines, but holds {_describe(type(values))}")
    read = {}
    for key, value in values.items():
        if key not in hints and RENAMED.get(key) in hints:
            if RENAMED[key] in values:
                raise InputError(f"{path}: {key} and {RENAMED[key]} mean the same; set one of them")
            key = RENAMED[key]
        if key not in hints:
            if key in INSTEAD and value in (False, None):
                continue
            raise InputError(f"{path}: {_unknown(str(key), hints)}")
        read[key] = _truth(value, hints[key])
    return read


def _truth(value: Any, hint: Any) -> Any:
    """Read yes, no, on and off as YAML 1.1 does, where a boolean is needed."""
    if isinstance(value, str) and bool in _options(hint) and str not in _options(hint):
        return {"yes": True, "on": True, "no": False, "off": False}.get(value.lower(), value)
    return value


def _load_json(text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if (twice := next((key for key in keys if keys.count(key) > 1), None)) is not None:
            raise ValueError(f"key {twice!r} is given twice")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _load_yaml(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except Exception as error:  # more than YAMLError: `!!float ""` is an IndexError, [[[[... a RecursionError
        raise ValueError(str(error)) from error


class _StrictLoader(yaml.SafeLoader):
    """The safe loader with the scalars of YAML 1.2; duplicate keys are refused.

    In PyYAML's YAML 1.1, 5e-05 is text, 010 is eight, 1:30 is ninety and no is false.
    """

    yaml_implicit_resolvers: typing.ClassVar[dict] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        twice = next((key for index, key in enumerate(keys) if key in keys[:index]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_whole(self, node: yaml.ScalarNode) -> int:
        """A whole number; 0o and 0x mark bases 8 and 16."""
        text = self.construct_scalar(node)
        return int(text, 0) if text.startswith(("0o", "0x")) else int(text)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
):
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_whole)


class _Parser(HfArgumentParser):
    """HfArgumentParser that returns only the given options, and raises InputError instead of printing its usage."""

    def error(self, message: str) -> typing.NoReturn:
        raise InputError(message)


def _read_command_line(
    dataclass_types: Sequence[type], argv: list[str], hints: dict[str, Any], description: str | None
) -> dict[str, Any]:
    parser = _Parser(
        list(dataclass_types),
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [CONFIG.yaml] [--key value ...]",
        conflict_handler="resolve",
        allow_abbrev=False,
    )
    if "warmup_ratio" in hints and "--warmup_ratio" not in parser._option_string_actions:
        parser.add_argument(
            "--warmup_ratio", type=float, help="Fraction of the steps over which the learning rate rises."
        )
    for action in parser._actions:
        if action.dest not in hints:
            continue
        action.help = (action.help or "").replace("%%", "%")
        if action.default not in (None, argparse.SUPPRESS):
            action.help += f" (default: {getattr(action.default, 'value', action.default)})"
        action.help = action.help.strip().replace("%", "%%")  # argparse formats help texts
        action.default, action.required = argparse.SUPPRESS, False
        if _options(hints[action.dest]) == {bool, types.NoneType}:
            action.nargs, action.const = "?", True  # --key alone means --key true, as for other switches
        if action.type is int and action.dest == "warmup_steps":
            action.type = float  # a fraction of the steps, also on 4.57
        if action.nargs in (None, "?") and _options(hints[action.dest]) & {dict, list}:
            action.type = _structured(action.type)
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].partition("=")[0]
        if not name.startswith("--"):
            raise InputError(f"{unknown[0]!r} belongs to no option; usage: [CONFIG.yaml] [--key value ...]")
        raise InputError(_unknown(name.lstrip("-").replace("-", "_"), hints))
    return vars(known)


def _structured(convert: Callable[[str], Any] | None) -> Callable[[str], Any]:
    """Read ``{a: 1}`` and ``[x, y]`` on the command line as YAML, everything else with ``convert``."""

    def read(text: str) -> Any:
        if text.lstrip()[:1] in ("{", "["):
            try:
                return _load_yaml(text)
            except ValueError as error:
                raise argparse.ArgumentTypeError(f"{text!r} cannot be read as YAML: {error}") from error
        return convert(text) if isinstance(convert, types.FunctionType | type) else text

    return read


def _unknown(name: str, hints: dict[str, Any]) -> str:
    if name in INSTEAD:
        return f"{name}: not an option here: {INSTEAD[name]}"
    close = difflib.get_close_matches(name, hints, n=3)
    return f"unknown option {name!r}" + (f", did you mean {' or '.join(close)}?" if close else " (--help lists all)")


def _options(hint: Any) -> set[Any]:
    """The plain types a hint allows: ``dict[str, int] | str | None`` -> {dict, str, NoneType}."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return set().union(*(_options(option) for option in typing.get_args(hint)))
    return {typing.get_origin(hint) or hint}


def _choices(hint: Any) -> list[Any]:
    """The values of the enumerations and literals among a hint's options."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [choice for option in typing.get_args(hint) for choice in _choices(option)]
    if typing.get_origin(hint) is typing.Literal:
        return list(typing.get_args(hint))
    return [member.value for member in hint] if isinstance(hint, type) and issubclass(hint, Enum) else []


def _matches(value: Any, hint: Any) -> bool:
    if isinstance(value, str | Enum) and _choices(hint):
        return value in _choices(hint)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, option) for option in args)
    if origin is list:
        return isinstance(value, list) and all(_matches(item, args[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_matches(k, args[0]) and _matches(v, args[1]) for k, v in value.items())
    if origin is typing.Literal:
        return value in args
    if hint is Any:
        return True
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _describe(hint: Any) -> str:
    if choices := _choices(hint):
        return "one of " + ", ".join(map(str, choices))
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list"}
    words |= {dict: "a mapping", types.NoneType: "null"}
    known = [word for kind, word in words.items() if kind in _options(hint)]
    return " or ".join(known) or str(hint)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
