"""Runs the ``check_*`` functions of a module on two gloo processes, all in one launch.

Starting Python and importing torch and transformers takes longer than all checks of a module together, so a module
is launched once, and each check's outcome is kept. ``python two_processes.py MODULE OUT.json`` imports the module and
forks two processes; started by torchrun, it is one of the two.
"""

import functools
import importlib
import inspect
import json
import os
import socket
import subprocess
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

FOLDER = Path(__file__).parent
WORLD_SIZE = 2


def checks(module: str) -> list[str]:
    """The names of a module's checks, in order, without importing it."""
    lines = (FOLDER / f"{module}.py").read_text().splitlines()
    return [line[4 : line.index("(")] for line in lines if line.startswith("def check_")]


@functools.cache
def outcomes(module: str, launcher: str = "fork", **variables: str) -> dict[str, str]:
    """Launch a module's checks with environment variables; returns "ok" or both processes' errors for each."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "outcomes.json"
        command = [sys.executable, str(FOLDER / "two_processes.py"), module, str(out)]
        if launcher == "torchrun":
            torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(WORLD_SIZE), "--master_port", _port()]
            command[1:1] = torchrun
        paths = [str(FOLDER.parents[1]), os.environ.get("PYTHONPATH", "")]
        settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), **variables}
        done = subprocess.run(
            command, cwd=folder, env={**os.environ, **settings}, capture_output=True, text=True, timeout=500
        )
        results = json.loads(out.read_text()) if out.exists() else {}
    crash = f"not reached; exit status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return {name: results.get(name, crash) for name in checks(module)}


def _port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _work(rank: int, module, out: str, settings: dict[str, str]) -> None:
    """One of the two processes: runs every check and sends its result to the other process."""
    import torch.distributed as dist

    os.environ.update(settings, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD_SIZE))
    dist.init_process_group("gloo", timeout=timedelta(seconds=90))
    results = {}
    with tempfile.TemporaryDirectory() as own:
        shared = [own]
        dist.broadcast_object_list(shared)
        for name in checks(module.__name__):
            folder = Path(shared[0]) / name
            folder.mkdir(exist_ok=True)
            check = getattr(module, name)
            try:
                check(*[folder][: len(inspect.signature(check).parameters)])
                error = ""
            except Exception:
                error = f"process {rank}: {traceback.format_exc()[-5000:]}"
            errors = [None] * WORLD_SIZE
            dist.all_gather_object(errors, error)
            results[name] = "\n".join(filter(None, errors)) or "ok"
            if rank == 0:
                Path(out).write_text(json.dumps(results))
        dist.barrier()
    dist.destroy_process_group()


def main(name: str, out: str) -> None:
    sys.path.insert(0, str(FOLDER))
    module = importlib.import_module(name)
    if "RANK" in os.environ:
        _work(int(os.environ["RANK"]), module, out, {})
        return
    import torch.multiprocessing

    settings = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _port()}
    torch.multiprocessing.start_processes(_work, (module, out, settings), nprocs=WORLD_SIZE, start_method="fork")


if __name__ == "__main__":
    main(*sys.argv[1:])
