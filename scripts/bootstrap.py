"""Create a virtual environment with pinned versions in it, and run a quickstart or the tests.

    python scripts/bootstrap.py quickstart          fine-tune MiniLM on bundled text, without the Hub
    python scripts/bootstrap.py quickstart vision   train a small ViT on bundled images
    python scripts/bootstrap.py quickstart clm      train a small language model from scratch
    python scripts/bootstrap.py test                check style and types, then run all tests

Needs only Python 3.10 to 3.13. Installs into .venv in the root of the repository, and reinstalls only when the pinned
versions, the requirements or the kernel's source have changed. With --transformers4, or on Python 3.10, it installs
Transformers 4.57 (into .venv-transformers4) instead of the newest 5.x.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
QUALITY = (("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",))  # the Makefile's `quality`
QUICKSTARTS = {"glue": "run_glue.py", "vision": "run_image_classification.py", "clm": "run_clm.py"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transformers4", action="store_true", help="use Transformers 4.57")
    jobs = parser.add_subparsers(dest="job", required=True)
    quickstart = jobs.add_parser("quickstart", help="train on bundled data")
    quickstart.add_argument("which", nargs="?", choices=QUICKSTARTS, default="glue")
    tests = jobs.add_parser("test", help="check style and types, run all tests")
    tests.add_argument("pytest_args", nargs=argparse.REMAINDER, help="passed to pytest")
    args = parser.parse_args()
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        parser.error(f"Python {sys.version.split()[0]} is not supported - should be 3.10 to 3.13.")
    transformers4 = args.transformers4 or sys.version_info[:2] == (3, 10)
    if args.job == "quickstart":
        python = prepare("clm,quickstart" if args.which == "clm" else "quickstart", transformers4)
        config = ROOT / "configs" / "quickstart" / f"{args.which}.yaml"
        return run(python, ROOT / "scripts" / QUICKSTARTS[args.which], config)
    python = prepare("test", transformers4)
    if not args.pytest_args:
        for command in QUALITY:
            if run(python, "-m", *command):
                return 1
    return run(python, "-m", "pytest", "-n", "2", "--dist", "loadfile", *args.pytest_args)


def prepare(extras: str, transformers4: bool) -> Path:
    """Make the virtual environment and install the package with ``extras``; return its Python."""
    folder = ROOT / (".venv-transformers4" if transformers4 else ".venv")
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    constraints = ROOT / ".ci" / ("constraints-transformers4.txt" if transformers4 else "constraints.txt")
    package = ROOT / "hf_dualadam"
    sources = [constraints, ROOT / "setup.py", package / "extras.py", *sorted((package / "kernels").glob("*.[ch]"))]
    wanted = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest() + " " + extras
    stamp = folder / "installed.txt"
    done = stamp.read_text().splitlines() if stamp.exists() else []
    if wanted not in done:
        print(f"Installing into {folder.name}, which takes a few minutes the first time ...", flush=True)
        if not python.exists():
            venv.create(folder, with_pip=True)
        install = [python, "-m", "pip", "install", "--quiet", "--constraint", constraints]
        # torch first: pip keeps an installed torch, where a requirement would otherwise select a larger build.
        for requirement in (["torch"], ["--editable", f"{ROOT}[{extras}]"]):
            subprocess.run([*install, *requirement], check=True)
        stamp.write_text("\n".join([*done, wanted]))
    return python


def run(python: Path, *command) -> int:
    """Run a command of the virtual environment in the repository, without access to the Hub."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run([python, *command], cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
