#!/usr/bin/env python
"""Measure the memory of training: bytes per parameter, and what a step allocates on top.

    python scripts/measure_memory.py                # a BERT-base with random weights on this machine's CPU
    python scripts/measure_memory.py --device cuda
    python scripts/measure_memory.py --cards        # no measurement: the largest model for each card

Each setting runs in its own process: three training steps on one short text. "weights", "gradients" and "state"
are the sizes of the tensors that exist between the backward pass and the step; "step" is the growth of memory in use
during the third step (on Linux or CUDA). With gradient release, parameters are updated in the backward pass.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from pathlib import Path

import torch
from transformers import BertConfig, BertForMaskedLM

from hf_dualadam import DualAdam, release_gradients
from hf_dualadam.precision import to_bfloat16

# Name -> (bfloat16 parameters, options of the optimizer, gradient release).
SETTINGS = {
    "float32": (False, {}, False),
    "float32, 8-bit moments": (False, {"state_bits": 8}, False),
    "float32, 8-bit moments, gradient release": (False, {"state_bits": 8}, True),
    "bfloat16, bfloat16 moments": (True, {}, False),
    "bfloat16, 32-bit weights and moments": (True, {"master_weight_bits": 32}, False),
    "bfloat16, 24-bit weights, 8-bit moments": (True, {"master_weight_bits": 24, "state_bits": 8}, False),
    "bfloat16, 24-bit weights, 8-bit moments, gradient release": (
        True,
        {"master_weight_bits": 24, "state_bits": 8},
        True,
    ),
}
CARDS = (8, 12, 16, 24, 48, 80)  # GB
SHARE = 2 / 3  # of a card's memory for weights, gradients and state; the rest is for activations
BLOCK = 128  # elements of 8-bit moments that share 12 bytes of scales


def bytes_per_parameter(bfloat16: bool, options: dict, release: bool) -> float:
    """Bytes of weights, gradients and optimizer state for each parameter of a matrix with long rows."""
    weight = 2.0 if bfloat16 else 4.0
    gradient = 0.0 if release else weight
    bits = options.get("master_weight_bits")
    correction = (bits - 16) / 8 if bits else 0.0
    moment = 4.0 if bits else weight
    moments = 2.0 + 12 / BLOCK if options.get("state_bits") == 8 else 2 * moment
    return weight + gradient + correction + moments


def largest_models() -> str:
    """A Markdown table of the largest model, in billions of parameters, for each setting and card."""
    lines = ["| setting | bytes per parameter | " + " | ".join(f"{card} GB" for card in CARDS) + " |"]
    lines.append("|---|" + "---:|" * (1 + len(CARDS)))
    for name, setting in SETTINGS.items():
        size = bytes_per_parameter(*setting)
        cells = (f"{SHARE * card / size:.2g}" for card in CARDS)
        lines.append(f"| {name} | {size:.1f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measure(name: str, device: str, pipe) -> None:
    """Train three steps with a setting and send the memory that they need, in bytes."""
    bfloat16, options, release = SETTINGS[name]
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig()).to(device)
    if bfloat16:
        to_bfloat16(model)
    parameters = list(model.parameters())
    optimizer = DualAdam(parameters, 1e-4, **options)
    if release:
        release_gradients(model, optimizer)
    tokens = torch.randint(1000, 2000, (1, 8), device=device)
    for _ in range(3):
        model(input_ids=tokens, labels=tokens).loss.backward()
        gradients = sum(p.grad.nbytes for p in parameters if p.grad is not None)
        growth = Growth(device)
        optimizer.step()
        step = growth.bytes()
        optimizer.zero_grad()
    pipe.send(
        {
            "parameters": sum(p.numel() for p in parameters),
            "weights": sum(p.nbytes for p in parameters),
            "gradients": gradients,
            "state": sum(t.nbytes for s in optimizer.state.values() for t in s.values()),
            "step": step,
        }
    )


class Growth:
    """The largest growth of memory in use from here on."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        elif sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
            self.start = _status("VmRSS")

    def bytes(self) -> int | None:
        """The growth; None if it is unknown."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() - self.start
        return max(0, _status("VmHWM") - self.start) if sys.platform == "linux" else None


def _status(key: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure (default: cpu)")
    parser.add_argument("--cards", action="store_true", help="print the largest model for each card")
    args = parser.parse_args()
    if args.cards:
        print(largest_models())
        return
    print("| setting | weights | gradients | state | total | step |\n|---|---:|---:|---:|---:|---:|")
    context = multiprocessing.get_context("spawn")
    for name in SETTINGS:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=measure, args=(name, args.device, sender))
        process.start()
        sender.close()
        try:
            found = receiver.recv()
        except EOFError:
            sys.exit(f"{name}: the process ended without a result")
        process.join()
        sizes = [found[key] / found["parameters"] for key in ("weights", "gradients", "state")]
        step = "–" if found["step"] is None else f"{found['step'] / 2**20:.1f} MiB"
        print(f"| {name} | " + " | ".join(f"{size:.2f}" for size in (*sizes, sum(sizes))) + f" | {step} |", flush=True)
    print(f"\n{found['parameters'] / 1e6:.0f} M parameters")


if __name__ == "__main__":
    main()
