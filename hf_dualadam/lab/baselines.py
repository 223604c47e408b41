"""The optimizers of a comparison: torch's or a library's classes, each with its usual settings and range of rates.

Learning rates are relative to Adam's on the same task (``rate_scale``), so that one number per task sets the center of
every optimizer's range.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from pytorch_optimizer import SAM
from transformers import Trainer
from transformers.training_args import OptimizerNames

from ..finetuning.config import InputError
from ..trainer import OPTIMIZERS, parse_optim_args

# Before Transformers 5 there is no table of optimizers, and SGD takes no momentum from optim_args.
OLD_TRAINER = importlib.util.find_spec("transformers.trainer_optimizer") is None


class TrainerSAM(SAM):
    """SAM whose ``step`` does only the second half: restore the weights, then step with the base optimizer.

    Trainer calls ``step`` without a closure, after :class:`SAMTrainer` has perturbed the weights and computed the
    second gradient, so clipping applies to the gradient that is used.
    """

    def step(self, closure=None):
        """Undo the perturbation and step with the gradients at the perturbed weights."""
        self.second_step()


class SAMTrainer(Trainer):
    """Computes a second gradient in each step, at the weights perturbed by SAM, on the same batch."""

    def training_step(self, model, inputs, *args, **kwargs):
        """Run Trainer's step twice, the second time at the perturbed weights; return the first loss."""
        loss = super().training_step(model, dict(inputs), *args, **kwargs)
        self.optimizer.optimizer.first_step(zero_grad=True)
        super().training_step(model, inputs, *args, **kwargs)
        return loss


class PartialInverseTrainer(Trainer):
    """Applies the inverse phase to some parameters only; the others get Adam's update from the first step."""

    def __init__(self, *args, inverse_parameters: str, **kwargs):
        super().__init__(*args, **kwargs)
        self.inverse_parameters = re.compile(inverse_parameters)

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """Trainer's optimizer, with its groups split by the names of their parameters.

        Raises:
            InputError: no name matches.
        """
        optimizer = super().create_optimizer(*args, **kwargs)
        inverse = {param for name, param in self.model.named_parameters() if self.inverse_parameters.search(name)}
        if not inverse:
            raise InputError(f"inverse_parameters: {self.inverse_parameters.pattern!r} - should match some parameter")
        for group in list(optimizer.param_groups):
            others = [param for param in group["params"] if param not in inverse]
            group["params"] = [param for param in group["params"] if param in inverse]
            options = {key: value for key, value in group.items() if key not in ("switch_fraction", "planned_steps")}
            optimizer.param_groups.append(options | {"params": others, "switch_rate": 1.0})  # alpha is 0 at step 1
        return optimizer


@dataclass(frozen=True)
class Baseline:
    """One optimizer without its learning rate.

    Attributes:
        optim: its name in ``TrainingArguments.optim``, by which a user's script can select it; None if there is none.
        kwargs: options of the class, or for an optimizer that Trainer builds, of ``optim_args``.
        optimizer_cls: the class, for an optimizer that Trainer cannot build with these options.
        rate_scale: center of the usual range of learning rates, in units of Adam's.
        weight_decay: replaces the task's, which is meant for decoupled decay; None for the task's.
        has_switch: whether ``switch_fraction`` applies: the length of the inverse phase as a fraction of the steps.
        trainer_cls: Trainer, or the subclass that can run it.
        gradients_per_step: gradients that a step computes; the number of steps is divided by it for equal budgets.
    """

    optim: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    optimizer_cls: type[torch.optim.Optimizer] | None = None
    rate_scale: float = 1.0
    weight_decay: float | None = None
    has_switch: bool = False
    trainer_cls: type[Trainer] = Trainer
    gradients_per_step: int = 1

    @property
    def has_inverse(self) -> bool:
        """Whether it has an inverse part: DualAdam or InvAdam, the subjects of the comparison."""
        return self.optim in OPTIMIZERS and self.kwargs.get("inverse_scale") != 0


BASELINES = {
    "sgd": Baseline("sgd", {"momentum": 0.9}, torch.optim.SGD, rate_scale=100.0, weight_decay=5e-4),
    "adam": Baseline("adamw_torch_fused", weight_decay=0.0),
    "adamw": Baseline("adamw_torch_fused"),
    # The control: AdamW with its rate scaled by the weight 1 - alpha of DualAdam's Adam update.
    "adamw_warmup": Baseline("dualadam", {"inverse_scale": 0.0}, has_switch=True),
    "nadam": Baseline(None, {"decoupled_weight_decay": True}, torch.optim.NAdam),
    "radam": Baseline(None, {"decoupled_weight_decay": True}, torch.optim.RAdam),
    "sam": Baseline(
        None,
        {"base_optimizer": torch.optim.AdamW, "rho": 0.05},
        TrainerSAM,
        trainer_cls=SAMTrainer,
        gradients_per_step=2,
    ),
    "dualadam": Baseline("dualadam", has_switch=True),
    "dualadam_normalized": Baseline("dualadam", {"normalize_inverse": True}, has_switch=True),
    # Its update has Adam's norm but is dominated by few large gradients, so it needs larger rates.
    "invadam_normalized": Baseline("invadam", {"normalize_inverse": True}, rate_scale=3.0),
}


def baseline(name: str) -> Baseline | None:
    """The entry of :data:`BASELINES`, or another optimizer of Trainer with this name; None if there is none."""
    if name in BASELINES:
        return BASELINES[name]
    return Baseline(name) if name in set(OptimizerNames) else None


@dataclass(frozen=True)
class OptimizerSetting:
    """A baseline with the options that a comparison sets.

    Attributes:
        base: key of :data:`BASELINES`, or another name of ``TrainingArguments.optim``.
        optim_args: options on top of the baseline's.
        rate_scale: replaces the baseline's.
        switch_fraction: length of the inverse phase, or of the control's warm-up, as a fraction of the planned steps;
            None if the baseline has neither.
        inverse_parameters: regular expression for names of parameters; the inverse phase applies only to those that
            match, and the others get Adam's update throughout. None for all.
    """

    base: str
    optim_args: dict[str, Any] = field(default_factory=dict)
    rate_scale: float | None = None
    switch_fraction: float | None = None
    inverse_parameters: str | None = None

    def __post_init__(self):
        """Check the ranges, and that the optimizer has the options."""
        if self.rate_scale is not None and not self.rate_scale > 0:
            raise InputError(f"rate_scale: {self.rate_scale} - should be above 0")
        if self.baseline.optim in OPTIMIZERS:
            try:
                parse_optim_args(self._options(), OPTIMIZERS[self.baseline.optim])
            except ValueError as error:
                raise InputError(f"optim_args: {error}") from None
        if self.inverse_parameters is None:
            return
        if self.baseline.optim != "dualadam":
            raise InputError(f"inverse_parameters: {self.base} has no inverse phase")
        try:
            re.compile(self.inverse_parameters)
        except re.error as error:
            raise InputError(f"inverse_parameters: {self.inverse_parameters!r} - {error}") from None

    @property
    def baseline(self) -> Baseline:
        """The baseline that ``base`` names."""
        return baseline(self.base)

    @property
    def center(self) -> float:
        """Center of the range of learning rates, in units of Adam's."""
        return self.baseline.rate_scale if self.rate_scale is None else self.rate_scale

    def describe(self) -> str:
        """All options but the learning rate, as ``key=value,...``."""
        where = f",inverse_parameters={self.inverse_parameters}" if self.inverse_parameters is not None else ""
        return self._options() + where

    def _options(self) -> str:
        """The keyword arguments of the class, or ``optim_args`` for an optimizer that Trainer builds."""
        options = {**self.baseline.kwargs, **self.optim_args}
        if self.switch_fraction is not None:
            options["switch_fraction"] = self.switch_fraction
        return ",".join(f"{key}={getattr(value, '__name__', value)}" for key, value in options.items())

    @property
    def runs_in_scripts(self) -> bool:
        """Whether ``--optim``, ``--optim_args`` and the like are enough to select it in a user's script."""
        only_class = self.baseline.optim is None or self.inverse_parameters is not None
        return not only_class and self.baseline.trainer_cls is Trainer and not (self.base == "sgd" and OLD_TRAINER)

    def summary(self) -> dict[str, Any]:
        """The setting as plain values for a report."""
        return {
            "base": self.base,
            "has_inverse": self.baseline.has_inverse and self.optim_args.get("inverse_scale") != 0,
            "optim_args": self.describe(),
            "switch_fraction": self.switch_fraction,
            "gradients_per_step": self.baseline.gradients_per_step,
        }

    def training_arguments(self, learning_rate: float) -> dict[str, Any]:
        """The values of ``TrainingArguments`` that this setting determines.

        With an ``optimizer_cls``, Trainer uses only the learning rate and the weight decay.
        """
        values: dict[str, Any] = {"learning_rate": learning_rate}
        if self.baseline.weight_decay is not None:
            values["weight_decay"] = self.baseline.weight_decay
        if self.baseline.optim:
            values |= {"optim": self.baseline.optim, "optim_args": self._options() or None}
        return values

    def optimizer_cls_and_kwargs(self, learning_rate: float) -> tuple[type, dict[str, Any]] | None:
        """The class and arguments for Trainer; None if ``TrainingArguments`` names the optimizer."""
        if self.baseline.optimizer_cls is None:
            return None
        return self.baseline.optimizer_cls, {"lr": learning_rate, **self.baseline.kwargs, **self.optim_args}

    def trainer_cls(self) -> Callable[..., Trainer]:
        """The factory of the Trainer that can run it."""
        if self.inverse_parameters is not None:
            return functools.partial(PartialInverseTrainer, inverse_parameters=self.inverse_parameters)
        return self.baseline.trainer_cls
