"""What a comparison consists of: a YAML file -> checked settings -> the list of runs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import typing
from dataclasses import dataclass, field
from typing import Any

from ..finetuning.config import InputError, check_type
from .baselines import BASELINES, OptimizerSetting, baseline

SCRIPTS = ("glue", "image_classification")
# Points of the training, as shares of its steps, at which the inverse share is noted.
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


@dataclass(frozen=True)
class TaskSetting:
    """One task of a comparison.

    Attributes:
        script: whose arguments these are: "glue" (run_glue.py) or "image_classification".
        arguments: the script's own keys, those of TrainingArguments among them; ``max_steps`` is required.
        learning_rate: centre of the range of Adam's learning rates.
        selection_fraction: share of the training examples that is set aside to choose the learning rate.
        label_noise: share of the remaining training labels that is replaced by random classes.
    """

    script: str
    arguments: dict[str, Any]
    learning_rate: float
    selection_fraction: float = 0.2
    label_noise: float = 0.0

    def __post_init__(self):
        """Check the ranges."""
        _check(self.script in SCRIPTS, "script", self.script, "one of " + ", ".join(SCRIPTS))
        _check(self.learning_rate > 0, "learning_rate", self.learning_rate, "above 0")
        _check(0 < self.selection_fraction < 1, "selection_fraction", self.selection_fraction, "between 0 and 1")
        _check(0 <= self.label_noise <= 1, "label_noise", self.label_noise, "in [0, 1]")
        max_steps = self.arguments.get("max_steps")
        _check(isinstance(max_steps, int) and max_steps > 0, "max_steps", max_steps, "a whole number above 0")


@dataclass(frozen=True)
class SharpnessSetting:
    """How sharpness is measured after each final run.

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

    ``tasks`` maps names to :class:`TaskSetting`'s keys, ``optimizers`` maps names to nothing or to
    :class:`OptimizerSetting`'s keys (``base`` by default the name itself), ``sharpness`` holds
    :class:`SharpnessSetting`'s keys.
    """

    tasks: dict[str, Any] = field(default_factory=dict, metadata={"help": "Tasks by name (YAML)."})
    optimizers: dict[str, Any] = field(default_factory=dict, metadata={"help": "Optimizers by name (YAML)."})
    name: str = field(default="comparison", metadata={"help": "Name of the comparison in the storage and the report."})
    question: str = field(
        default="Does DualAdam generalize better than AdamW, and than AdamW with the same warm-up?",
        metadata={"help": "What the comparison asks; stands at the head of the report."},
    )
    num_seeds: int = field(default=5, metadata={"help": "Number of final runs, with the seeds 0, 1, 2, ..."})
    seeds: list[int] = field(
        default_factory=list, metadata={"help": "Seeds of the final runs, at least 2; instead of num_seeds."}
    )
    selection_seeds: list[int] = field(
        default_factory=lambda: [1000], metadata={"help": "Seeds of the runs that choose the learning rate."}
    )
    num_learning_rates: int = field(default=3, metadata={"help": "Learning rates tried for each optimizer."})
    learning_rate_factor: float = field(default=3.0, metadata={"help": "Ratio of neighbouring learning rates."})
    switch_fraction: float = field(
        default=0.16, metadata={"help": "Share of the steps for the inverse phase and for the control's warm-up."}
    )
    sharpness: dict[str, Any] = field(default_factory=dict, metadata={"help": "How sharpness is measured (YAML)."})


@dataclass(frozen=True)
class RunSpec:
    """One run of a comparison.

    Attributes:
        task: name of the task.
        optimizer: name of the optimizer setting.
        learning_rate: the highest rate of the schedule.
        seed: of weights, data order and dropout.
        role: "selection" or "final".
        digest: short hash of all settings that bear on the result.
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


@dataclass(frozen=True)
class Comparison:
    """A checked comparison; the attributes are those of :class:`ComparisonArguments`, as settings."""

    name: str
    question: str
    tasks: dict[str, TaskSetting]
    optimizers: dict[str, OptimizerSetting]
    seeds: list[int]
    selection_seeds: list[int]
    num_learning_rates: int
    learning_rate_factor: float
    sharpness: SharpnessSetting

    def learning_rates(self, task: str, optimizer: str) -> list[float]:
        """The learning rates to try, lowest first, around the centre of the optimizer's range."""
        centre = self.tasks[task].learning_rate * self.optimizers[optimizer].centre
        middle = (self.num_learning_rates - 1) / 2
        exponents = [index - middle for index in range(self.num_learning_rates)]
        return [float(f"{centre * self.learning_rate_factor**exponent:.3g}") for exponent in exponents]

    def steps(self, task: str, optimizer: str) -> int:
        """Optimizer steps of a run: equal budgets mean an equal number of gradients."""
        return max(
            1, self.tasks[task].arguments["max_steps"] // self.optimizers[optimizer].baseline.gradients_per_step
        )

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
        """The runs that choose the learning rate of one optimizer on one task; none where there is only one rate."""
        if self.num_learning_rates == 1:
            return []
        return [
            self.run(task, optimizer, rate, seed, "selection")
            for rate in self.learning_rates(task, optimizer)
            for seed in self.selection_seeds
        ]

    def final_runs(self, task: str, optimizer: str, learning_rate: float) -> list[RunSpec]:
        """The runs at the chosen learning rate."""
        return [self.run(task, optimizer, learning_rate, seed, "final") for seed in self.seeds]

    def empty_row(self, run: RunSpec) -> dict[str, Any]:
        """The run's row of the results, by column of :data:`COLUMNS`, before it has run."""
        row: dict[str, Any] = dict.fromkeys(COLUMNS)
        row |= {name: getattr(run, name) for name in ("task", "optimizer", "learning_rate", "seed", "role")}
        steps = self.steps(run.task, run.optimizer)
        return row | {"optim_args": self.optimizers[run.optimizer].describe(), "steps": steps}

    def pairs(self) -> list[tuple[str, str]]:
        """All (task, optimizer)."""
        return [(task, optimizer) for task in self.tasks for optimizer in self.optimizers]

    def runs_per_pair(self) -> dict[str, int]:
        """Number of runs of one optimizer on one task, by role."""
        selection = self.num_learning_rates * len(self.selection_seeds) if self.num_learning_rates > 1 else 0
        return {"selection": selection, "final": len(self.seeds)}

    def size(self) -> int:
        """Number of runs, both roles."""
        return sum(self.runs_per_pair().values()) * len(self.pairs())


def make_comparison(args: ComparisonArguments) -> Comparison:
    """Check a comparison's arguments.

    Args:
        args: as read from YAML.

    Returns:
        The comparison.

    Raises:
        InputError: an unknown key, a value of the wrong type or out of range, nothing to compare.
    """
    _check(bool(args.tasks), "tasks", args.tasks, "at least one task")
    _check(bool(args.optimizers), "optimizers", args.optimizers, "at least one optimizer")
    seeds = args.seeds or list(range(args.num_seeds))
    _check(args.num_seeds >= 2, "num_seeds", args.num_seeds, "at least 2")
    _check(len(set(seeds)) == len(seeds) >= 2, "seeds", seeds, "at least 2 different numbers")
    _check(bool(args.selection_seeds), "selection_seeds", args.selection_seeds, "at least one number")
    _check(args.num_learning_rates >= 1, "num_learning_rates", args.num_learning_rates, "at least 1")
    _check(args.learning_rate_factor > 1, "learning_rate_factor", args.learning_rate_factor, "above 1")
    return Comparison(
        name=args.name,
        question=args.question,
        tasks={name: _build(TaskSetting, value, f"tasks.{name}") for name, value in args.tasks.items()},
        optimizers={
            name: _optimizer(name, value or {}, args.switch_fraction) for name, value in args.optimizers.items()
        },
        seeds=seeds,
        selection_seeds=args.selection_seeds,
        num_learning_rates=args.num_learning_rates,
        learning_rate_factor=args.learning_rate_factor,
        sharpness=_build(SharpnessSetting, args.sharpness, "sharpness"),
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
        raise InputError(f"{where}.switch_fraction: {base} has no such phase")
    return _build(OptimizerSetting, values | {"base": base}, where)


def _build(cls: type, values: Any, where: str) -> Any:
    """One settings object from a mapping, with errors that say where in the file they belong."""
    check_type(where, values, dict[str, Any])
    hints = typing.get_type_hints(cls)
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
