"""The requirements of the extras that scripts and parts of the package check; setup.py declares the same table."""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec

_FINETUNE = (
    "datasets",
    "evaluate",
    "filelock",
    "matplotlib",
    "numpy",
    "pillow",
    "pyarrow",
    "pyyaml",
    "safetensors",
    "scikit-learn",
    "scipy",
    "tokenizers",
    "tqdm",
)
REQUIREMENTS = {
    "finetune": _FINETUNE,
    "clm": (*_FINETUNE, "peft", "trl"),
    "compare": (
        *_FINETUNE,
        "hessian-eigenthings>=1.0.0a5",
        "optuna",
        "pandas",
        "psutil",
        "pytorch_optimizer",
        "statsmodels",
        "tabulate",
    ),
}
# Modules that are not named like their package.
_MODULES = {"pillow": "PIL", "pyyaml": "yaml", "scikit-learn": "sklearn"}


def modules(extra: str) -> dict[str, str]:
    """The modules of an extra.

    Args:
        extra: a key of :data:`REQUIREMENTS`.

    Returns:
        The module to import by name of its package.
    """
    packages = [re.split(r"[^\w-]", requirement)[0] for requirement in REQUIREMENTS[extra]]
    return {package: _MODULES.get(package, package.replace("-", "_")) for package in packages}


def require(extra: str) -> None:
    """Check that an extra is installed, without importing any of it.

    Args:
        extra: a key of :data:`REQUIREMENTS`.

    Raises:
        ModuleNotFoundError: names the missing packages and the command that installs them.
    """
    missing = {package: module for package, module in modules(extra).items() if find_spec(module) is None}
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise ModuleNotFoundError(
            f'{", ".join(missing)} {verb} not installed: pip install "hf_dualadam[{extra}]"',
            name=next(iter(missing.values())),
        )


def require_or_exit(extra: str) -> None:
    """Call :func:`require` for a script: a missing extra is one line on stderr and exit status 2."""
    try:
        require(extra)
    except ModuleNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
