"""Trainer's ``optim_args`` text: the table of its keys, and the parser."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from ..optimizers import DualAdam


class OptimArg(NamedTuple):
    """One key of ``optim_args``: how its text is read, what is allowed, what it means."""

    parse: Callable[[str], Any]
    allowed: str
    meaning: str


def _number(text: str, allow_zero: bool) -> float:
    value = float(text)
    if not (0 <= value <= 1) or (value == 0 and not allow_zero):
        raise ValueError
    return value


def _flag(text: str) -> bool:
    return {"true": True, "1": True, "false": False, "0": False}[text.lower()]


OPTIM_ARGS = {
    "switch_rate": OptimArg(
        functools.partial(_number, allow_zero=True), "a number in [0, 1]", "drop of alpha per optimizer step"
    ),
    "switch_fraction": OptimArg(
        functools.partial(_number, allow_zero=False),
        "a number in (0, 1]",
        "the inverse phase's share of the planned optimizer steps; instead of switch_rate",
    ),
    "normalize_inverse": OptimArg(_flag, "true or false", "rescale the inverse update to the size of Adam's"),
    "foreach": OptimArg(_flag, "true or false", "choose or forbid the multi-tensor path"),
    "fused": OptimArg(_flag, "true or false", "choose or forbid the one-pass kernel"),
}


def parse_optim_args(text: str | None, optimizer_cls: type[DualAdam] = DualAdam) -> dict[str, Any]:
    """Read Trainer's ``optim_args`` text into keyword arguments.

    Args:
        text: ``"key=value,key=value"``; None or empty for no options.
        optimizer_cls: whose options are allowed: InvAdam has none about the switch.

    Returns:
        The options with their types.

    Raises:
        ValueError: a key is unknown or given twice, a value is bad, or both switch options are given.
    """
    valid = {k: v for k, v in OPTIM_ARGS.items() if optimizer_cls is DualAdam or not k.startswith("switch_")}
    options: dict[str, Any] = {}
    for item in (text or "").split(",") if (text or "").strip() else []:
        key, separator, value = (part.strip() for part in item.partition("="))
        if not separator:
            raise ValueError(f"Invalid optim_args: {item.strip()!r} in {text!r} - should be key=value,key=value,...")
        if key not in valid:
            raise ValueError(
                f"Invalid optim_args: unknown key {key!r} for {optimizer_cls.__name__} - should be one of "
                + ", ".join(valid)
                + "."
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
