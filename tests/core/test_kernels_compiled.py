"""The compiled CUDA kernels, without a GPU: a replacement of Triton's driver launches nothing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", "3.2", reason="needs Triton 3.2")

from hf_dualadam import DualAdam, InvAdam  # noqa: E402
from hf_dualadam.kernels import cuda, dry_run  # noqa: E402

TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
TARGETS = ["sm_80", "sm_90", "gfx942"]
REGISTERS = 128  # per thread: room for four programs of 128 threads on a multiprocessor of any GPU since sm_80
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def _params(dtype, sizes=(5000, 3)):
    params = [torch.nn.Parameter(torch.zeros(size, dtype=dtype)) for size in sizes]
    for p in params:
        p.grad = torch.zeros_like(p)
    return params


def _every_variant(dtype):
    """Take a step with every kernel; some bfloat16 parameters have float32 moments."""
    for bits in (None, 24, 32) if dtype in (torch.bfloat16, torch.float16) else (None,):
        for capturable in (False, True):
            params = _params(dtype)
            options = {"normalize_inverse": True, "capturable": capturable, "master_weight_bits": bits}
            DualAdam(params, lr=0.1, **options).step()
    if dtype == torch.bfloat16:
        optimizer = DualAdam(params)
        optimizer.step()
        for p in params:
            optimizer.state[p] |= {name: torch.zeros(p.shape) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.step()


class _Compiled:
    """What Triton has compiled while a test ran."""

    def __init__(self, monkeypatch):
        self.kernels = []
        compile_ = triton.compiler.compiler.compile

        def keep(source, *args, **kwargs):
            kernel = compile_(source, *args, **kwargs)
            self.kernels.append((source.fn.__name__, kernel))
            return kernel

        for module in (triton.compiler.compiler, triton.compiler, triton.runtime.jit):
            if getattr(module, "compile", None) is compile_:
                monkeypatch.setattr(module, "compile", keep)
        for kernel in vars(cuda.load()).values():
            if hasattr(kernel, "compile"):  # Triton 3.2 keeps it there from the first launch on
                monkeypatch.setattr(kernel, "compile", keep)

    def named(self, name):
        return [kernel for own, kernel in self.kernels if own == name]


@pytest.fixture
def compiled(monkeypatch):
    return _Compiled(monkeypatch)


@pytest.mark.parametrize("gpu", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel_compiles(gpu, dtype, compiled):
    with dry_run.cuda_path_on_the_cpu(gpu) as launches:
        _every_variant(dtype)
    names = {name for name, _ in launches}
    assert names == {"update_kernel", "norms_kernel", "norm_sums_kernel", "step_scalars_kernel"}
    assert {name for name, _ in compiled.kernels} == names
    if gpu.startswith("sm_") and dtype != torch.float64:
        for kernel in compiled.named("update_kernel") + compiled.named("norms_kernel"):
            assert ".f64" not in kernel.asm["ptx"], "float64 in the inner loop of a kernel of another dtype"


def _machine_code(kernel, tmp_path):
    """Resources, and the opcodes of the machine code."""
    path = tmp_path / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    run = lambda *command: subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: E731
    usage = run(str(tools / "cuobjdump"), "-res-usage", str(path))
    code = run(str(tools / "nvdisasm"), "-c", str(path))
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", code)
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}, opcodes


@pytest.mark.parametrize("gpu", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_machine_code_of_the_update(gpu, dtype, compiled, tmp_path):
    with dry_run.cuda_path_on_the_cpu(gpu):
        _every_variant(dtype)
    # Loads and stores of 16 bytes per thread: 8 elements of p, g, m and v, of 2 bytes each at least.
    least_loads, least_stores = {torch.float32: (8, 6), torch.float16: (6, 5), torch.bfloat16: (4, 3)}[dtype]
    for kernel in compiled.named("update_kernel"):
        usage, opcodes = _machine_code(kernel, tmp_path)
        assert usage["STACK"] == usage["LOCAL"] == 0, f"registers are spilled: {usage}"
        assert not [op for op in opcodes if op.startswith(("LDL", "STL"))], "registers are spilled"
        assert usage["REG"] <= REGISTERS, f"{usage['REG']} registers per thread"
        wide_loads = [i for i, op in enumerate(opcodes) if op.startswith("LDG") and "128" in op]
        wide_stores = [i for i, op in enumerate(opcodes) if op.startswith("STG") and "128" in op]
        assert len(wide_loads) >= least_loads, "an aligned tensor is not loaded 16 bytes at a time"
        assert len(wide_stores) >= least_stores, "an aligned tensor is not stored 16 bytes at a time"
        first_root = next(i for i, op in enumerate(opcodes) if op.startswith("MUFU"))
        # The assembler of Triton 3.6 leaves 3 of 8 loads for later, which costs no time on an H200.
        early = least_loads if TRITON >= (3, 7) or dtype != torch.float32 else 5
        assert sum(load < first_root for load in wide_loads) >= early, "the arithmetic does not wait for the loads"


def test_nothing_compiles_again_as_numbers_change(compiled):
    with dry_run.cuda_path_on_the_cpu():
        sizes = [(1,), (5000, 3), (16, 32, 2049), (3,) * 17]
        for number, own in enumerate(sizes):
            params = _params(torch.float32, own)
            rate = (0.3, 0.01, 1.0, 0.0)[number]
            groups = [{"params": params[:1], "lr": 1.0}, {"params": params[1:] or _params(torch.float32, (16,))}]
            optimizer = DualAdam(groups, switch_rate=rate, weight_decay=0.1 * number, normalize_inverse=True)
            for lr in (1, 0.5, 1e-3, 0.0, 7):
                optimizer.param_groups[0]["lr"] = lr
                optimizer.step()
    assert sorted(name for name, _ in compiled.kernels) == ["norm_sums_kernel", "norms_kernel", "update_kernel"]


def test_norms_are_measured_in_the_inverse_phase_only():
    with dry_run.cuda_path_on_the_cpu() as launches:
        optimizer = DualAdam(_params(torch.float32), switch_rate=0.3, normalize_inverse=True)
        for _ in range(4):
            optimizer.step()
    assert [name for name, _ in launches if name == "norms_kernel"] == ["norms_kernel"] * 3  # one is the trial


def test_fusion_is_said_on_every_launch(monkeypatch):
    """Triton's default for fused operations changes between releases."""
    said = []
    kernels = cuda.load()
    for name in ("update_kernel", "norms_kernel", "norm_sums_kernel", "step_scalars_kernel"):
        run = getattr(kernels, name).run

        def watched(*args, run=run, **options):
            said.append(options["enable_fp_fusion"])
            return run(*args, **options)

        monkeypatch.setattr(getattr(kernels, name), "run", watched)
    with dry_run.cuda_path_on_the_cpu():
        _every_variant(torch.float32)
    assert said and not any(said)


@pytest.mark.skipif("HF_DUALADAM_OLD_TRITON" not in os.environ, reason="needs a folder with an old release of Triton")
def test_every_kernel_compiles_with_an_old_triton():
    """pip install --no-deps --target FOLDER triton==3.2.0, and HF_DUALADAM_OLD_TRITON=FOLDER.

    Not for AMD: that release would need the linker of ROCm.
    """
    path = os.pathsep.join([os.environ["HF_DUALADAM_OLD_TRITON"], *sys.path])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    command += ["-k", "every_kernel_compiles and sm_"]
    environment = os.environ | {"PYTHONPATH": path}
    environment.pop("HF_DUALADAM_OLD_TRITON")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]


@pytest.mark.parametrize("cls", [DualAdam, InvAdam])
def test_a_kernel_that_cannot_be_launched_leaves_the_step_to_foreach(cls, monkeypatch, caplog):
    """As on a machine without a C compiler, which Triton needs for its launcher."""

    def fail(*_, **__):
        raise RuntimeError("Failed to find C compiler.")

    params = _params(torch.float32)
    with dry_run.cuda_path_on_the_cpu():
        monkeypatch.setattr(cuda.load().update_kernel, "run", fail)
        optimizer = cls(params)
        for p in params:
            p.grad.fill_(1.0)
        for _ in range(3):
            optimizer.step()
        reason = cuda.unavailable_reason(params[0], optimizer.param_groups[0])
    assert "Failed to find C compiler" in reason
    assert caplog.text.count("Failed to find C compiler") == 1
    assert optimizer.state[params[0]]["step"] == 3
    assert (params[0] != 0).all()


def _every_variant_of_8_bit_moments(dtype):
    for bits in (None,) if dtype == torch.float32 else (None, 24, 32):
        for capturable in (False, True):
            params = _params(dtype, [(33, 128), (67, 130)])
            settings = {"state_bits": 8, "master_weight_bits": bits, "capturable": capturable}
            DualAdam(params, lr=0.1, normalize_inverse=True, **settings).step()


@pytest.mark.parametrize("gpu", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kernels_of_8_bit_moments(gpu, dtype, compiled, tmp_path):
    with dry_run.cuda_path_on_the_cpu(gpu) as launches:
        _every_variant_of_8_bit_moments(dtype)
    names = {name for name, _ in launches}
    assert names == {"update_blocks_kernel", "norms_blocks_kernel", "norm_sums_kernel", "step_scalars_kernel"}
    assert len(compiled.named("update_blocks_kernel")) == (1 if dtype == torch.float32 else 3)
    if not gpu.startswith("sm_"):
        return
    for kernel in compiled.named("update_blocks_kernel"):
        assert ".f64" not in kernel.asm["ptx"]
        usage, opcodes = _machine_code(kernel, tmp_path)
        assert not [op for op in opcodes if op.startswith(("LDL", "STL"))], f"registers are spilled: {usage}"
        width = "LDG.E.128" if dtype == torch.float32 else "LDG.E.64"  # 4 elements per thread
        assert [op for op in opcodes if op.startswith(width)], "elements are not loaded 4 at a time"
