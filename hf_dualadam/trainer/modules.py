"""The torch module behind what a Trainer calls its model."""

from __future__ import annotations

from typing import Any

from torch.nn import Module


def trained_module(model: Any) -> Module:
    """The module whose parameters are trained.

    Args:
        model: what a callback gets as ``model``: a module, or an object that holds one, as setfit's ``SetFitModel``.

    Returns:
        The module; an empty one where there is none.
    """
    if isinstance(model, Module):
        return model
    return (
        next((value for value in vars(model).values() if isinstance(value, Module)), Module()) if model else Module()
    )
