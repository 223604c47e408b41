"""Time the CUDA kernels with several launch settings, on the shapes of BERT-base.

python docs/results/gpu-h200/launch_settings.py

It changes private constants, so another version of hf_dualadam may need other names.
"""

import statistics
import sys
import zlib
from pathlib import Path

import torch
from triton.language import constexpr

from hf_dualadam import DualAdam
from hf_dualadam.kernels import blocks_triton, cuda, tables

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts"))
from benchmark_step import Machine, shapes_of  # noqa: E402

EXACT = [(1024, 4), (1024, 8), (2048, 8), (512, 4)]  # elements per program, warps
CODED = [(2, 2), (4, 4), (8, 4), (2, 1)]  # blocks per program, warps
CASES = {
    "f32": (torch.float32, {}),
    "bf16": (torch.bfloat16, {}),
    "f16": (torch.float16, {}),
    "f32norm": (torch.float32, {"normalize_inverse": True}),
    "bf16m24": (torch.bfloat16, {"master_weight_bits": 24}),
    "f32s8": (torch.float32, {"state_bits": 8}),
    "bf16s8m24": (torch.bfloat16, {"state_bits": 8, "master_weight_bits": 24}),
    "f32s8norm": (torch.float32, {"state_bits": 8, "normalize_inverse": True}),
}


def choose(coded: bool, size: int, warps: int) -> None:
    """Choose a setting, and forget what has been compiled for another."""
    setattr(tables, "BLOCKS" if coded else "CHUNK", constexpr(size))
    tables.LAYOUT = zlib.crc32(repr((tables.CHUNK.value, tables.BLOCKS.value)).encode())  # for Triton's cache on disk
    (cuda._LAUNCH_BLOCKS if coded else cuda._LAUNCH)["num_warps"] = warps
    cuda._failure.cache_clear()
    for kernel in (*vars(cuda.load()).values(), *vars(blocks_triton).values()):
        getattr(kernel, "device_caches", {}).clear()


def milliseconds(machine: Machine, optimizer: torch.optim.Optimizer) -> float:
    """The median of some steps on the device."""
    for _ in range(3):
        optimizer.step()
    return statistics.median(machine.device_seconds(optimizer.step) for _ in range(9)) * 1e3


def main() -> None:
    """Print the table."""
    machine, shapes = Machine("cuda"), shapes_of("bert-base")
    print(torch.cuda.get_device_name())
    for coded, settings in ((False, EXACT), (True, CODED)):
        for setting in settings:
            choose(coded, *setting)
            times = {}
            for name, (dtype, options) in CASES.items():
                if ("state_bits" in options) == coded:
                    params = [torch.nn.Parameter(torch.randn(shape, device="cuda").to(dtype)) for shape in shapes]
                    for p in params:
                        p.grad = torch.randn_like(p)
                    optimizer = DualAdam(params, lr=1e-5, weight_decay=0.01, switch_rate=1e-7, **options)
                    times[name] = f"{milliseconds(machine, optimizer):.3f}"
            print("8 bits" if coded else "exact", setting, times, flush=True)


if __name__ == "__main__":
    main()
