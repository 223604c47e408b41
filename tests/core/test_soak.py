"""Many steps, many tensors, large tensors: memory does not grow, paths agree, indices do not overflow.

2,000 steps by default; ``HYPOTHESIS_PROFILE=nightly`` does 20,000, and a tensor of more than 2^31 elements (18 GiB).
"""

import gc
import os
import resource

import paths
import psutil
import pytest
import torch
from torch.nn import Parameter

from hf_dualadam import DualAdam

# The default path is one of these, and capturable differs only on accelerators.
PATHS = {name: paths.PATHS[name] for name in ("single", "foreach", "fused") if name in paths.PATHS}
NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
STEPS = 20_000 if NIGHTLY else 2_000
NOISE = torch.randn(500, 28, generator=torch.Generator().manual_seed(0))


def _resident():
    gc.collect()
    return psutil.Process().memory_info().rss


def _soak(options, dtype=torch.float32):
    """Take steps on a noisy quadratic; return its position at 20 points, and the memory growth since the first."""
    params = [Parameter(torch.ones(shape, dtype=dtype)) for shape in [(4, 5), (7,), ()]]
    optimizer = DualAdam(params, lr=0.002, weight_decay=0.01, switch_rate=2 / STEPS, normalize_inverse=True, **options)
    noises = [column.to(dtype) for column in NOISE.split([20, 7, 1], dim=1)]
    places, start = [], 0
    for step in range(1, STEPS + 1):
        for param, noise in zip(params, noises):
            param.grad = param.detach() + noise[step % len(NOISE)].view(param.shape)
        optimizer.step()
        if step % (STEPS // 20) == 0:
            places.append(torch.cat([param.detach().flatten() for param in params]))
            start = start or _resident()
    return torch.stack(places), _resident() - start


def test_paths_stay_together_and_memory_flat_over_many_steps():
    # The reference is float64 on the for-loop path: float32 rounds at each step, which must not make a path drift
    exact, _ = _soak(PATHS["single"], torch.float64)
    for path, options in PATHS.items():
        places, growth = _soak(options)
        away = (places - exact).abs().amax(dim=1)
        print(
            f"{path}: {away.max():.1e} away at most in {STEPS} steps, {away[-1]:.1e} at the end; {growth} bytes more"
        )
        assert away.max() < 1e-4
        assert growth < 2**20


@pytest.mark.parametrize("path", PATHS)
def test_fifty_thousand_tensors(path):
    params = [Parameter(torch.full((1 + index % 3,), 1.0)) for index in range(50_000)]
    optimizer = DualAdam(params, lr=0.1, switch_rate=1.0, **PATHS[path])
    for index, param in enumerate(params):
        param.grad = torch.full_like(param, 1.0 if index % 2 else -1.0)
    optimizer.step()
    ends = torch.stack([param.detach()[-1] for param in params])
    torch.testing.assert_close(ends[0::2], torch.full((25_000,), 1.1))
    torch.testing.assert_close(ends[1::2], torch.full((25_000,), 0.9))
    assert len(optimizer.state_dict()["state"]) == 50_000


@pytest.mark.skipif("fused" not in PATHS, reason="the CPU kernel was not built")
@pytest.mark.skipif(not NIGHTLY, reason="large: HYPOTHESIS_PROFILE=nightly")
def test_more_elements_than_32_bits_count():
    count, needed = 2**31 + 8, 18 * 2**30
    if psutil.virtual_memory().available < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of memory")
    param = Parameter(torch.ones(count, dtype=torch.bfloat16))
    param.grad = torch.ones(count, dtype=torch.bfloat16)
    optimizer = DualAdam([param], lr=0.5, betas=(0.0, 0.0), switch_rate=1.0, fused=True)
    optimizer.step()
    print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB at most")
    for place in (0, 2**31 - 1, 2**31, count - 1):
        assert param[place].item() == 0.5
    assert torch.equal(param[-2:], param[:2])
