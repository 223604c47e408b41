"""Name the extra to install when a part of the package or a script lacks its requirements."""

from __future__ import annotations

import sys
from importlib.util import find_spec

_FINETUNE = (
    "datasets",
    "evaluate",
    "filelock",
    "matplotlib",
    "numpy",
    "PIL",
    "pyarrow",
    "safetensors",
    "scipy",
    "sklearn",
    "tokenizers",
    "tqdm",
    "yaml",
)
# The modules that each extra in setup.py installs.
MODULES = {
    "finetune": _FINETUNE,
    "clm": (*_FINETUNE, "peft", "trl"),
    "compare": (
        *_FINETUNE,
        "hessian_eigenthings",
        "optuna",
        "pandas",
        "psutil",
        "pytorch_optimizer",
        "statsmodels",
        "tabulate",
    ),
}


def require(extra: str) -> None:
    """Check that an extra is installed, without importing any of it.

    Args:
        extra: a key of :data:`MODULES`.

    Raises:
        ModuleNotFoundError: names the missing modules and the command that installs them.
    """
    missing = [name for name in MODULES[extra] if find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise ModuleNotFoundError(
            f'{", ".join(missing)} {verb} not installed: pip install "hf_dualadam[{extra}]"', name=missing[0]
        )


def require_or_exit(extra: str) -> None:
    """Call :func:`require` for a script: a missing extra is one line on stderr and exit status 2."""
    try:
        require(extra)
    except ModuleNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
