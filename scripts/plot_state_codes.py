#!/usr/bin/env python
"""Plot the error of the update with 8-bit codes of v: ours, equal steps of v, and equal steps of sqrt(v).

python scripts/plot_state_codes.py docs/images/state_codes.png
"""

import argparse

from hf_dualadam.extras import require_or_exit

require_or_exit("finetune")

import matplotlib.pyplot as plt
import numpy as np
import torch

from hf_dualadam.states import MOMENT_FORMATS, new_moment

BLOCK, BLOCKS, DECADES, STEPS = 128, 2000, 12, 16


def ours(v: torch.Tensor, step: int) -> torch.Tensor:
    """Encode v in the 8-bit format of the package, and decode it."""
    state = {"step": torch.tensor(float(step)), **new_moment(MOMENT_FORMATS[8], v, "exp_avg_sq", torch.float32)}
    MOMENT_FORMATS[8].encode_(state, "exp_avg_sq", v)
    return MOMENT_FORMATS[8].decode(state, "exp_avg_sq")


def even(v: torch.Tensor, power: float) -> torch.Tensor:
    """Encode v in 255 equal steps of v^power up to the largest value of the block, and decode it."""
    scaled = v.double().pow(power)
    largest = scaled.amax(1, keepdim=True)
    return ((scaled / largest * 255).round() / 255 * largest).pow(1 / power)


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", help="where to write the picture")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    v = 10 ** (-DECADES * torch.rand(BLOCKS, BLOCK, generator=generator))
    ratio = (v / v.amax(1, keepdim=True)).log10().flatten().numpy()
    edges = np.linspace(-DECADES, 0, 49)
    figure, axes = plt.subplots(figsize=(7, 4))
    curves = {
        "ours: even steps of the bit pattern": [ours(v, step) for step in range(1, STEPS + 1)],
        "even steps of the root": [even(v, 0.5)],
        "even steps": [even(v, 1.0)],
    }
    for name, coded in curves.items():
        # The root of v divides the update, so d has half of v's relative error.
        errors = (
            torch.stack([((c.double() / v.double()).sqrt() - 1).square() for c in coded]).mean(0).flatten().numpy()
        )
        means = [np.sqrt(errors[(ratio >= a) & (ratio < b)].mean()) for a, b in zip(edges, edges[1:])]
        axes.plot(10 ** ((edges[1:] + edges[:-1]) / 2), means, label=name, linewidth=2)
    axes.set(xscale="log", yscale="log", ylim=(1e-3, 2))
    axes.set_xlabel("v, as a part of the largest in its block")
    axes.set_ylabel("relative error of the root of v")
    axes.axhline(1, color="grey", linewidth=0.8, linestyle=":")
    axes.text(10.0**-DECADES, 1.08, " v is coded as 0: the update is divided by eps", color="grey", fontsize=8)
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(args.path, dpi=150)


if __name__ == "__main__":
    main()
