"""The definition of a comparison: YAML file -> checked settings -> list of runs."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..finetuning.config import InputError, check_type
from ..finetuning.tasks import KINDS
from .baselines import BASELINES, OptimizerSetting, baseline
from .metric import Metric, known_direction

# Options that a comparison sets; the arguments of a task must not contain them.
RESERVED = ("learning_rate", "optim", "optim_args", "seed", "output_dir")
# Points of the training, as fractions of the steps, at which the inverse share is recorded.
SHARE_POINTS = {"inverse_share_1pct": 0.01, "inverse_share_10pct": 0.1, "inverse_share_50pct": 0.5}
COLUMNS = (
    *("task", "optimizer", "optim_args", "learning_rate", "seed", "role", "steps"),
    *("selection_metric", "selection_loss", "heldout_metric", "heldout_loss", "train_metric", "train_loss"),
    *("gap_metric", "gap_loss", "hessian_top_eigenvalue", "hessian_trace", "ball_sharpness"),
    *(*SHARE_POINTS, "seconds", "peak_memory_mb", "status"),
)

CURVE_COLUMNS = (
    *("task", "optimizer", "learning_rate", "seed", "step"),
    *("loss", "selection_loss", "selection_metric", "alpha", "inverse_share"),
)


@dataclass(frozen=True, kw_only=True)
class TaskSetting:
    """One task of a comparison, of a kind in ``finetuning.tasks``.

    Attributes:
        script: the kind, whose script's arguments these are: "glue" (run_glue.py), "image_classification", "clm".
        arguments: options of the script, including TrainingArguments; ``max_steps`` is required.
        learning_rate: center of the range of Adam's learning rates.
        learning_rates: the rates to try, the same for all optimizers; instead of ``learning_rate``.
        selection_fraction: fraction of the training examples set aside to choose the learning rate.
        label_noise: fraction of the remaining training labels replaced by random classes.
    """

    script: str
    arguments: dict[str, Any]
    learning_rate: float | None = None
    learning_rates: list[float] | None = None
    selection_fraction: float = 0.2
    label_noise: float = 0.0

    def __post_init__(self):
        """Check the ranges."""
        _check_rates(self)
        _check(0 < self.selection_fraction < 1, "selection_fraction", self.selection_fraction, "between 0 and 1")
        _check(0 <= self.label_noise <= 1, "label_noise", self.label_noise, "in [0, 1]")
        _check_reserved(self.arguments)
        max_steps = self.arguments.get("max_steps")
        _check(isinstance(max_steps, int) and max_steps > 0, "max_steps", max_steps, "a whole number above 0")

    @property
    def steps(self) -> int:
        """Optimizer steps of a run with one gradient per step."""
        return self.arguments["max_steps"]


@dataclass(frozen=True, kw_only=True)
class ScriptSetting:
    """One task of a comparison that is a user's Trainer script or an installed module.

    Attributes:
        script: path of the script.
        module: name of a module that runs as ``python -m``; instead of ``script``.
        arguments: arguments of the script apart from the optimizer's options: a list of words, or options by name.
        metric: key of its all_results.json or eval_results.json, or of what its Trainer logs; with or without the
            prefix ``eval_``. It chooses the learning rate.
        heldout_metric: key of the final score, on other data. By default ``metric``: the rate is then chosen on the
            data of the final score.
        greater_is_better: the direction of both; required only if the metric's name does not imply it.
        learning_rate: as for :class:`TaskSetting`; by default that of TrainingArguments.
        learning_rates: as for :class:`TaskSetting`.
    """

    script: str | None = None
    module: str | None = None
    arguments: list[Any] | dict[str, Any] = field(default_factory=list)
    metric: str = "eval_loss"
    heldout_metric: str | None = None
    greater_is_better: bool | None = None
    learning_rate: float | None = None
    learning_rates: list[float] | None = None
    checksum: str = field(init=False, default="")  # of the script's text, so that a changed script has new runs

    label_noise = 0.0  # the comparison does not change the script's data
    steps = None  # known only to the script

    def __post_init__(self):
        """Check that the script exists, and the ranges."""
        if self.learning_rate is None and self.learning_rates is None:
            object.__setattr__(self, "learning_rate", 5e-5)
        _check_rates(self)
        if (self.script is None) == (self.module is None):
            raise InputError("script and module: give one of them")
        if self.script is not None:
            _check(Path(self.script).is_file(), "script", self.script, "the path of a file")
            object.__setattr__(self, "checksum", hashlib.sha256(Path(self.script).read_bytes()).hexdigest())
        else:
            _check(_is_module(self.module), "module", self.module, "the name of an installed module")
        direction = self.greater_is_better if self.greater_is_better is not None else known_direction(self.metric)
        _check(direction is not None, "greater_is_better", None, f"true or false: {self.metric!r} does not imply it")
        _check_reserved(self.arguments)
        self.command_line()

    @property
    def target(self) -> str:
        """The script or module, for messages."""
        return self.script or self.module

    @property
    def scored_by(self) -> Metric:
        """The metric."""
        direction = self.greater_is_better if self.greater_is_better is not None else known_direction(self.metric)
        return Metric(self.metric.removeprefix("eval_"), direction)

    @property
    def curve_columns(self) -> dict[str, tuple[str, ...]]:
        """Columns of the curves, mapped to the names that the script logs during training."""
        columns = {name: (name,) for name in ("loss", "alpha", "inverse_share")}
        return columns | {"selection_loss": ("eval_loss",), "selection_metric": (self.metric, f"eval_{self.metric}")}

    def command_line(self) -> list[str]:
        """The arguments as words.

        ``true`` becomes the option alone. Within a mapping, mappings are written as JSON, and lists as several words.
        """
        if isinstance(self.arguments, list):
            return [str(word) for word in self.arguments]
        words: list[str] = []
        for name, value in self.arguments.items():
            _check(value is not None, f"arguments.{name}", value, "a value; leave the option out instead")
            values = value if isinstance(value, list) else [value]
            texts = [json.dumps(item) if isinstance(item, dict | bool) else str(item) for item in values]
            words += [f"--{name}"] + ([] if value is True else texts)
        return words


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _check_rates(task: TaskSetting | ScriptSetting) -> None:
    if (task.learning_rate is None) == (task.learning_rates is None):
        raise InputError("learning_rate and learning_rates: give one of them")
    if task.learning_rate is not None:
        _check(task.learning_rate > 0, "learning_rate", task.learning_rate, "above 0")
    else:
        rates = task.learning_rates
        different = len(set(rates)) == len(rates) >= 1
        _check(different and min(rates) > 0, "learning_rates", rates, "different numbers above 0")


def _check_reserved(arguments: list[Any] | dict[str, Any]) -> None:
    words = [f"--{name}" for name in arguments] if isinstance(arguments, dict) else map(str, arguments)
    given = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in words if word.startswith("--")}
    if reserved := sorted(given & set(RESERVED)):
        raise InputError(f"arguments: {', '.join(reserved)} - should be left to the comparison")


@dataclass(frozen=True)
class SharpnessSetting:
    """Options for measuring sharpness after each final run.

    Attributes:
        examples: number of training examples, the same for all runs; 0 for no measurement.
        rho: radius of the ball.
        lanczos_steps: Hessian-vector products for the largest eigenvalue.
        trace_samples: Hessian-vector products for the trace.
    """

    examples: int = 64
    rho: float = 0.05
    lanczos_steps: int = 12
    trace_samples: int = 8


@dataclass
class ComparisonArguments:
    """The keys of a comparison's YAML file.

    ``tasks`` maps names to the keys of :class:`TaskSetting` or :class:`ScriptSetting`, ``optimizers`` maps names to
    nothing or to the keys of :class:`OptimizerSetting` (``base`` defaults to the name), ``sharpness`` holds
    :class:`SharpnessSetting`'s keys.
    """

    tasks: dict[str, Any] = field(default_factory=dict, metadata={"help": "Tasks by name (YAML)."})
    optimizers: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Names of optimizers, or settings by name (YAML)."}
    )
    name: str = field(default="comparison", metadata={"help": "Name of the comparison in the storage and the report."})
    question: str = field(
        default="Does DualAdam generalize better than AdamW, and than AdamW with the same warm-up?",
        metadata={"help": "Question of the comparison, shown at the top of the report."},
    )
    num_seeds: int = field(default=5, metadata={"help": "Number of final runs, with the seeds 0, 1, 2, ..."})
    seeds: list[int] = field(
        default_factory=list, metadata={"help": "Seeds of the final runs, at least 2; instead of num_seeds."}
    )
    selection_seeds: list[int] = field(
        default_factory=lambda: [1000], metadata={"help": "Seeds of the runs that choose the learning rate."}
    )
    num_learning_rates: int = field(
        default=3, metadata={"help": "Number of learning rates to try for each optimizer."}
    )
    learning_rate_factor: float = field(default=3.0, metadata={"help": "Ratio of consecutive learning rates."})
    switch_fraction: float = field(
        default=0.16,
        metadata={"help": "Length of the inverse phase and of the control's warm-up, as a fraction of the steps."},
    )
    references: list[str] = field(
        default_factory=list,
        metadata={"help": "Optimizers to compare the others with; by default adamw and the same warm-up."},
    )
    sharpness: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Options for measuring sharpness (YAML)."}
    )


@dataclass(frozen=True)
class RunSpec:
    """One run of a comparison.

    Attributes:
        task: name of the task.
        optimizer: name of the optimizer setting.
        learning_rate: the highest rate of the schedule.
        seed: of weights, data order and dropout.
        role: "selection" or "final".
        digest: short hash of all settings that affect the result.
    """

    task: str
    optimizer: str
    learning_rate: float
    seed: int
    role: str
    digest: str

    @property
    def key(self) -> str:
        """Identifies the run in the storage: equal keys mean equal settings."""
        return f"{self.role} {self.task} {self.optimizer} {self.learning_rate:g} {self.seed} {self.digest}"

    @property
    def slug(self) -> str:
        """The key as a file name."""
        return re.sub(r"[^A-Za-z0-9_.+-]+", "-", self.key)


@dataclass(frozen=True)
class Comparison:
    """A checked comparison; the attributes are those of :class:`ComparisonArguments`, as settings."""

    name: str
    question: str
    tasks: dict[str, TaskSetting | ScriptSetting]
    optimizers: dict[str, OptimizerSetting]
    seeds: list[int]
    selection_seeds: list[int]
    num_learning_rates: int
    learning_rate_factor: float
    references: list[str]
    sharpness: SharpnessSetting

    def learning_rates(self, task: str, optimizer: str) -> list[float]:
        """The learning rates to try in increasing order: the given ones, or around the center of the range."""
        setting = self.tasks[task]
        if setting.learning_rates is not None:
            return sorted(setting.learning_rates)
        center = setting.learning_rate * self.optimizers[optimizer].center
        middle = (self.num_learning_rates - 1) / 2
        exponents = [index - middle for index in range(self.num_learning_rates)]
        return [float(f"{center * self.learning_rate_factor**exponent:.3g}") for exponent in exponents]

    def steps(self, task: str, optimizer: str) -> int | None:
        """Optimizer steps of a run: equal budgets mean an equal number of gradients. None if the script decides."""
        steps = self.tasks[task].steps
        return steps and max(1, steps // self.optimizers[optimizer].baseline.gradients_per_step)

    def run(self, task: str, optimizer: str, learning_rate: float, seed: int, role: str) -> RunSpec:
        """One run with its digest."""
        settings: dict[str, Any] = {
            "task": dataclasses.asdict(self.tasks[task]),
            "optimizer": (self.optimizers[optimizer].base, self.optimizers[optimizer].describe()),
        }
        if role == "final":
            settings["sharpness"] = dataclasses.asdict(self.sharpness)
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:8]
        return RunSpec(task, optimizer, learning_rate, seed, role, digest)

    def selection_runs(self, task: str, optimizer: str) -> list[RunSpec]:
        """The runs that choose the learning rate of one optimizer on one task; none if there is only one rate."""
        rates = self.learning_rates(task, optimizer)
        if len(rates) == 1:
            return []
        return [self.run(task, optimizer, rate, seed, "selection") for rate in rates for seed in self.selection_seeds]

    def final_runs(self, task: str, optimizer: str, learning_rate: float) -> list[RunSpec]:
        """The final runs, at the chosen learning rate."""
        return [self.run(task, optimizer, learning_rate, seed, "final") for seed in self.seeds]

    def empty_row(self, run: RunSpec) -> dict[str, Any]:
        """The run's row of the results, by column of :data:`COLUMNS`, before it has run."""
        row: dict[str, Any] = dict.fromkeys(COLUMNS)
        row |= {name: getattr(run, name) for name in ("task", "optimizer", "learning_rate", "seed", "role")}
        steps = self.steps(run.task, run.optimizer)
        return row | {"optim_args": self.optimizers[run.optimizer].describe(), "steps": steps}

    def pairs(self) -> list[tuple[str, str]]:
        """All pairs (task, optimizer)."""
        return [(task, optimizer) for task in self.tasks for optimizer in self.optimizers]

    def size(self) -> int:
        """Number of runs of both roles."""
        return sum(len(self.selection_runs(*pair)) + len(self.seeds) for pair in self.pairs())


def make_comparison(args: ComparisonArguments) -> Comparison:
    """Check a comparison's arguments.

    Args:
        args: as read from YAML.

    Returns:
        The comparison.

    Raises:
        InputError: a key is unknown, a value has the wrong type or is out of range, or there is nothing to compare.
    """
    _check(bool(args.tasks), "tasks", args.tasks, "at least one task")
    _check(bool(args.optimizers), "optimizers", args.optimizers, "at least one optimizer")
    seeds = args.seeds or list(range(args.num_seeds))
    _check(args.num_seeds >= 2, "num_seeds", args.num_seeds, "at least 2")
    _check(len(set(seeds)) == len(seeds) >= 2, "seeds", seeds, "at least 2 different numbers")
    _check(bool(args.selection_seeds), "selection_seeds", args.selection_seeds, "at least one number")
    _check(args.num_learning_rates >= 1, "num_learning_rates", args.num_learning_rates, "at least 1")
    _check(args.learning_rate_factor > 1, "learning_rate_factor", args.learning_rate_factor, "above 1")
    tasks = {name: _task(f"tasks.{name}", value) for name, value in args.tasks.items()}
    optimizers = {name: _optimizer(name, value or {}, args.switch_fraction) for name, value in args.optimizers.items()}
    for name in args.references:
        _check(name in optimizers, "references", name, "one of " + ", ".join(optimizers))
    for task, setting in tasks.items():
        if isinstance(setting, ScriptSetting):
            _check_for_script(task, optimizers)
    return Comparison(
        name=args.name,
        question=args.question,
        tasks=tasks,
        optimizers=optimizers,
        seeds=seeds,
        selection_seeds=args.selection_seeds,
        num_learning_rates=args.num_learning_rates,
        learning_rate_factor=args.learning_rate_factor,
        references=args.references,
        sharpness=_build(SharpnessSetting, args.sharpness, "sharpness"),
    )


def _task(where: str, values: Any) -> TaskSetting | ScriptSetting:
    check_type(where, values, dict[str, Any])
    script = values.get("script")
    if script is None or script in KINDS:
        return _build(ScriptSetting if "module" in values else TaskSetting, values, where)
    if not Path(str(script)).is_file():
        raise InputError(f"{where}.script: {script!r} - should be one of {', '.join(KINDS)}, or the path of a script")
    return _build(ScriptSetting, values, where)


def _check_for_script(task: str, optimizers: dict[str, OptimizerSetting]) -> None:
    """Refuse optimizers that a script cannot select with ``--optim``."""
    for name, setting in optimizers.items():
        if not setting.runs_in_scripts:
            raise InputError(
                f"optimizers.{name}: {setting.base} is not an optimizer that a script can select with --optim and "
                f"--optim_args, and {task} is a script"
            )


def _optimizer(name: str, values: Any, switch_fraction: float) -> OptimizerSetting:
    where = f"optimizers.{name}"
    check_type(where, values, dict[str, Any])
    base = values.get("base", name)
    allowed = "one of " + ", ".join(BASELINES) + ", or a name of TrainingArguments.optim"
    _check(baseline(base) is not None, f"{where}.base", base, allowed)
    if baseline(base).has_switch:
        values = {"switch_fraction": switch_fraction} | values
        fraction = values["switch_fraction"]
        _check(0 < fraction <= 1, f"{where}.switch_fraction", fraction, "in (0, 1]")
    elif "switch_fraction" in values:
        raise InputError(f"{where}.switch_fraction: {base} has no inverse phase")
    return _build(OptimizerSetting, values | {"base": base}, where)


def _build(cls: type, values: Any, where: str) -> Any:
    """Build a settings object from a mapping; errors name the place in the file."""
    check_type(where, values, dict[str, Any])
    types = typing.get_type_hints(cls)
    hints = {f.name: types[f.name] for f in dataclasses.fields(cls) if f.init}
    required = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
    for key, value in values.items():
        _check(key in hints, f"{where}.{key}", value, "one of the keys " + ", ".join(hints))
        check_type(f"{where}.{key}", value, hints[key])
    for key in required:
        if key not in values:
            raise InputError(f"{where}.{key}: required, but not given")
    try:
        return cls(**values)
    except InputError as error:
        raise InputError(f"{where}.{error}") from None


def _check(condition: bool, name: str, value: Any, allowed: str) -> None:
    if not condition:
        raise InputError(f"{name}: {value!r} - should be {allowed}")
