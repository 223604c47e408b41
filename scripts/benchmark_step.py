"""Time the steps of optimizers against each other on one machine; print a table and write JSON.

    python scripts/benchmark_step.py --shapes minilm
    python scripts/benchmark_step.py --shapes bert-base --device cuda --dtype bfloat16 --json step.json
    python scripts/benchmark_step.py --shapes path/to/config.json --threads 1
    python scripts/benchmark_step.py --state_bits 8 --only kernel
    python scripts/benchmark_step.py --dtype bfloat16 --state_bits 8 --master_weight_bits 24 --baseline_dtype float32
    python scripts/benchmark_step.py --scaling scaling.png --json scaling.json
    python scripts/benchmark_step.py --device cuda --host-only

In every round, each optimizer takes one step and a large tensor is copied. A ratio is the median over rounds of the
time divided by that of fused AdamW in the same round. All optimizers share parameters, gradients and moments. On a
GPU, a step's time is that of the device alone, unless the step waits for it or the host needs more than 25 ms; in
training, too, the host runs ahead of the device.

- params/s: parameters updated per second, at the median time.
- bandwidth: the bytes that a step must move (read p, g, m, v; write p, m, v) per second, and as a percentage of the
  bandwidth of the copy, reading and writing.
- state: bytes of an optimizer's state per parameter.
- memory: peak memory of a step above what is allocated before it.
- first step: includes creating the moments, and loading or compiling a kernel.
- with the host (on a GPU): the time of a step when the host waits for the device before and after it.

Below the table: the cost of a training log relative to a step, as a median ratio of times and as the ratio of the
smallest processor times, which other processes affect less (with ``--threads 1``; idle threads wait actively).

An optimizer whose temporary tensors would not fit into memory is skipped and listed.
"""

import argparse
import ctypes
import importlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hf_dualadam
from hf_dualadam import DualAdam
from hf_dualadam.diagnostics import inverse_statistics
from hf_dualadam.extras import require_or_exit

MODELS = {  # the shapes come from the configuration; no weights are created
    "minilm": ("bert", {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}),
    "bert-base": ("bert", {}),
    "1b": ("llama", {"hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 7424, "vocab_size": 32000}),
}
LISTS = {"many-small": [(1000,)] * 2000, "one-large": [(97_656, 1_024)]}
HOST_TENSORS = (199, 2_000, 10_000)  # BERT-base has 199
SCALING = [round(10 ** (exponent / 2)) for exponent in range(12, 19)]  # 1 M to 1 B
SCALING_TENSOR = 1_000_000
BASELINE = "AdamW, fused"
COPY = "copy"
COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}
AHEAD = 50_000_000  # cycles of the device, 25 ms or more: the host's head start
MOMENTS = ("exp_avg", "exp_avg_sq")
PHASES = {
    "before the switch": {"switch_rate": 1e-7},
    "after the switch": {"switch_rate": 1.0},
    "normalized": {"switch_rate": 1e-7, "normalize_inverse": True},
}
# Optimizers of others with 8-bit moments, by module.
EIGHT_BIT_PEERS = {"bitsandbytes.optim": "AdamW8bit", "torchao.optim": "AdamW8bit", "flashoptim": "FlashAdamW"}
OURS = [f"DualAdam, kernel, {phase}" for phase in PHASES]


def contenders(formats: dict[str, Any]) -> dict[str, tuple[Callable, int]]:
    """The optimizers to compare: how to build each, and how many copies of all parameters its temporaries take.

    Args:
        formats: DualAdam's ``state_bits`` and ``master_weight_bits``; with 8 bits, others' 8-bit optimizers are
            compared too, if they are installed.
    """
    paths = {"kernel": ({"fused": True}, 0), "foreach": ({"foreach": True}, 4), "for-loop": ({"foreach": False}, 0)}
    table = {}
    for path, (chosen, copies) in paths.items():
        for phase, options in PHASES.items():
            table[f"DualAdam, {path}, {phase}"] = (_builder(DualAdam, **chosen, **options, **formats), copies)
    table[BASELINE] = (_builder(torch.optim.AdamW, fused=True), 0)
    table["AdamW, foreach"] = (_builder(torch.optim.AdamW, foreach=True), 2)
    table["AdamW, for-loop"] = (_builder(torch.optim.AdamW, foreach=False), 0)
    if (peer := _imported("pytorch_optimizer")) is not None:
        for phase in ("before the switch", "after the switch"):
            build = _builder(peer.DualAdam, weight_decouple=True, **PHASES[phase])
            table[f"pytorch_optimizer's DualAdam, {phase}"] = (build, 4)
    if formats.get("state_bits") == 8:
        for module, optimizer in EIGHT_BIT_PEERS.items():
            if (peer := _imported(module)) is not None:
                options = {"master_weight_bits": formats["master_weight_bits"]} if module == "flashoptim" else {}
                table[f"{module.partition('.')[0]}'s {optimizer}"] = (_builder(getattr(peer, optimizer), **options), 4)
    return table


def _imported(module: str) -> Any:
    """An optional module, or None."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def _builder(optimizer_cls: type, **options) -> Callable:
    return lambda params: optimizer_cls(params, lr=1e-5, weight_decay=0.01, **options)


def shapes_of(name: str) -> list[tuple[int, ...]]:
    """The shapes of the parameters of a named list, a named model, or a model whose configuration is at a path."""
    if name in LISTS:
        return LISTS[name]
    from transformers import AutoConfig, AutoModel

    if name in MODELS:
        model_type, options = MODELS[name]
        config = AutoConfig.for_model(model_type, **options)
    elif Path(name).exists():
        config = AutoConfig.from_pretrained(name)
    else:
        raise SystemExit(f"Invalid --shapes: {name} - should be {', '.join([*MODELS, *LISTS])} or an existing path.")
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    return [tuple(p.shape) for p in model.parameters()]


class Machine:
    """Times and measures memory on one device."""

    def __init__(self, device: str):
        """Check that the device is available."""
        if device == "cuda" and not torch.cuda.is_available():
            raise SystemExit("Invalid --device: cuda - torch finds no GPU.")
        self.device = device

    def seconds(self, function: Callable[[], object]) -> float:
        """Time one call, on the GPU until it is done."""
        self._wait()
        start = time.perf_counter()
        function()
        self._wait()
        return time.perf_counter() - start

    def device_seconds(self, function: Callable[[], object]) -> float:
        """The same, but on a GPU without the host's work, which is done while the device is kept busy."""
        if self.device == "cpu":
            return self.seconds(function)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._wait()
        torch.cuda._sleep(AHEAD)
        start.record()
        function()
        end.record()
        self._wait()
        return start.elapsed_time(end) / 1e3

    def seconds_and_processor_seconds(self, function: Callable[[], object]) -> tuple[float, float]:
        """The same, and the processor time of this process, which other processes affect little."""
        start = time.process_time()
        seconds = self.seconds(function)
        return seconds, time.process_time() - start

    def extra_bytes(self, function: Callable[[], object]) -> int | None:
        """Peak memory during a call, above what was in use before; None if the system does not report it."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.seconds(function)
            return torch.cuda.max_memory_allocated() - before
        try:
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is in use
        except OSError:
            return None
        before = _proc_bytes("/proc/self/status", "VmHWM")
        function()
        return _proc_bytes("/proc/self/status", "VmHWM") - before

    def free_bytes(self) -> int | None:
        """Free memory; None if the system does not report it."""
        if self.device == "cuda":
            return torch.cuda.mem_get_info()[0]
        return _proc_bytes("/proc/meminfo", "MemAvailable")

    def trim(self) -> None:
        """Return cached memory to the system."""
        if self.device == "cuda":
            torch.cuda.empty_cache()
        elif platform.libc_ver()[0] == "glibc":
            ctypes.CDLL(None).malloc_trim(0)

    def describe(self) -> dict:
        """Machine and versions, for the record."""
        versions = {
            "torch": torch.__version__,
            "hf_dualadam": hf_dualadam.__version__,
            "python": platform.python_version(),
        }
        if self.device == "cuda":
            return {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, **versions}
        cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        names = [line.split(":")[1].strip() for line in cpu.splitlines() if line.startswith("model name")]
        name = names[0] if names else platform.processor()
        return {"device": f"{name}, {os.cpu_count()} cores", "threads": torch.get_num_threads(), **versions}

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def _proc_bytes(path: str, key: str) -> int | None:
    if not Path(path).exists():
        return None
    line = next(line for line in Path(path).read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def build_all(
    table: dict[str, tuple[Callable, int]], params: list[Tensor], baseline_params: list[Tensor], machine: Machine
) -> tuple[dict, dict[str, float], dict[str, str]]:
    """Build optimizers that share their moments, so that only one set of moments has to fit into memory.

    Args:
        table: what :func:`contenders` returns, or part of it.
        params: the parameters.
        baseline_params: those of fused AdamW.
        machine: where they are.

    Returns:
        The optimizers, the seconds that the first step of each took, and why others were left out.
    """
    optimizers, first_steps, left_out = {}, {}, {}
    moments: dict[Any, Tensor] = {}
    size = sum(p.numel() * p.element_size() for p in params)
    for name, (build, copies) in table.items():
        needed, free = size * (copies + 2), machine.free_bytes()
        if free is not None and needed > 0.9 * free:
            left_out[name] = f"needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
            continue
        own_params = baseline_params if name == BASELINE else params
        try:
            optimizer = build(own_params)
            first_steps[name] = machine.seconds(optimizer.step)
        except (ValueError, RuntimeError, NotImplementedError, AssertionError) as error:
            left_out[name] = str(error).partition("\n")[0]
            continue
        for i, p in enumerate(own_params):
            state = optimizer.state[p]
            for key in MOMENTS:
                moment = state.get(key)
                if type(moment) is Tensor:  # not a subclass that hides codes and scales
                    state[key] = moments.setdefault((i, key, moment.dtype), moment)
        machine.trim()
        optimizers[name] = optimizer
    return optimizers, first_steps, left_out


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in an optimizer's state."""

    def size(value: Any) -> int:
        if not isinstance(value, Tensor):
            return 0
        if hasattr(value, "__tensor_flatten__"):
            return sum(size(getattr(value, name)) for name in value.__tensor_flatten__()[0])
        return value.nbytes

    return sum(size(value) for state in optimizer.state.values() for value in state.values())


def benchmark(
    shapes: list[tuple[int, ...]],
    table: dict[str, tuple[Callable, int]],
    machine: Machine,
    dtype: torch.dtype,
    rounds: int,
    baseline_dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Measure time and memory of a step of each optimizer on tensors of these shapes.

    Args:
        shapes: of the parameters.
        table: what :func:`contenders` returns, or part of it.
        machine: where to measure.
        dtype: of the parameters.
        rounds: steps of each optimizer.
        baseline_dtype: of the parameters of fused AdamW. Default: ``dtype``.
    """
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, device=machine.device).to(dtype)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    baseline_params = params
    if baseline_dtype not in (None, dtype):
        baseline_params = [torch.nn.Parameter(p.detach().to(baseline_dtype)) for p in params]
        for p, copy in zip(params, baseline_params):
            copy.grad = p.grad.to(baseline_dtype)
    optimizers, first_steps, left_out = build_all(table, params, baseline_params, machine)
    source = torch.ones(COPY_BYTES[machine.device], dtype=torch.uint8, device=machine.device)
    target = torch.zeros_like(source)
    actions = {COPY: lambda: target.copy_(source)} | {name: opt.step for name, opt in optimizers.items()}
    times: dict[str, list[float]] = {name: [] for name in actions}
    waited: dict[str, list[float]] = {name: [] for name in actions}
    for i in range(-2, rounds):  # two rounds of warm-up; the order rotates from round to round
        for name in [*actions][i % len(actions) :] + [*actions][: i % len(actions)]:
            seconds = machine.device_seconds(actions[name])
            if i >= 0:
                times[name].append(seconds)
                if machine.device != "cpu":
                    waited[name].append(machine.seconds(actions[name]))
    copied = 2 * source.nbytes / statistics.median(times.pop(COPY))
    numel = sum(p.numel() for p in params)
    rows = []
    for name, seconds in times.items():
        median = statistics.median(seconds)
        state = state_bytes(optimizers[name])
        moved = 2 * state + sum(
            3 * p.numel() * p.element_size() for p in (baseline_params if name == BASELINE else params)
        )
        rows.append(
            {
                "optimizer": name,
                "milliseconds": median * 1e3,
                "ratio": _ratio(seconds, times[BASELINE]),
                "parameters_per_second": numel / median,
                "bytes_per_second": moved / median,
                "share_of_copy": moved / median / copied,
                "state_bytes_per_parameter": state / numel,
                "extra_bytes": machine.extra_bytes(optimizers[name].step),
                "first_step_seconds": first_steps[name],
            }
        )
        if waited[name]:
            rows[-1]["waited_milliseconds"] = statistics.median(waited[name]) * 1e3
            rows[-1]["waited_ratio"] = _ratio(waited[name], waited[BASELINE])
    ours = next((name for name in times if isinstance(optimizers[name], DualAdam)), None)
    figures = None
    if ours is not None:  # the measurement for a training log, relative to a step
        both_actions = lambda: inverse_statistics(optimizers[ours]), optimizers[ours].step
        both = [[machine.seconds_and_processor_seconds(action) for action in both_actions] for _ in range(rounds)]
        figures = {
            "optimizer": ours,
            "milliseconds": statistics.median(log[0] for log, _ in both) * 1e3,
            "ratio": statistics.median(log[0] / step[0] for log, step in both),
            "processor_ratio": min(log[1] for log, _ in both) / min(step[1] for _, step in both),
        }
    return {
        "parameters": numel,
        "tensors": len(params),
        "copy_bytes_per_second": copied,
        "figures": figures,
        "rows": rows,
        "left_out": left_out,
    }


def _ratio(times: list[float], base: list[float]) -> float:
    return statistics.median(own / other for own, other in zip(times, base))


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    columns = ["optimizer", "step, ms", "ratio to fused AdamW", "params/s"]
    columns += ["bandwidth, GB/s", "of copy", "state, bytes", "memory, MiB", "first step, s"]
    columns += ["with the host, ms", "ratio"] if "waited_ratio" in result["rows"][0] else []
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in result["rows"]:
        memory = "?" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 2**20:.2f}"
        lines.append(
            f"| {row['optimizer']} | {row['milliseconds']:.2f} | {row['ratio']:.2f} | "
            f"{row['parameters_per_second']:.2e} | {row['bytes_per_second'] / 1e9:.1f} | {row['share_of_copy']:.0%} | "
            f"{row['state_bytes_per_parameter']:.2f} | {memory} | {row['first_step_seconds']:.2f} |"
        )
        if "waited_ratio" in row:
            lines[-1] += f" {row['waited_milliseconds']:.2f} | {row['waited_ratio']:.2f} |"
    if result["figures"] is not None:
        figures = result["figures"]
        lines.append(
            f"\nA training log: {figures['milliseconds']:.2f} ms, {figures['ratio']:.2f} of a step, "
            f"{figures['processor_ratio']:.2f} of its processor time ({figures['optimizer']})"
        )
    lines += [f"\nLeft out: {name}: {reason}" for name, reason in result["left_out"].items()]
    return "\n".join(lines)


def scaling(
    path: Path, contending: dict[str, tuple[Callable, int]], machine: Machine, dtype: torch.dtype, rounds: int
) -> list[dict[str, Any]]:
    """Time lists of tensors of increasing size, as far as memory allows, and plot times and ratios."""
    results = []
    for numel in SCALING:
        needed, free = 4 * numel * dtype.itemsize + 2 * COPY_BYTES[machine.device], machine.free_bytes()
        if free is not None and needed > 0.9 * free:
            print(
                f"{numel:.1e} parameters left out: they need {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
            )
            break
        shapes = [(SCALING_TENSOR,)] * (numel // SCALING_TENSOR) + [(numel % SCALING_TENSOR,)]
        results.append(
            benchmark(shapes, {name: contending[name] for name in [*OURS, BASELINE]}, machine, dtype, rounds)
        )
        print(f"\n{numel:.1e} parameters\n\n{table(results[-1])}")
        machine.trim()

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (times, ratios) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    sizes = [result["parameters"] for result in results]
    for i, name in enumerate([*OURS, BASELINE]):
        rows = [result["rows"][i] for result in results]
        times.loglog(sizes, [row["milliseconds"] for row in rows], marker="o", label=name)
        ratios.semilogx(sizes, [row["ratio"] for row in rows], marker="o", label=name)
    times.set(xlabel="parameters", ylabel="step, ms")
    ratios.set(xlabel="parameters", ylabel="ratio to fused AdamW", ylim=(0, None))
    times.legend()
    figure.suptitle(machine.describe()["device"])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return results


def host_times(rounds: int) -> list[dict[str, Any]]:
    """Time what the host does in a step on the CUDA path: one-element tensors, kernels compiled but not launched."""
    from hf_dualadam.kernels.dry_run import cuda_path_on_the_cpu

    rows = []
    with cuda_path_on_the_cpu():
        for n in HOST_TENSORS:
            params = [torch.nn.Parameter(torch.zeros(1)) for _ in range(n)]
            for p in params:
                p.grad = torch.zeros(1)
            optimizers = [DualAdam(params), torch.optim.AdamW(params, fused=True)]
            times: list[list[float]] = [[], []]
            for i in range(-2, max(rounds, 20_000 // n)):
                for optimizer, own in zip(optimizers, times):
                    start = time.perf_counter()
                    optimizer.step()
                    if i >= 0:
                        own.append(time.perf_counter() - start)
            ours, base = map(statistics.median, times)
            rows.append(
                {"tensors": n, "milliseconds": ours * 1e3, "adamw_milliseconds": base * 1e3, "ratio": ours / base}
            )
    return rows


def host_table(rows: list[dict[str, Any]]) -> str:
    """Times of the host as a Markdown table."""
    lines = ["| tensors | DualAdam, CUDA path, ms | fused AdamW, one-element tensors on the CPU, ms | ratio |"]
    lines.append("|---|---|---|---|")
    for row in rows:
        numbers = f"{row['milliseconds']:.3f} | {row['adamw_milliseconds']:.3f} | {row['ratio']:.2f}"
        lines.append(f"| {row['tensors']:,} | {numbers} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="minilm", help=f"{', '.join([*MODELS, *LISTS])} or a model configuration")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "float64", "bfloat16", "float16"], default="float32")
    parser.add_argument("--state_bits", type=int, choices=[32, 8], default=32, help="of DualAdam's moments")
    parser.add_argument("--master_weight_bits", type=int, choices=[24, 32], help="of DualAdam's weights")
    parser.add_argument(
        "--baseline_dtype", choices=["float32", "bfloat16"], help="parameters of fused AdamW; default: as --dtype"
    )
    parser.add_argument("--threads", type=int, help="CPU threads; default: as torch chooses")
    parser.add_argument("--rounds", type=int, default=21, help="steps of each optimizer; default 21")
    parser.add_argument("--only", default="", metavar="TEXT", help="time only fused AdamW and names that contain TEXT")
    parser.add_argument("--scaling", type=Path, metavar="PNG", help="time 1 M to 1 B parameters instead, and plot")
    parser.add_argument("--host-only", action="store_true", help="time the host's part of a step; needs no GPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the measurements to FILE")
    args = parser.parse_args()
    for name in ("threads", "rounds"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"Invalid --{name}: {getattr(args, name)} - should be 1 or more.")
    if args.host_only and args.device != "cuda":
        parser.error("Invalid --host-only: only for --device cuda - the host does all of a step on the CPU.")
    if args.scaling:
        require_or_exit("finetune")  # it plots
    return args


def main() -> None:
    args = parse()
    machine = Machine("cpu" if args.host_only else args.device)
    dtype = getattr(torch, args.dtype)
    if args.threads:
        torch.set_num_threads(args.threads)
    formats = {"state_bits": args.state_bits, "master_weight_bits": args.master_weight_bits}
    contending = contenders(formats)
    record = {"machine": machine.describe(), "dtype": args.dtype, "rounds": args.rounds, **formats}
    print(", ".join(f"{name} {value}" for name, value in record["machine"].items()))
    if args.host_only:
        record["host"] = host_times(args.rounds)
        print(f"\n{host_table(record['host'])}")
    elif args.scaling:
        record["scaling"] = scaling(args.scaling, contending, machine, dtype, args.rounds)
    else:
        chosen = {name: own for name, own in contending.items() if args.only in name or name == BASELINE}
        baseline_dtype = getattr(torch, args.baseline_dtype or args.dtype)
        result = benchmark(shapes_of(args.shapes), chosen, machine, dtype, args.rounds, baseline_dtype)
        record |= {"shapes": args.shapes, **result}
        size = f"{result['parameters'] / 1e6:.1f} M parameters in {result['tensors']} tensors"
        copy = f"copy {result['copy_bytes_per_second'] / 1e9:.1f} GB/s"
        print(f"{args.shapes}, {args.dtype}: {size}; {copy}; medians of {args.rounds} rounds\n\n{table(result)}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
