"""Check the CUDA kernel on this machine's GPU, and write what its steps cost into docs/benchmarks.md.

    python scripts/gpu_check.py

Runs the kernel's tests, then `benchmark_step.py` on BERT-base and a model of 1 B parameters: 8 minutes at most. The
table replaces the one between the marks in docs/benchmarks.md.
"""

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
RUNS = {
    "BERT-base": ["--shapes", "bert-base", "--rounds", "31"],
    "BERT-base, bfloat16": ["--shapes", "bert-base", "--dtype", "bfloat16", "--rounds", "31"],
    "BERT-base, float16": ["--shapes", "bert-base", "--dtype", "float16", "--rounds", "31"],
    "1 B": ["--shapes", "1b", "--rounds", "15"],
}
TESTS = ["tests/core/test_kernels_triton.py", "tests/core/test_kernels_compiled.py", "tests/core/test_plan.py"]


def table(results: dict[str, dict]) -> str:
    """The results as Markdown, with the card's name and the command of each line."""
    card = next(iter(results.values()))["machine"]
    lines = [f"{card['device']}, torch {card['torch']}, CUDA {card['cuda']}:", ""]
    lines += [
        "| parameters | options | optimizer | step, ms | ratio to fused AdamW | of copy |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        for row in result["rows"]:
            lines.append(
                f"| {name} | `{' '.join(RUNS[name])}` | {row['optimizer']} | {row['milliseconds']:.2f} | "
                f"{row['ratio']:.2f} | {row['share_of_copy']:.0%} |"
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
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *TESTS], cwd=ROOT, check=True, timeout=deadline - time.monotonic()
    )
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, options in RUNS.items():
            path = Path(folder) / "step.json"
            command = [sys.executable, "scripts/benchmark_step.py", "--device", "cuda", "--only", "kernel"]
            command += [*options, "--json", str(path)]
            subprocess.run(command, cwd=ROOT, check=True, timeout=deadline - time.monotonic())
            results[name] = json.loads(path.read_text())
    write(table(results))
    print(f"{DOCUMENT.relative_to(ROOT)} is up to date.")


if __name__ == "__main__":
    main()
