"""Trainer's ``optim_args``: the table of keys, and the parser.

The constructor of an optimizer determines which keys it takes, so a new optimizer in
``hf_dualadam.optimizers.OPTIMIZERS`` needs no entry here unless it adds an option.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from ..optimizers import OPTIMIZERS, DualAdam
from ..states import CORRECTION_DTYPES, MOMENT_FORMATS


class OptimArg(NamedTuple):
    """One key of ``optim_args``.

    Attributes:
        parse: converts the text of the value; raises ValueError or KeyError if it is not allowed.
        allowed: the allowed values, for messages and the table in the README.
        meaning: what the option does, for the table in the README.
        needs: the constructor argument that the option requires; None if it has the name of the key.
    """

    parse: Callable[[str], Any]
    allowed: str
    meaning: str
    needs: str | None = None


def _number(text: str, low: float = 0.0, high: float = math.inf, open_start: bool = False) -> float:
    value = float(text)
    if not (low <= value <= high) or not math.isfinite(value) or (open_start and value == low):
        raise ValueError
    return value


def _one_of(text: str, choices: Iterable[int]) -> int:
    return {str(choice): choice for choice in choices}[text]


def _flag(text: str) -> bool:
    return {"true": True, "1": True, "false": False, "0": False}[text.lower()]


OPTIM_ARGS = {
    "switch_rate": OptimArg(
        functools.partial(_number, high=1.0), "a number in [0, 1]", "decrease of alpha per optimizer step"
    ),
    "switch_fraction": OptimArg(
        functools.partial(_number, high=1.0, open_start=True),
        "a number in (0, 1]",
        "length of the inverse phase as a fraction of the planned optimizer steps; instead of switch_rate",
        needs="switch_rate",  # not an argument of the optimizer: the callback turns it into a rate
    ),
    "normalize_inverse": OptimArg(_flag, "true or false", "rescale the inverse update to the size of Adam's"),
    "inverse_scale": OptimArg(_number, "a number >= 0", "factor of the inverse update; 1 is the paper"),
    "state_bits": OptimArg(
        functools.partial(_one_of, choices=MOMENT_FORMATS), "32 or 8", "bits of each moment; 8 saves memory"
    ),
    "master_weight_bits": OptimArg(
        functools.partial(_one_of, choices=CORRECTION_DTYPES),
        "24 or 32",
        "bits per weight when training bfloat16 and float16 parameters",
    ),
    "release_gradients": OptimArg(
        _flag,
        "true or false",
        "update each weight within the backward pass and free its gradient",
        needs="state_bits",  # every MomentOptimizer has it; the callback releases the gradients
    ),
    "foreach": OptimArg(_flag, "true or false", "force or disable the multi-tensor path"),
    "fused": OptimArg(_flag, "true or false", "force or disable the one-pass kernel"),
}


def valid_optim_args(optimizer_cls: type[torch.optim.Optimizer]) -> dict[str, OptimArg]:
    """The keys of ``optim_args`` that an optimizer takes.

    Args:
        optimizer_cls: the optimizer, whose constructor's arguments decide.

    Returns:
        The entries of :data:`OPTIM_ARGS` that it takes.
    """
    arguments = inspect.signature(optimizer_cls).parameters
    return {key: arg for key, arg in OPTIM_ARGS.items() if (arg.needs or key) in arguments}


def parse_optim_args(text: str | None, optimizer_cls: type[torch.optim.Optimizer] = DualAdam) -> dict[str, Any]:
    """Parse Trainer's ``optim_args`` into typed options.

    Args:
        text: ``"key=value,key=value"``; None or empty for no options.
        optimizer_cls: the optimizer, whose options are allowed; InvAdam has no switch. Default DualAdam.

    Returns:
        The options with their types.

    Raises:
        ValueError: a key is unknown or given twice, a value is invalid, or two keys exclude each other.
    """
    valid = valid_optim_args(optimizer_cls)
    options: dict[str, Any] = {}
    for item in (text or "").split(",") if (text or "").strip() else []:
        key, separator, value = (part.strip() for part in item.partition("="))
        if not separator:
            raise ValueError(f"Invalid optim_args: {item.strip()!r} in {text!r} - should be key=value,key=value,...")
        if key not in valid:
            raise ValueError(
                f"Invalid optim_args: unknown key {key!r} for {optimizer_cls.__name__} - should be one of "
                f"{', '.join(valid) or '(it takes none)'}.{_whose(key)}"
            )
        if key in options:
            raise ValueError(f"Invalid optim_args: {key} is given twice in {text!r} - should be given once.")
        try:
            options[key] = valid[key].parse(value)
        except (ValueError, KeyError):
            raise ValueError(f"Invalid optim_args: {key}={value} - should be {valid[key].allowed}.") from None
    if "switch_rate" in options and "switch_fraction" in options:
        raise ValueError(
            f"Invalid optim_args: both switch_rate and switch_fraction in {text!r} - should be at most one of them."
        )
    if options.get("foreach") and options.get("fused"):
        raise ValueError(f"Invalid optim_args: both foreach and fused in {text!r} - should be at most one of them.")
    return options


def _whose(key: str) -> str:
    """Name the optimizers that take a key, and how a search over ``optim`` sets different options for each."""
    owners = [cls.__name__ for cls in OPTIMIZERS.values() if key in valid_optim_args(cls)]
    if not owners:
        return ""
    return (
        f" It belongs to {', '.join(owners)}: set optim_args together with optim, in a hyper-parameter search by an "
        'hp_space that returns both, such as {"optim": "invadam", "optim_args": "normalize_inverse=true"}.'
    )
