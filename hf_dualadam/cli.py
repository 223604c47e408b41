"""Run any script with ``--optim dualadam`` and ``--optim invadam`` registered, or describe the environment.

The script runs as under plain Python, with its own ``__main__`` module, ``sys.argv``, ``sys.path[0]``, exit codes and
tracebacks. The optimizers are also registered in all Python processes that it starts.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import io
import os
import platform
import shutil
import sys
import types
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import torch

import hf_dualadam

from . import kernels, startup
from .extras import require_or_exit
from .optimizers import OPTIMIZERS
from .startup.sitecustomize import RegisterFirst

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "evaluate",
    "peft",
    "trl",
    "deepspeed",
    "triton",
    "numpy",
)

ExceptionHook = Callable[[type[BaseException], BaseException, "types.TracebackType | None"], object]

USAGE = """\
hf-dualadam [--optim NAME [--optim_args ARGS]] SCRIPT.py [ARGS...]    run a script, as python SCRIPT.py does
       hf-dualadam [--optim NAME [--optim_args ARGS]] -m MODULE [ARGS...]    run a module, as python -m MODULE does
       hf-dualadam [--optim NAME [--optim_args ARGS]] COMMAND [ARGS...]      run a command, such as trl or torchrun
       hf-dualadam compare PLAN.yaml    compare optimizers; --help lists its options
       hf-dualadam env                  print versions, paths and kernels, for bug reports"""
DESCRIPTION = """\
Runs an unmodified script with DualAdam and InvAdam registered: a script that reads TrainingArguments
from its command line accepts --optim dualadam and --optim invadam, and timm's train.py accepts
--opt dualadam, also in the Python processes that they start. For a script that sets optim itself, put
--optim before the script."""
EPILOG = """\
python -m hf_dualadam is the same command; with several processes:
accelerate launch -m hf_dualadam SCRIPT.py [ARGS...]"""


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``hf-dualadam`` and ``python -m hf_dualadam``.

    Args:
        argv: the command line without the program's name; ``sys.argv[1:]`` by default.
    """
    parser = argparse.ArgumentParser(
        prog="hf-dualadam",
        usage=USAGE,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"hf_dualadam {hf_dualadam.__version__}")
    parser.add_argument("-m", dest="module", action="store_true", help="the target is the name of a module")
    parser.add_argument("--optim", help="optimizer that replaces the one the script sets in its TrainingArguments")
    parser.add_argument("--optim_args", help="its options, key=value,key=value; only with --optim")
    parser.add_argument(
        "target", help="script, module or command; compare and env are subcommands (./env is a script)"
    )
    own, rest = _split(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(own)
    problem = _problem(args.optim, args.optim_args)
    if problem is not None:
        parser.error(problem)
    if args.optim is not None and not args.module and args.target in ("compare", "env"):
        parser.error(f"--optim is for scripts, not for {args.target}")
    startup.reach_children(os.environ, args.optim, args.optim_args)
    if args.module:
        run_module(args.target, rest)
    elif args.target == "compare":
        require_or_exit("compare")
        from .lab.compare import run_command

        sys.argv[0] = "hf-dualadam compare"
        run_command(rest)
    elif args.target == "env":
        if rest:
            parser.error(f"env takes no arguments, got {' '.join(rest)}")
        print(describe_environment())
    elif _is_command(args.target):
        os.execvp(args.target, [args.target, *rest])
    else:
        run_script(args.target, rest)


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Split the command line into the launcher's arguments, including the target, and those of the target."""
    end = 0
    while end < len(argv) and argv[end].startswith("-"):
        end += 2 if argv[end] in ("--optim", "--optim_args") else 1
    return argv[: end + 1], argv[end + 1 :]


def _problem(optim: str | None, optim_args: str | None) -> str | None:
    """Check --optim and --optim_args before the script is started."""
    if optim is None:
        return None if optim_args is None else "--optim_args needs --optim"
    try:
        from transformers.training_args import OptimizerNames

        from .trainer import parse_optim_args
    except ModuleNotFoundError as error:
        return f"--optim needs {error.name}, which is not installed"
    names = [name.value for name in OptimizerNames]
    if optim not in names:
        others = sorted(set(names) - OPTIMIZERS.keys())
        return f"Invalid --optim: {optim} - should be one of {', '.join([*OPTIMIZERS, *others])}."
    if optim in OPTIMIZERS:
        try:
            parse_optim_args(optim_args, OPTIMIZERS[optim])
        except ValueError as error:
            return str(error)
    return None


def _is_command(target: str) -> bool:
    """Whether the target is the name of a program, such as torchrun, and not a file."""
    return os.path.basename(target) == target and not os.path.exists(target) and shutil.which(target) is not None


def run_script(path: str, args: list[str]) -> None:
    """Run a file as ``python PATH ARGS...`` would.

    Args:
        path: the script.
        args: its arguments.

    Raises:
        SystemExit: the script exits, or the file cannot be read (status 2, as in Python).
    """
    full_path = os.path.abspath(path)
    try:
        with io.open_code(full_path) as file:
            source = file.read()
    except OSError as error:
        print(f"hf-dualadam: can't open file {full_path!r}: [Errno {error.errno}] {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None
    _set_first_path(os.path.dirname(os.path.realpath(full_path)))
    namespace = {
        "__file__": full_path,
        "__cached__": None,
        "__loader__": SourceFileLoader("__main__", full_path),
        "__package__": None,
        "__spec__": None,
    }
    _run_as_main(source, [path, *args], namespace)


def run_module(name: str, args: list[str]) -> None:
    """Run a module or package as ``python -m NAME ARGS...`` would.

    Args:
        name: dotted name.
        args: its arguments.

    Raises:
        SystemExit: the module exits, or there is none that can be run (status 1, as in Python).
    """
    _set_first_path(os.getcwd())
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except ImportError as error:
        sys.exit(f"{sys.executable}: Error while finding module specification for {name!r} ({error})")
    if spec is None or spec.origin is None:
        sys.exit(f"{sys.executable}: No module named {name}, or it is a package that cannot be directly executed")
    loader: Any = spec.loader
    code = loader.get_code(spec.name)
    namespace = {
        "__file__": spec.origin,
        "__cached__": spec.cached,
        "__loader__": spec.loader,
        "__package__": spec.parent,
        "__spec__": spec,
    }
    _run_as_main(code, [spec.origin, *args], namespace)


def _run_as_main(code: bytes | types.CodeType, argv: list[str], namespace: dict[str, Any]) -> None:
    """Execute source or code as the ``__main__`` module of this process.

    ``runpy`` would remove the module from ``sys.modules`` when the code ends, before exit handlers and threads have
    finished.
    """
    module = types.ModuleType("__main__")
    module.__dict__.update(namespace)
    sys.modules["__main__"] = module
    sys.argv = argv
    sys.meta_path.insert(0, RegisterFirst())  # for timm
    if startup.OPTIM in os.environ:
        hf_dualadam.register()  # again, now that it is set
    sys.excepthook = _hide_own_frames(sys.excepthook)
    if isinstance(code, bytes):
        code = compile(code, namespace["__file__"], "exec", dont_inherit=True)
    exec(code, module.__dict__)


def _hide_own_frames(hook: ExceptionHook) -> ExceptionHook:
    """An exception hook that shows tracebacks from the script's first line on, as plain Python does."""

    def show(kind: type[BaseException], error: BaseException, traceback: types.TracebackType | None) -> None:
        frame = traceback
        while frame is not None and frame.tb_frame.f_code is not _run_as_main.__code__:
            frame = frame.tb_next
        if frame is not None:
            traceback = frame.tb_next
        hook(kind, error.with_traceback(traceback), traceback)

    return show


def _set_first_path(folder: str) -> None:
    """Replace the folder of this command in ``sys.path`` by the target's; with -P and -I, it is not there."""
    if not getattr(sys.flags, "safe_path", sys.flags.isolated):
        sys.path[0] = folder


def describe_environment() -> str:
    """Versions, paths and kernels of this process, one per line, for bug reports."""
    lines = {
        "hf_dualadam": f"{hf_dualadam.__version__} ({Path(hf_dualadam.__file__).parent})",
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
    }
    for name in PACKAGES:
        try:
            lines[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            lines[name] = "not installed"
    lines["torch threads"] = str(torch.get_num_threads())
    for index in range(torch.cuda.device_count()):
        lines[f"cuda:{index}"] = f"{torch.cuda.get_device_name(index)}, CUDA {torch.version.cuda}"
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        optimizer = hf_dualadam.DualAdam([torch.zeros(1, device=device)])
        group = optimizer.param_groups[0]
        reason = kernels.unavailable_reason(group["params"][0], group)
        lines[f"{device} kernel"] = "active" if reason is None else f"inactive: {reason}"
    width = max(map(len, lines))
    return "\n".join(f"{name:{width}}  {value}" for name, value in lines.items())
