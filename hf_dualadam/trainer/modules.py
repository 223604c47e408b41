"""The torch module in whatever a Trainer has as its model."""

from __future__ import annotations

from typing import Any

from torch.nn import Module


def trained_module(model: Any) -> Module:
    """The module whose parameters are trained.

    Args:
        model: the ``model`` passed to a callback: a module, or an object that holds one, such as setfit's
            ``SetFitModel``.

    Returns:
        The module; an empty one if there is none.
    """
    if isinstance(model, Module):
        return model
    return (
        next((value for value in vars(model).values() if isinstance(value, Module)), Module()) if model else Module()
    )
