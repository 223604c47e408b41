"""The CUDA path without a GPU: kernels are bound, specialized and compiled, but never launched.

It serves to test the compiled code and to measure the host time of a step. Triton's drivers are not a public
interface, so a new release of Triton may require changes here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from triton import __version__
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from .. import kernels
from . import blocks_triton, cuda

Launches = list[tuple[str, tuple[int, int, int]]]  # names of kernels and grids


class _Utils:
    """Replaces the functions of a driver's C library."""

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        old = tuple(map(int, __version__.split(".")[:2])) < (3, 3)
        return (1, 1, 32, 0) if old else (1, 1, 32, 0, 1024)  # module, function, registers, spills, threads

    def unload_module(self, _: Any) -> None:
        pass

    def get_device_properties(self, _: Any) -> dict[str, int]:
        return {"max_shared_mem": 64 * 1024, "multiprocessor_count": 132, "warpSize": 32}


class _Driver:
    """A driver that reports a target and launches nothing."""

    def __init__(self, target: GPUTarget, launches: Launches) -> None:
        self.utils, self._target = _Utils(), target

        class Launcher:
            def __init__(self, source: Any, metadata: Any) -> None:
                self._name = source.fn.__name__

            def __call__(self, x: int, y: int, z: int, *_: Any, **__: Any) -> None:
                launches.append((self._name, (x, y, z)))

        self.launcher_cls = Launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: Any) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, _: str) -> str:
        return "int"


def target(name: str) -> GPUTarget:
    """The GPU with a name such as ``sm_90`` or ``gfx942``."""
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)


def _forget_compiled_kernels() -> None:
    """Clear Triton's JIT caches of every kernel in memory; the disk cache stays."""
    for kernel in (*vars(cuda.load()).values(), *vars(blocks_triton).values()):
        getattr(kernel, "device_caches", getattr(kernel, "cache", {})).clear()  # Triton 3.2 calls it cache


@contextlib.contextmanager
def cuda_path_on_the_cpu(gpu: str = "sm_90") -> Iterator[Launches]:
    """Make optimizers of parameters on the CPU take the CUDA path, up to the launch.

    Args:
        gpu: what to compile for, see :func:`target`.

    Yields:
        The launches that were left out.
    """
    launches: Launches = []
    try:
        before = driver.active
    except RuntimeError:  # there is no GPU, so there is no driver to restore
        before = None
    driver.set_active(_Driver(target(gpu), launches))
    cuda._failure.cache_clear()
    cuda._report.cache_clear()
    _forget_compiled_kernels()
    try:
        with (
            mock.patch.object(cuda, "is_here", lambda param: True),
            mock.patch.object(kernels, "_kernels", lambda: [cuda]),
        ):
            yield launches
    finally:
        cuda._failure.cache_clear()
        cuda._report.cache_clear()
        _forget_compiled_kernels()
        if before is not None:
            driver.set_active(before)
