"""The optimizers of a comparison: torch's or a library's classes, each with its usual settings and range of rates.

Learning rates are relative to Adam's on the same task (``rate_scale``), so that one number per task centres the range
of every optimizer.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from pytorch_optimizer import SAM
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import Trainer

from ..finetuning.config import InputError
from ..functional import inverse_weight


class TrainerSAM(SAM):
    """SAM whose second half alone is ``step``: the weights come back, then the base optimizer moves them.

    Trainer calls ``step`` without a closure, after :class:`SAMTrainer` has perturbed the weights and taken the second
    gradient there; so clipping applies to the gradient that is used.
    """

    def step(self, closure=None):
        """Take back the perturbation and step with the gradients found there."""
        self.second_step()


class SAMTrainer(Trainer):
    """Takes the second gradient of a step at the weights that SAM has perturbed, on the same batch."""

    def training_step(self, model, inputs, *args, **kwargs):
        """One step of Trainer, and the same again at the perturbed weights; returns the first loss."""
        loss = super().training_step(model, dict(inputs), *args, **kwargs)
        self.optimizer.optimizer.first_step(zero_grad=True)
        super().training_step(model, inputs, *args, **kwargs)
        return loss


class WarmupTrainer(Trainer):
    """The control: scales the rate by exactly the weight 1 - alpha that DualAdam gives to its Adam update."""

    def __init__(self, *args, warmup_fraction: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.warmup_fraction = warmup_fraction

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """Trainer's schedule times the warm-up over ``warmup_fraction`` of the steps."""
        factors = super().create_scheduler(num_training_steps, optimizer).lr_lambdas
        optimizer = self.optimizer if optimizer is None else optimizer
        for group in optimizer.param_groups:
            group["lr"] = group.pop("initial_lr")  # the first scheduler has already moved it
        switch_rate = min(1.0, 1 / (self.warmup_fraction * num_training_steps))
        self.lr_scheduler = LambdaLR(
            optimizer,
            [lambda done, f=factor: f(done) * (1 - inverse_weight(done + 1, switch_rate)) for factor in factors],
        )
        return self.lr_scheduler


class PartialInverseTrainer(Trainer):
    """Gives the inverse phase to some parameters only; the others get Adam's update from the first step."""

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
    """One optimizer with all but its learning rate.

    Attributes:
        optimizer_cls: the class; None for ours, which Trainer knows by the name ``optim``.
        kwargs: options of the class, or for ours of ``optim_args``.
        optim: ``TrainingArguments.optim``; only for ours.
        rate_scale: centre of the usual range of learning rates, in units of Adam's.
        weight_decay: in place of the task's, which is meant for decoupled decay; None for the task's.
        has_switch: whether ``switch_fraction`` applies: the share of the steps that the inverse phase, or the warm-up
            of the control, takes.
        trainer_cls: Trainer, or the subclass that can run it.
        gradients_per_step: what a step costs; the number of steps is divided by it, so that budgets are equal.
    """

    optimizer_cls: type[torch.optim.Optimizer] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    optim: str | None = None
    rate_scale: float = 1.0
    weight_decay: float | None = None
    has_switch: bool = False
    trainer_cls: type[Trainer] = Trainer
    gradients_per_step: int = 1


BASELINES = {
    "sgd": Baseline(torch.optim.SGD, {"momentum": 0.9}, rate_scale=100.0, weight_decay=5e-4),
    "adam": Baseline(torch.optim.Adam, {"fused": True}, weight_decay=0.0),
    "adamw": Baseline(torch.optim.AdamW, {"fused": True}),
    "adamw_warmup": Baseline(torch.optim.AdamW, {"fused": True}, has_switch=True, trainer_cls=WarmupTrainer),
    "nadam": Baseline(torch.optim.NAdam, {"decoupled_weight_decay": True}),
    "radam": Baseline(torch.optim.RAdam, {"decoupled_weight_decay": True}),
    "sam": Baseline(
        TrainerSAM,
        {"base_optimizer": torch.optim.AdamW, "rho": 0.05},
        trainer_cls=SAMTrainer,
        gradients_per_step=2,
    ),
    "dualadam": Baseline(optim="dualadam", has_switch=True),
    "dualadam_normalized": Baseline(optim="dualadam", kwargs={"normalize_inverse": True}, has_switch=True),
    # Its update has Adam's size but follows few large gradients, so it wants larger rates.
    "invadam_normalized": Baseline(optim="invadam", kwargs={"normalize_inverse": True}, rate_scale=3.0),
}


@dataclass(frozen=True)
class OptimizerSetting:
    """A baseline with the options that a comparison sets.

    Attributes:
        base: key of :data:`BASELINES`.
        optim_args: options on top of the baseline's.
        switch_fraction: share of the planned steps that the inverse phase or the control's warm-up takes; None where
            the baseline has neither.
        inverse_parameters: regular expression; DualAdam's inverse phase is for the parameters in whose name it is
            found, the others get Adam's update throughout. None for all.
    """

    base: str
    optim_args: dict[str, Any] = field(default_factory=dict)
    switch_fraction: float | None = None
    inverse_parameters: str | None = None

    def __post_init__(self):
        """Check that the expression is one, and has a phase to bear on."""
        if self.inverse_parameters is None:
            return
        if self.baseline.optim != "dualadam":
            raise InputError(f"inverse_parameters: {self.base} has no such phase")
        try:
            re.compile(self.inverse_parameters)
        except re.error as error:
            raise InputError(f"inverse_parameters: {self.inverse_parameters!r} - {error}") from None

    @property
    def baseline(self) -> Baseline:
        """The baseline that ``base`` names."""
        return BASELINES[self.base]

    def describe(self) -> str:
        """All options but the learning rate, as ``key=value,...``."""
        where = f",inverse_parameters={self.inverse_parameters}" if self.inverse_parameters is not None else ""
        return self._options() + where

    def _options(self) -> str:
        """Those of the class; for ours, the text for ``optim_args``."""
        options = {**self.baseline.kwargs, **self.optim_args}
        if self.switch_fraction is not None:
            options["switch_fraction"] = self.switch_fraction
        return ",".join(f"{key}={getattr(value, '__name__', value)}" for key, value in options.items())

    def summary(self) -> dict[str, Any]:
        """The setting as plain values, for a report."""
        return {
            "base": self.base,
            "ours": self.baseline.optim is not None,
            "optim_args": self.describe(),
            "switch_fraction": self.switch_fraction,
            "gradients_per_step": self.baseline.gradients_per_step,
        }

    def training_arguments(self, learning_rate: float) -> dict[str, Any]:
        """What this setting fixes of ``TrainingArguments``."""
        values: dict[str, Any] = {"learning_rate": learning_rate}
        if self.baseline.weight_decay is not None:
            values["weight_decay"] = self.baseline.weight_decay
        if self.baseline.optim:
            values |= {"optim": self.baseline.optim, "optim_args": self._options()}
        return values

    def optimizer_cls_and_kwargs(self, learning_rate: float) -> tuple[type, dict[str, Any]] | None:
        """What Trainer needs to build the optimizer; None where ``TrainingArguments`` names it."""
        if self.baseline.optim:
            return None
        return self.baseline.optimizer_cls, {"lr": learning_rate, **self.baseline.kwargs, **self.optim_args}

    def trainer_cls(self) -> Callable[..., Trainer]:
        """What builds the Trainer that can run it."""
        if self.baseline.trainer_cls is WarmupTrainer:
            return functools.partial(WarmupTrainer, warmup_fraction=self.switch_fraction)
        if self.inverse_parameters is not None:
            return functools.partial(PartialInverseTrainer, inverse_parameters=self.inverse_parameters)
        return self.baseline.trainer_cls
