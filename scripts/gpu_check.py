"""Check the CUDA kernel on this machine's GPU, and write what its steps cost into docs/benchmarks.md.

    python scripts/gpu_check.py

Runs the tests of the optimizers and of Trainer on the GPU, then `benchmark_step.py` on BERT-base, on a model of 1 B
parameters and on many small tensors: 8 minutes at most. The table replaces the one between the marks in
docs/benchmarks.md.
"""

import functools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- gpu-check -->", "<!-- /gpu-check -->"
SECONDS = 8 * 60
BENCHMARK = "scripts/benchmark_step.py --device cuda --only kernel --rounds 15"
RUNS = [
    "--shapes bert-base",
    "--shapes bert-base --dtype bfloat16",
    "--shapes bert-base --dtype float16",
    "--shapes bert-base --state_bits 8",
    "--shapes 1b",
    "--shapes 1b --dtype bfloat16 --state_bits 8 --master_weight_bits 24 --baseline_dtype float32",
    "--shapes many-small",
]
TESTS = ["tests/core", "tests/trainer/test_trainer_on_a_gpu.py"]


def table(results: list[dict]) -> str:
    """The results as Markdown, with the card's name and the command of each line."""
    card = results[0]["machine"]
    lines = [
        f"{card['device']}, torch {card['torch']}, CUDA {card['cuda']}; `python {BENCHMARK}` with the options:",
        "",
        "| options | optimizer | step, ms | ratio to fused AdamW | of copy | with the host, ms | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for options, result in zip(RUNS, results):
        for row in result["rows"]:
            lines.append(
                f"| `{options}` | {row['optimizer']} | {row['milliseconds']:.2f} | {row['ratio']:.2f} | "
                f"{row['share_of_copy']:.0%} | {row['waited_milliseconds']:.2f} | {row['waited_ratio']:.2f} |"
            )
    return "\n".join(lines)


def write(text: str) -> None:
    """Put the table between the marks of the document."""
    document = DOCUMENT.read_text()
    if document.count(BEGIN) != 1 or document.count(END) != 1:
        raise SystemExit(f"Invalid {DOCUMENT}: should have one line {BEGIN} and one line {END}.")
    head, rest = document.split(BEGIN)
    DOCUMENT.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}")


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here, so there is nothing to check.")
    deadline = time.monotonic() + SECONDS
    run = functools.partial(subprocess.run, cwd=ROOT)
    tests = ["-q", "-n", "auto", "--maxprocesses", "8", "--dist", "loadfile", *TESTS]
    tested = run([sys.executable, "-m", "pytest", *tests], timeout=deadline - time.monotonic())
    results = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.json"
        for options in RUNS:
            command = [sys.executable, *BENCHMARK.split(), *options.split(), "--json", str(path)]
            run(command, check=True, timeout=deadline - time.monotonic())
            results.append(json.loads(path.read_text()))
    write(table(results))
    print(f"{DOCUMENT.relative_to(ROOT)} is up to date.")
    if tested.returncode:
        raise SystemExit("Tests have failed, see above.")


if __name__ == "__main__":
    main()
