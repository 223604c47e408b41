"""Conversion of models to bfloat16 for training with more bits, and export of the float32 weights (ours)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from .base import MomentOptimizer


def to_bfloat16(model: Module) -> Module:
    """Convert a model's float32 parameters to bfloat16 in place, except those of normalization layers.

    Normalization layers are recognized by the name of their class (LayerNorm, LlamaRMSNorm, BatchNorm2d). Their
    weights are few and near 1, where bfloat16 has steps of 1/256. They compute in float32 and return the dtype of
    their input. Buffers are not changed; ``model.bfloat16()`` would also round the frequencies of rotary embeddings.
    Train the model with ``master_weight_bits=24`` or 32: otherwise updates smaller than 1/256 of a weight are lost.

    Args:
        model: any model; only float32 parameters are converted.

    Returns:
        The model itself.
    """
    for module in model.modules():
        parameters = [p for p in module.parameters(recurse=False) if p.dtype == torch.float32]
        if not parameters:
            continue
        if "norm" in type(module).__name__.lower():
            module.register_forward_pre_hook(_to_float32)
            module.register_forward_hook(_to_input_dtype)
            continue
        for parameter in parameters:
            parameter.data = parameter.data.bfloat16()
    return model


def _to_float32(module: Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Widen a normalization layer's input, and remember its dtype."""
    module._input_dtype = args[0].dtype  # type: ignore[assignment]
    return (args[0].float(), *args[1:])


def _to_input_dtype(module: Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    dtype: Any = module._input_dtype
    return output.to(dtype)


def master_state_dict(model: Module, optimizer: MomentOptimizer) -> dict[str, Any]:
    """The model's state dict with the trained weights in float32, including corrections.

    ``model.save_pretrained(folder, state_dict=master_state_dict(model, optimizer))`` saves them; load them with
    ``from_pretrained(folder, dtype=torch.float32)``. It is not needed for resuming a run: the checkpoint of model and
    optimizer holds the parameters and their corrections.

    Args:
        model: the trained model.
        optimizer: its optimizer; parameters that it does not have are converted without corrections.

    Returns:
        ``model.state_dict()`` with float16 and bfloat16 parameters in float32; tied parameters share a tensor.

    Raises:
        TypeError: the optimizer is not DualAdam or InvAdam.
    """
    while not isinstance(optimizer, MomentOptimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, MomentOptimizer):
        raise TypeError(f"Invalid optimizer: {type(optimizer).__name__} - should be DualAdam or InvAdam.")
    state = model.state_dict()
    weights: dict[Tensor, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in state and parameter.dtype in (torch.float16, torch.bfloat16):
            if parameter not in weights:
                weights[parameter] = optimizer.master_weights(parameter)
            state[name] = weights[parameter]
    return state
