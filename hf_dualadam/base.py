"""The base class of the optimizers: arguments, state, choice of a path, state dicts.

An optimizer is a subclass with a formula (:class:`~hf_dualadam.functional.UpdateRule`) and the names of its moments.
"""

from __future__ import annotations

import math
import numbers
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import kernels
from .functional import StepScalars, UpdateRule, step_scalars
from .states import (
    CORRECTION_DTYPES,
    HALF_DTYPES,
    MOMENT_FORMATS,
    ExactMoments,
    Layout,
    MomentFormat,
    State,
    exact_dtype,
    format_for,
    format_of,
    new_correction,
    new_moment,
    read_weight,
    write_weight_,
)

Item = tuple[Tensor, Tensor, State]  # parameter, gradient, state
Group = dict[str, Any]

# Execution and storage options: loading a state dict does not change them.
EXECUTION_OPTIONS = ("foreach", "fused", "capturable", "state_bits", "master_weight_bits")
# The options taken from the state of another Adam-like optimizer; the others stay as constructed.
ADAM_OPTIONS = ("lr", "betas", "eps", "weight_decay", "initial_lr", "maximize")
# The arguments of step_scalars, apart from lr.
_SCALAR_OPTIONS = "betas eps weight_decay switch_rate inverse_scale normalize_inverse maximize".split()
MAX_COUNT = 2**24  # the largest step count: float32 cannot count beyond it
MAX_COPIED = 2**22  # elements that the foreach path copies to float32 at a time


class MomentOptimizer(Optimizer):
    """Base class of the optimizers: Adam's arguments and state, with the formula of a subclass.

    State per parameter: ``step`` (0-dim float32, on the CPU unless ``capturable``; it stops at 2^24, where the bias
    corrections are 1) and the moments. Arithmetic on half-precision tensors is done in float32.

    Attributes:
        rule: the formula.
        moments_of_state: names of the moments in a parameter's state, in the order of the formula's arguments.
        own_options: names of the options that the subclass adds to the parameter groups.

    The arguments and errors are those of :class:`~hf_dualadam.DualAdam`, except the options of its formula.

    Args:
        options: the subclass's own options.
    """

    rule: ClassVar[UpdateRule]
    moments_of_state: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    own_options: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        state_bits: int = 32,
        master_weight_bits: int | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        **options: Any,
    ) -> None:
        unknown = sorted(options.keys() - self.own_options)
        if unknown:
            raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {unknown[0]!r}")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            **options,
            "state_bits": state_bits,
            "master_weight_bits": master_weight_bits,
            "foreach": foreach,
            "fused": fused,
            "maximize": maximize,
            "capturable": capturable,
            "optimizer": type(self).__name__,  # distinguishes our state from other optimizers'
        }
        self._check_options(defaults)
        super().__init__(params, defaults)
        wide = [group for group in self.param_groups if group["master_weight_bits"] is not None]
        if wide and not any(param.dtype in HALF_DTYPES for group in wide for param in group["params"]):
            raise ValueError(
                f"Invalid master_weight_bits: {wide[0]['master_weight_bits']} with no float16 or bfloat16 parameter - "
                "should be None: float32 parameters are weights of 32 bits already."
            )

    @classmethod
    def _check_options(cls, options: Group) -> None:
        """Check the options of a group and convert them to plain numbers; subclasses add their own."""
        check_options(options)

    def add_param_group(self, param_group: Group) -> None:
        """Add a parameter group, as in ``torch.optim``; its own options are checked like the constructor's.

        Args:
            param_group: ``params`` and any options that differ from the constructor's.

        Raises:
            ValueError, TypeError: as the constructor.
        """
        super().add_param_group(param_group)
        self._drop_plans()
        group = self.param_groups[-1]
        try:
            self._check_options(group)
            for param in group["params"]:
                self._check_param(param, group)
        except (ValueError, TypeError):
            self.param_groups.pop()
            raise

    def _check_param(self, param: Tensor, group: Group) -> None:
        """Refuse a parameter that no path can update, and a forced kernel that is not available."""
        if not param.is_floating_point():  # complex numbers are not floating point to torch
            raise ValueError(f"Invalid params: a tensor of {param.dtype} - should be real floating point.")
        if param.layout != torch.strided:
            raise ValueError(f"Invalid params: a tensor of layout {param.layout} - should be dense (torch.strided).")
        if group["capturable"] and param.device.type == "mps":
            raise ValueError("Invalid capturable: True with a parameter on mps - should be False there.")
        if group["fused"]:
            name = type(self).__name__
            reason = kernels.unavailable_reason(param, group) if self.rule.kernel else f"{name} has no kernel."
            if reason:
                raise ValueError(f"Invalid fused: True - should be None or False here: {reason}")

    # ---- the state ----

    def moments(self, param: Tensor) -> tuple[Tensor, ...]:
        """The moments of a parameter, however they are stored.

        Args:
            param: a parameter that has been updated.

        Returns:
            Float32 copies, (exp_avg, exp_avg_sq), shaped like ``param``.

        Raises:
            KeyError: the parameter has no state yet.
        """
        state = self._state_of(param)
        decoded = (format_of(state, name).decode(state, name) for name in self.moments_of_state)
        return tuple(moment.to(torch.float32, copy=True) for moment in decoded)

    def master_weights(self, param: Tensor) -> Tensor:
        """The trained weight: the parameter, plus its correction if ``master_weight_bits`` is set.

        Args:
            param: a parameter of this optimizer.

        Returns:
            A float32 copy, shaped like ``param``.
        """
        correction = self.state.get(param, {}).get("weight_correction")
        param = param.detach()
        return param.to(torch.float32, copy=True) if correction is None else read_weight(param, correction)

    def _state_of(self, param: Tensor) -> State:
        state: State = self.state.get(param, {})
        if "step" not in state:
            raise KeyError(f"a parameter of shape {tuple(param.shape)} has no state: take a step first")
        return state

    def _prepare_state(self, param: Tensor, group: Group) -> list[str]:
        """Create the state of ``param``, or convert an existing one to the form of a new one.

        Floating-point moments of a wider dtype than a new state's keep it. Unknown keys are kept.

        Returns:
            Descriptions of conversions that lose precision or information.
        """
        if torch.is_inference_mode_enabled():  # tensors created in it could not be modified outside it
            with torch.inference_mode(False), torch.no_grad():
                return self._prepare_state(param, group)
        state = self.state[param]
        notes = []
        fresh = "step" not in state
        device = param.device if group["capturable"] else torch.device("cpu")
        if fresh or not _is_count(state["step"], device):
            count = torch.as_tensor(state.get("step", 0), dtype=torch.float32, device=device)
            state["step"] = count.detach().reshape(()).clone()
        bits = group["master_weight_bits"] if param.dtype in HALF_DTYPES else None
        wanted, dtype = format_for(param, group["state_bits"]), exact_dtype(param, bits)
        for name in self.moments_of_state:
            if fresh or name not in state:
                state.update(new_moment(wanted, param, name, dtype))
            elif state[name].shape != param.shape:
                raise RuntimeError(
                    f"The state's {name} has shape {tuple(state[name].shape)}, its parameter {tuple(param.shape)}."
                )
            elif not wanted.recognizes(state, name):
                notes.append(_convert_moment(param, state, name, wanted, dtype))
            elif type(wanted) is ExactMoments and _is_narrower(state[name], dtype):
                state[name] = state[name].to(dtype)
        correction = state.get("weight_correction")
        if correction is None and bits is not None:
            state["weight_correction"] = new_correction(param, bits)
        elif correction is not None and (bits is None or correction.dtype != CORRECTION_DTYPES[bits]):
            notes.append(_convert_correction(param, state, bits))
        return notes

    # ---- one step ----

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Perform one optimization step.

        Args:
            closure: re-evaluates the model and returns the loss; it runs with gradients enabled. Default None.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: a gradient is sparse, or normalize_inverse is used with parameters flattened by FSDP1.
        """
        _check_graph_capture(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step(self.param_groups)
        return loss

    @torch.no_grad()
    def step_params(self, params: list[Tensor], group: Group) -> None:
        """Perform one optimization step of some parameters of a group, leaving the others as they are.

        Step hooks do not run: this is for gradient release (:mod:`hf_dualadam.gradient_release`).

        Args:
            params: parameters with gradients.
            group: their parameter group.

        Raises:
            RuntimeError: as :meth:`step`.
        """
        self._step([{**group, "params": params}])

    def _step(self, groups: list[Group]) -> None:
        with_kernels = not torch.compiler.is_compiling() and self.rule.kernel  # torch 2.4 compiles only this order
        batches = self._run_kernels(groups) if with_kernels else kernels.collect_all(groups, self._collect)
        for group, items in batches:
            self._update(group, items)

    def _run_kernels(self, groups: list[Group]) -> kernels.Batches:
        """Count the step and update whatever a kernel can; return the rest."""
        key = None if groups is self.param_groups else tuple(map(kernels.identity, groups[0]["params"]))
        plans, graph_tables = (self.__dict__.setdefault(name, {}) for name in ("_plans", "_graph_tables"))
        plan, step = kernels.planned(
            plans, key, groups, self.state, self._collect, lambda batches: kernels.make_plan(batches, graph_tables)
        )
        plan.run(step, groups)
        return step.left

    def _drop_plans(self) -> None:
        self.__dict__.pop("_plans", None)

    def _collect(self, group: Group, params: Iterable[Tensor]) -> list[Item]:
        """The items of the parameters with a gradient; completes their states."""
        items = []
        for param in params:
            grad = param.grad
            if grad is None:
                continue
            if grad.is_sparse:
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients; use a dense embedding.")
            if group.get("normalize_inverse") and getattr(param, "_fsdp_flattened", False):
                raise RuntimeError("normalize_inverse needs whole tensors, and FSDP1 flattens them: use FSDP2.")
            self._prepare_state(param, group)
            items.append((param, grad, self.state[param]))
        return items

    def _update(self, group: Group, items: list[Item]) -> None:
        """Count the step and update with the multi-tensor form of the formula, unless that is disabled."""
        if not items:
            return
        torch._foreach_add_([state["step"] for *_, state in items], 1)
        foreach = self.rule.foreach is not None and group["foreach"] is not False
        for batch, scalars in _batches(group, items, foreach):
            if foreach and self.rule.foreach is not None:
                working = [self._read(item) for item in batch]
                self.rule.foreach(*map(list, zip(*working)), scalars)
                for item, tensors in zip(batch, working):
                    self._write(item, tensors)
            else:
                for item in batch:
                    tensors = self._read(item)
                    self.rule.single(*tensors, scalars)
                    self._write(item, tensors)

    def _read(self, item: Item) -> list[Tensor]:
        """(param, grad, *moments) for the formula: all of one dtype, float32 or wider."""
        param, grad, state = item
        moments = [format_of(state, name).decode(state, name) for name in self.moments_of_state]
        dtype = torch.float32
        for tensor in (param, grad, *moments):
            dtype = torch.promote_types(dtype, tensor.dtype)
        weight = read_weight(param, state["weight_correction"]) if "weight_correction" in state else param
        return [tensor.to(dtype) for tensor in (weight, grad, *moments)]

    def _write(self, item: Item, tensors: list[Tensor]) -> None:
        """Store the updated tensors if the formula worked on copies."""
        param, _, state = item
        weight, _, *moments = tensors
        if "weight_correction" in state:
            write_weight_(param, state["weight_correction"], weight, state["step"])
        elif weight is not param:
            param.copy_(weight)
        for name, moment in zip(self.moments_of_state, moments):
            format_of(state, name).encode_(state, name, moment)

    # ---- state dicts ----

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from pickle or a state dict; options missing from an older state get their defaults."""
        own = {name for group in self.__dict__.get("param_groups", []) for name in group}
        super().__setstate__(state)
        self._drop_plans()
        if "differentiable" not in own:  # torch adds this key; ours does not have it
            for options in (self.defaults, *self.param_groups):
                options.pop("differentiable", None)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, of this class or of an Adam-like optimizer, without losing precision.

        Moments, step counts and hyper-parameters come from the state, as in ``torch.optim``; the execution and
        storage options (``foreach``, ``fused``, ``capturable``, ``state_bits``, ``master_weight_bits``) stay as
        constructed, and loaded moments are converted. A state of another Adam-like optimizer, such as AdamW, is
        accepted with one warning: its moments and step counts are kept, so steps already done count towards the
        switch, and options that it lacks stay as constructed. Hooks registered with
        ``register_load_state_dict_pre_hook`` run first, and all of this applies to what they return.

        Args:
            state_dict: as returned by ``state_dict()``.

        Raises:
            ValueError: the state does not fit the parameters, or lacks the moments.
        """
        loaded: dict[str, Any] = {}

        def check_and_keep(_: Optimizer, hooked: dict[str, Any]) -> None:
            self._check_loaded(hooked)
            loaded.update(hooked)

        def restore(_: Optimizer) -> None:
            notes.extend(self._restore(loaded, before))

        before = [dict(group) for group in self.param_groups]
        notes: list[str] = []
        handles = [
            self.register_load_state_dict_pre_hook(check_and_keep),  # runs last
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()
        if notes:
            warnings.warn(" ".join(notes), stacklevel=2)

    def _check_loaded(self, state_dict: dict[str, Any]) -> None:
        """Refuse a state that does not fit, before anything is overwritten."""
        groups = state_dict["param_groups"]
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in self.param_groups]:
            return  # torch's own message names the groups
        for index, (saved, own) in enumerate(zip(groups, self.param_groups)):
            names = own.keys() - {"params", *EXECUTION_OPTIONS}
            if self._is_foreign(saved):
                names &= set(ADAM_OPTIONS)
            try:
                self._check_options(own | {name: saved[name] for name in names if name in saved})
            except (ValueError, TypeError) as error:
                raise ValueError(f"Invalid state_dict: group {index}: {error}") from None
        for saved_id, param in _pairs(groups, self.param_groups):
            state = state_dict["state"].get(saved_id)
            if state:
                self._check_loaded_state(f"parameter {saved_id!r}", state, param)

    def _check_loaded_state(self, owner: str, state: State, param: Tensor) -> None:
        """Refuse a parameter's state that does not fit; ``owner`` names it in messages."""
        missing = [name for name in ("step", *self.moments_of_state) if name not in state]
        if missing:
            raise ValueError(
                f"Invalid state_dict: the state of {owner} has {sorted(state)} and lacks {', '.join(missing)} - "
                f"should come from {type(self).__name__}, Adam or AdamW."
            )
        _check_count(owner, state["step"])
        expected: Layout = {}
        if "weight_correction" in state:
            expected["weight_correction"] = tuple(param.shape), state["weight_correction"].dtype
        for name in self.moments_of_state:
            expected |= _check_moment(owner, state, name, param)
        for key, (shape, dtype) in expected.items():
            found = tuple(state[key].shape) if key in state else None
            if found != tuple(shape):
                raise ValueError(
                    f"Invalid state_dict: {key} of {owner} "
                    + (f"has shape {found}" if found is not None else "is missing")
                    + f" - should be {tuple(shape)}"
                    + (", the parameter's." if shape == param.shape else ".")
                )
            if state[key].dtype != dtype:
                raise ValueError(
                    f"Invalid state_dict: {key} of {owner} is {state[key].dtype} - should be {dtype}, as it was saved."
                )

    def _is_foreign(self, saved: Group) -> bool:
        return bool(saved.get("optimizer") != type(self).__name__)

    @torch.no_grad()
    def _restore(self, loaded: dict[str, Any], before: list[Group]) -> list[str]:
        """Restore what torch cast to the parameters' dtype (pytorch issue 43706), and convert it to our formats.

        Returns:
            Sentences for the warning to the user.
        """
        name = type(self).__name__
        saved_by = [group.get("optimizer", "another optimizer") for group in loaded["param_groups"]]
        foreign = sorted(set(saved_by) - {name})
        converted: list[str] = []
        for saved_id, param in _pairs(loaded["param_groups"], self.param_groups):
            for key, value in (loaded["state"].get(saved_id) or {}).items():
                cast = self.state[param].get(key)
                if isinstance(value, Tensor) and isinstance(cast, Tensor) and cast.dtype != value.dtype:
                    self.state[param][key] = value.to(cast.device, copy=True)
        for group, old, owner in zip(self.param_groups, before, saved_by):
            kept = {*EXECUTION_OPTIONS, *(old.keys() - {"params", *ADAM_OPTIONS} if owner in foreign else ())}
            group.update({key: old[key] for key in kept})
            for key, value in old.items():
                group.setdefault(key, value)
            for param in group["params"]:
                if self.state.get(param):
                    converted += self._prepare_state(param, group)
        notes = []
        if foreign:
            notes += self._notes_on_foreign(loaded, ", ".join(foreign))
        replaced = _replaced_options(before, self.param_groups)
        if replaced:
            notes.append(f"The loaded state replaces options that were given: {', '.join(replaced)}.")
        return notes + [f"While loading, {note}." for note in dict.fromkeys(converted)]

    def _notes_on_foreign(self, loaded: dict[str, Any], owner: str) -> list[str]:
        """Sentences on which part of another optimizer's state is used."""
        name = type(self).__name__
        said = f"The loaded state was saved by {owner}, not by {name}"
        if not any(loaded["state"].values()):
            return [f"{said}, and holds no moments: {name} starts at step 1."]
        kept = "its moments and step counts are kept" if self.moments_of_state else "only its step counts are used"
        switch = ", so steps already done count towards the switch to AdamW" if "switch_rate" in self.defaults else ""
        notes = [f"{said}: {kept}{switch}."]
        groups = loaded["param_groups"]
        if any(group.get("weight_decay") and group.get("decoupled_weight_decay") is False for group in groups):
            notes.append("Its weight decay was added to gradients; here it is decoupled.")
        if any("max_exp_avg_sq" in state for state in loaded["state"].values()):
            notes.append("Its max_exp_avg_sq (amsgrad) is not used.")
        return notes


# torch 2.13 renamed its check that a step under graph capture is capturable.
def _check_graph_capture(optimizer: Optimizer) -> None:
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
        check = getattr(optimizer, name, None)
        if check is not None:
            check()
            return


def _pairs(saved: Iterable[Group], groups: Iterable[Group]) -> Iterator[tuple[Any, Tensor]]:
    """Pairs of the ids of saved parameters and the parameters they belong to."""
    ids = chain.from_iterable(group["params"] for group in saved)
    return zip(ids, chain.from_iterable(group["params"] for group in groups))


def _is_count(step: Any, device: torch.device) -> bool:
    return (
        isinstance(step, Tensor)
        and step.dtype == torch.float32
        and step.dim() == 0
        and step.device.type == device.type
        and not step.requires_grad
    )


def _check_count(owner: str, step: Any) -> None:
    """Refuse a loaded step count that is not a whole number >= 0."""
    is_tensor = isinstance(step, Tensor)
    if is_tensor and (step.numel() != 1 or step.is_complex() or step.device.type == "meta"):
        kind = f"a tensor of {step.dtype}, shape {tuple(step.shape)}, on {step.device}"
        raise ValueError(f"Invalid state_dict: step of {owner} is {kind} - should be one number.")
    try:
        count = as_number("step", step.item() if is_tensor else step, 0.0)
    except (ValueError, TypeError) as error:
        raise ValueError(f"Invalid state_dict: {owner}: {error}") from None
    if count != int(count):
        raise ValueError(f"Invalid state_dict: step of {owner} is {count} - should be a whole number >= 0.")


def _check_moment(owner: str, state: State, name: str, param: Tensor) -> Layout:
    """Refuse a loaded moment that is not a real dense tensor; return the entries that it should have."""
    moment = state[name]
    if not isinstance(moment, Tensor) or moment.layout != torch.strided or moment.is_complex():
        kind = f"{moment.layout}, {moment.dtype}" if isinstance(moment, Tensor) else type(moment).__name__
        raise ValueError(f"Invalid state_dict: {name} of {owner} is {kind} - should be a dense real tensor.")
    layout = format_of(state, name).layout(param, name, moment.dtype)
    others = {key for other in MOMENT_FORMATS.values() for key in other.layout(param, name, moment.dtype)}
    for key in sorted((others - layout.keys()) & state.keys()):
        raise ValueError(
            f"Invalid state_dict: {name} of {owner} is {moment.dtype} with {key} - should be codes, as it was saved."
        )
    return layout


def _is_narrower(moment: Tensor, dtype: torch.dtype) -> bool:
    return moment.dtype != dtype and torch.promote_types(moment.dtype, dtype) != moment.dtype


def _convert_moment(param: Tensor, state: State, name: str, wanted: MomentFormat, dtype: torch.dtype) -> str:
    """Convert a moment to another format; return a description of the change."""
    stored = format_of(state, name)
    moment = stored.decode(state, name)
    for key in stored.layout(param, name, dtype):
        del state[key]
    state.update(new_moment(wanted, param, name, dtype))
    wanted.encode_(state, name, moment)
    if isinstance(wanted, ExactMoments):
        return "moments of fewer bits are decoded to 32 bits"
    return "moments are rounded to the fewer bits of state_bits"


def _convert_correction(param: Tensor, state: State, bits: int | None) -> str:
    """Convert a weight to ``bits`` bits, or to the parameter alone for None; return a description of the change."""
    old = state.pop("weight_correction")
    if bits is None:
        return "the corrections of 16-bit weights are dropped, since master_weight_bits is None"
    state["weight_correction"] = new_correction(param, bits)
    write_weight_(param, state["weight_correction"], read_weight(param, old), state["step"])
    return f"16-bit weights and their corrections are converted to {bits} bits"


def _batches(group: Group, items: list[Item], foreach: bool) -> Iterator[tuple[list[Item], StepScalars]]:
    """Split a group's items into batches that one call can update, each with its scalars.

    Reads the step counts on the host unless that is forbidden (``capturable``) or would break a compiled graph. In
    these cases the scalars are tensors, one per parameter.
    """
    options = {name: group[name] for name in _SCALAR_OPTIONS if name in group}
    on_host = not (group["capturable"] or torch.compiler.is_compiling())
    options["lr"] = group["lr"].detach() if isinstance(group["lr"], Tensor) else group["lr"]
    if on_host:
        options["lr"] = float(options["lr"])
    batches = defaultdict(list)
    for item in items:
        param, grad, state = item
        mesh = getattr(param, "device_mesh", None)  # a call accepts either plain tensors or DTensors of one mesh
        moments = (state[name].dtype for name in state if name.startswith("exp_avg"))
        step = state["step"].item() if on_host else None
        batches[(step, mesh, param.device, param.dtype, grad.dtype, *moments)].append(item)
    for (step, *_), whole in batches.items():
        for batch in _slices(whole):
            if on_host:
                yield batch, step_scalars(step, **options)
            elif foreach:
                yield batch, _transpose([step_scalars(state["step"], **options) for *_, state in batch])
            else:
                for item in batch:
                    yield [item], step_scalars(item[2]["step"], **options)


def _slices(items: list[Item]) -> Iterator[list[Item]]:
    """Split a batch that is computed in float32 copies, to limit the memory of the copies."""
    param, _, state = items[0]
    moments = [state[name].dtype for name in state if name.startswith("exp_avg")]
    if all(dtype == param.dtype for dtype in moments) and param.dtype not in HALF_DTYPES:
        yield items
        return
    batch: list[Item] = []
    size = 0
    for item in items:
        if batch and size + item[0].numel() > MAX_COPIED:
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += item[0].numel()
    yield batch


def _transpose(scalars: list[StepScalars]) -> StepScalars:
    """Turn a list of StepScalars into one StepScalars of lists; fields shared by all stay scalars."""
    columns = [list(column) for column in zip(*scalars)]
    fields: list[Any] = [column if isinstance(column[0], Tensor) else column[0] for column in columns]
    return StepScalars(*fields)


def _replaced_options(before: list[Group], after: list[Group]) -> list[str]:
    """Descriptions of the options that a loaded state has replaced."""
    skipped = {"params", "lr", "optimizer", "foreach", "fused", "capturable", "state_bits", "master_weight_bits"}
    changes = []
    for index, (old, new) in enumerate(zip(before, after)):
        for name in sorted(old.keys() & new.keys() - skipped):  # lr itself changes with every schedule
            if _differs(old[name], new[name]):
                changes.append(f"{name}: {new[name]} instead of {old[name]} (group {index})")
    return changes


def _differs(old: Any, new: Any) -> bool:
    if isinstance(old, (tuple, list)) and isinstance(new, (tuple, list)):
        return tuple(old) != tuple(new)
    return bool(old != new)


# ---- checks of options ----


def check_options(options: Group) -> None:
    """Check the options that all optimizers share; the messages name the argument, its value and what is allowed."""
    lr = options["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1 or not lr.is_floating_point():
            raise ValueError(f"Invalid lr: tensor of shape {tuple(lr.shape)}, {lr.dtype} - should be one float.")
        if lr.device.type == "cpu":
            as_number("lr", lr.item(), 0.0)
    else:
        check_number(options, "lr", 0.0)
    betas = options["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"Invalid betas: {betas!r} - should be two numbers in [0.0, 1.0).")
    options["betas"] = tuple(
        as_number(f"betas[{index}]", beta, 0.0, 1.0, open_end=True) for index, beta in enumerate(betas)
    )
    check_number(options, "eps", 0.0)
    check_number(options, "weight_decay", 0.0)
    check_flag(options, "maximize", "capturable")
    check_flag(options, "foreach", "fused", optional=True)
    check_choice(options, "state_bits", MOMENT_FORMATS)
    check_choice(options, "master_weight_bits", (None, *CORRECTION_DTYPES))
    if options["foreach"] and options["fused"]:
        raise ValueError("Invalid foreach: True with fused=True - should be at most one of the two.")


def check_number(options: Group, name: str, low: float, high: float = math.inf) -> None:
    """Convert ``options[name]`` to a float, and check that it is in [low, high]."""
    options[name] = as_number(name, options[name], low, high)


def as_number(name: str, value: Any, low: float, high: float = math.inf, open_end: bool = False) -> float:
    """Convert a number or one-element array to a float, so that state dicts hold no numpy objects."""
    if type(value).__module__ == "numpy" and getattr(value, "size", 0) == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"Invalid {name}: {value!r} - should be a number, not {type(value).__name__}.")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    inside = low <= number < high if open_end or high == math.inf else low <= number <= high
    if not inside:  # also catches NaN
        bracket = ")" if open_end or high == math.inf else "]"
        raise ValueError(f"Invalid {name}: {value} - should be in [{low}, {high}{bracket}.")
    return number


def check_flag(options: Group, *names: str, optional: bool = False) -> None:
    """Check that ``options[name]`` is True or False, or None if ``optional``."""
    allowed = (True, False, None) if optional else (True, False)
    for name in names:
        if not any(options[name] is value for value in allowed):
            raise TypeError(f"Invalid {name}: {options[name]!r} - should be {' or '.join(map(str, allowed))}.")


def check_choice(options: Group, name: str, allowed: Iterable[Any]) -> None:
    """Replace ``options[name]`` by the member of ``allowed`` that it equals."""
    value, choices = options[name], list(allowed)
    if isinstance(value, bool) or value not in choices:
        raise ValueError(f"Invalid {name}: {value!r} - should be {' or '.join(map(str, choices))}.")
    options[name] = choices[choices.index(value)]  # 8.0 and numpy integers become 8
