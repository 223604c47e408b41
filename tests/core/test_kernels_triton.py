"""The CUDA kernel: its numbers in Triton's interpreter, its code as compiled for GPUs, and both on a GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", "3.2", reason="needs Triton 3.2")

CHECKS = Path(__file__).with_name("triton_checks.py")


def _run_checks(**environment):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CHECKS)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return done.stdout


def test_checks_pass_in_the_interpreter():
    assert "passed" in _run_checks(TRITON_INTERPRET="1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_checks_pass_on_a_gpu():
    assert "passed" in _run_checks(TRITON_INTERPRET="0")


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "param, state, loads",
    [("fp32", "fp32", r"ld\.global\.v4\.b32"), ("bf16", "bf16", r"ld\.global\.v4\.b32"), ("fp16", "fp32", r"v4\.b32")],
)
def test_compiled_kernels_load_16_bytes_at_once(param, state, loads, capability):
    """Compiled without a GPU; nothing but tables is an argument, so nothing else can make it compile again."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hf_dualadam.kernels import dual_update_triton as kernels

    tables = {"tensors": "*i64", "grads": "*i64", "chunks": "*i32"}
    tables |= dict.fromkeys(("scalars", "norm_ratios", "chunk_sums"), "*fp32")
    dtypes = {"fp32": kernels.tl.float32, "bf16": kernels.tl.bfloat16, "fp16": kernels.tl.float16}
    constants = {"param_dtype": dtypes[param], "state_dtype": dtypes[state], "real": dtypes["fp32"]}
    for kernel in (kernels.update_kernel,):
        names = kernel.arg_names
        assert set(names) <= {*tables, *constants}
        source = ASTSource(
            kernel,
            {name: tables.get(name, "constexpr") for name in names},
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in tables},
        )
        ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8}).asm["ptx"]
        assert re.search(loads, ptx)
