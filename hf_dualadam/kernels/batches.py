"""The parameters of one step, by group, and which of them a kernel can update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

Group = dict[str, Any]  # a parameter group's options
Item = tuple[Tensor, Tensor, dict[str, Any]]  # parameter, gradient, state
Batches = list[tuple[Group, list[Item]]]


def select(
    batches: Batches, is_here: Callable[[Tensor], bool], prepare: Callable[[Item, Group], Any]
) -> tuple[list[tuple[int, Item, Any]], Batches]:
    """Select what a kernel can update.

    Args:
        batches: per parameter group its options and tensors.
        is_here: whether a parameter is on the kernel's kind of device.
        prepare: called with an item and its group's options; returns what the kernel needs to know of the item, or
            None if it cannot update it.

    Returns:
        A list of (index of the group, item, what ``prepare`` returned), and the other batches: tensors of other
        devices as they came, those of this one singly.
    """
    selected: list[tuple[int, Item, Any]] = []
    left: Batches = []
    for index, (group, items) in enumerate(batches):
        others = []
        for item in items:
            if not is_here(item[0]):
                others.append(item)
            elif (prepared := prepare(item, group)) is None:
                left.append((group, [item]))
            else:
                selected.append((index, item, prepared))
        if others:
            left.append((group, others))
    return selected, left
