"""One-pass kernels of the update in :mod:`hf_dualadam.functional`."""

from __future__ import annotations

from torch import Tensor


def unavailable_reason(param: Tensor) -> str | None:
    """Say why no kernel can update ``param``, or None if one can."""
    return f"there is no kernel for {param.device.type}."
