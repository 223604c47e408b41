"""The plan of an optimizer's step or measurement: made once, checked every time, replaced when anything has changed.

A plan records addresses, shapes and options, but holds no tensor of its optimizer, so it does not keep memory alive.
It cannot go stale unnoticed either: each step compares the current parameters, gradients and states with those that
the plan was made for, in loops that run in C.
"""

from __future__ import annotations

import operator
import weakref
from array import array
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from itertools import chain, count, repeat
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ..states import local_tensor
from .layout import Operands, addresses_of, layout_check, operands, overlapping

Group = dict[str, Any]  # a parameter group
Item = tuple[Tensor, Tensor, dict[str, Any]]  # parameter, gradient, state
Batches = list[tuple[Group, list[Item]]]

_PARAMS, _GRAD = operator.itemgetter("params"), operator.attrgetter("grad")
# As unique as id(), without its audit event: filelock's hook makes that ten times as slow.
identity = object.__hash__
_BLOCK = 256  # tensors that are checked together, so that they stay in the cache
# Further entries that a state can have: corrections of 16-bit weights, scales of 8-bit moments.
CORRECTION, SCALES = "weight_correction", ("exp_avg_scale", "exp_avg_sq_min", "exp_avg_sq_max")
_PLACEMENTS = operator.attrgetter("placements")
# The options that decide which path a group takes; those of the formula are read at every step.
_PATH = operator.itemgetter("fused", "foreach", "capturable", "normalize_inverse", "state_bits", "master_weight_bits")


class Found(NamedTuple):
    """The tensors of one part in one step: the optimizer's parameters, and the plain tensors to work on."""

    owners: list[Tensor]
    params: list[Tensor]
    grads: list[Tensor]
    grad_addresses: list[int]


class Member(NamedTuple):
    """A tensor of a part.

    Attributes:
        place: its index among the plan's parameters.
        group: the index of its group.
        operands: what a kernel reads and writes.
        state: the parameter's state.
        row: what the kernel's ``prepare`` returned for it.
    """

    place: int
    group: int
    operands: Operands
    state: dict[str, Any]
    row: Any


class Part:
    """Tensors that a kernel updates together. Subclasses implement :meth:`run`.

    Args:
        members: the tensors.
        sharded: whether the members are shards of DTensors.
        graph_tables: see :class:`Plan`.
        reads_grads: see :class:`Plan`.
    """

    def __init__(
        self, members: list[Member], sharded: bool, graph_tables: dict[Any, Any], reads_grads: bool = True
    ) -> None:
        self._pick = _picker([member.place for member in members])
        self.groups = [member.group for member in members]
        self.sharded = sharded
        params, grads, exp_avgs, exp_avg_sqs, steps = zip(*(member.operands for member in members))
        self._names = _names(members[0].state)
        self.numels = [param.numel() for param in params]
        self.addresses = [array("q", addresses_of(tensors)) for tensors in (params, exp_avgs, exp_avg_sqs, steps)]
        self._grad_addresses = addresses_of(grads)
        self.graph_tables = graph_tables
        self._reads_grads = reads_grads
        self._keys: list[int] = []  # identities of the parameters in the optimizer's state
        self._pick_states = self._pick
        # What the first look has seen, by block: facts, checks of layouts, addresses.
        self._seen: list[tuple[list[Any], list[Callable[..., bool]], list[list[int]]]] = []

    def look(self, params: list[Tensor], state: dict[Tensor, Any]) -> Found | None:
        """The current tensors, or None if they are no longer those that this part was made for.

        Args:
            params: the plan's parameters.
            state: the optimizer's state.
        """
        owners = self._pick(params)
        states = self._states(owners, state)
        shards: list[Tensor] = []
        grads: list[Tensor] = []
        addresses: list[int] = []
        for number, begin in enumerate(range(0, len(owners), _BLOCK)):
            facts, columns = self._look_at(owners[begin : begin + _BLOCK], states[begin : begin + _BLOCK])
            fixed = columns[: 1 + len(self._names)]
            if len(self._seen) == number:
                self._seen.append((facts, [*map(layout_check, columns)], [*map(addresses_of, fixed)]))
            known_facts, checks, known_addresses = self._seen[number]
            if facts != known_facts:
                return None
            # Both looks at a list of tensors in turn, while it is in the cache.
            for check, tensors, known in zip(checks, fixed, known_addresses):
                if not check(*tensors) or addresses_of(tensors) != known:
                    return None
            if self._reads_grads and not checks[-1](*columns[-1]):
                return None
            shards += columns[0]
            if self._reads_grads:
                grads += columns[-1]
                addresses += addresses_of(columns[-1])
        if addresses != self._grad_addresses:
            self._grad_addresses = addresses
        return Found(owners, shards, grads, self._grad_addresses)

    def _states(self, owners: list[Tensor], state: dict[Tensor, Any]) -> list[dict[str, Any]]:
        """The states of the parameters, in most cases without Tensor.__hash__, which calls id()."""
        if len(state) > 4 * len(owners):  # gradient release: a plan for each parameter
            return [*map(state.__getitem__, owners)]
        keys = [*map(identity, state)]
        if keys != self._keys:
            places = dict(zip(keys, range(len(keys))))
            self._pick_states = _picker([*map(places.__getitem__, map(identity, owners))])
            self._keys = keys
        return self._pick_states([*state.values()])

    def _look_at(self, owners: list[Tensor], states: list[dict[str, Any]]) -> tuple[list[Any], list[list[Tensor]]]:
        """Which tensors some parameters have, and these: of DTensors the shards.

        Returns:
            What must not change about them, apart from layouts and addresses; lists of parameters, of each entry of
            the states and, if they are read, of gradients.
        """
        columns = [[*map(operator.itemgetter(name), states)] for name in self._names]
        facts: list[Any] = [[*map(identity, column)] for column in columns]
        if CORRECTION not in self._names:
            facts.append(True in map(dict.__contains__, states, repeat(CORRECTION)))
        columns.insert(0, owners)
        if self._reads_grads:
            columns.append([*map(_GRAD, owners)])
        if self.sharded:
            facts.append([*map(_PLACEMENTS, columns[-1])])
            columns = [[*map(local_tensor, column)] for column in columns]
        return facts, columns

    def run(self, found: Found, groups: list[Group]) -> None:
        """Count the step and update.

        Args:
            found: what :meth:`look` has just returned.
            groups: the optimizer's parameter groups.
        """
        raise NotImplementedError

    def counts(self) -> array[float]:
        """The step counts of all tensors."""
        raise NotImplementedError

    def last_norms(self, found: Found, groups: list[Group]) -> Tensor:
        """Measure the last step; waits for the device.

        Args:
            found: what :meth:`look` has just returned.
            groups: the optimizer's parameter groups.

        Returns:
            Per tensor, or shard, the squared norms of m/d, m*d, m and the parameter, on the CPU. They are float64 sums
            of float32 squares, accurate unless the latter overflow or underflow.
        """
        raise NotImplementedError


class Kernel(Protocol):
    """The interface of a module with a kernel, as a plan uses it."""

    Part: type[Part]

    def is_here(self, param: Tensor) -> bool:
        """Whether the parameter is on a device of this kernel."""

    def prepare(self, item: Item, tensors: Operands, group: Group) -> tuple[Hashable, Any] | None:
        """A key, equal for tensors that can be in the same part, and what the part needs to know about this one.

        None if the kernel cannot update the tensor.
        """


class Step(NamedTuple):
    """The work of one step: the tensors of each part, and the items that are in no part, by group."""

    found: list[Found]
    left: Batches


class Plan:
    """One step of an optimizer: parts for kernels, and the rest.

    Args:
        batches: each parameter group with all its (param, grad, state) items; the states are complete.
        kernels: the modules with a kernel.
        graph_tables: tables that captured graphs read, which outlive the plan.
        reads_grads: False for a plan of measurements, whose items have the parameter itself in place of a gradient.
            Default True.
    """

    def __init__(
        self, batches: Batches, kernels: Iterable[Any], graph_tables: dict[Any, Any], reads_grads: bool = True
    ) -> None:
        groups = [group for group, _ in batches]
        self._paths = [*map(_PATH, groups)]
        self._fused = [index for index, group in enumerate(groups) if allows_kernels(group)]
        params = self._params(groups)
        self._param_ids = [*map(identity, params)]
        self._kernels = list(kernels)
        self._dead: list[Any] = []  # weak references to freed tensors; while it is empty, ids are unique
        self._alive: list[Any] = []
        # Places of tensors in no part, by group:
        self._others: dict[int, list[int]] = defaultdict(list)  # there is no kernel for their device
        self._shared: dict[int, list[int]] = defaultdict(list)  # they share memory, so they are updated one by one
        self._left: dict[int, list[int]] = defaultdict(list)  # idle, or the kernel cannot take them in this form

        parts: dict[tuple[Any, ...], list[Member]] = defaultdict(list)
        items = {id(item[0]): item for _, own_items in batches for item in own_items}
        places = count()
        for index in self._fused:
            for param, place in zip(groups[index]["params"], places):
                item = items.get(id(param))
                kernel = self._kernel_of(param)
                tensors, prepared = (None, None) if item is None else _prepare(kernel, item, groups[index])
                if item is None or tensors is None or prepared is None:
                    (self._others if kernel is None else self._left)[index].append(place)
                else:
                    sharded, (kind, row) = tensors[0] is not param, prepared
                    key = kernel, sharded, _names(item[2]), kind
                    parts[key].append(Member(place, index, tensors, item[2], row))
        self._take_out_shared_memory(parts)
        for members in parts.values():
            for member in members:
                own = map(member.state.__getitem__, _names(member.state))
                self._alive += [weakref.ref(tensor, self._dead.append) for tensor in own]
        self._alive += [weakref.ref(param, self._dead.append) for param in params]
        self.parts: list[Part] = [
            kernel.Part(members, sharded, graph_tables, reads_grads)
            for (kernel, sharded, *_), members in parts.items()
            if members
        ]

    def look(self, groups: list[Group], state: dict[Tensor, Any], collect: Callable[..., list[Item]]) -> Step | None:
        """Check everything that could have changed.

        Args:
            groups: the optimizer's parameter groups.
            state: its state.
            collect: ``collect(group, params)`` returns the items of those params that have something to be done.

        Returns:
            The work of this step, or None if the plan no longer fits.
        """
        if self._dead or [*map(_PATH, groups)] != self._paths:
            return None
        params = self._params(groups)
        if [*map(identity, params)] != self._param_ids:
            return None
        found = []
        try:
            for part in self.parts:
                tensors = part.look(params, state)
                if tensors is None:
                    return None
                found.append(tensors)
        except (AttributeError, KeyError, TypeError, RuntimeError):
            return None  # an entry of a state is missing or not a tensor, or a gradient is sparse
        left = [(group, collect(group, group["params"])) for i, group in enumerate(groups) if i not in self._fused]
        for places in (self._others, self._shared, self._left):
            for index, own in places.items():
                group = groups[index]
                items = collect(group, [*map(params.__getitem__, own)])
                if places is self._left and any(self._should_be_taken(item, group) for item in items):
                    return None
                left += [(group, items)] if places is self._others else [(group, [item]) for item in items]
        return Step(found, left)

    def run(self, step: Step, groups: list[Group]) -> None:
        """Count the step and update the tensors of all parts.

        Args:
            step: what :meth:`look` has just returned.
            groups: the optimizer's parameter groups.
        """
        for part, found in zip(self.parts, step.found):
            part.run(found, groups)

    def _params(self, groups: list[Group]) -> list[Tensor]:
        """The parameters of the groups that allow kernels."""
        return [*chain.from_iterable(map(_PARAMS, map(groups.__getitem__, self._fused)))]

    def _kernel_of(self, param: Tensor) -> Any:
        return next((kernel for kernel in self._kernels if kernel.is_here(param)), None)

    def _should_be_taken(self, item: Item, group: Group) -> bool:
        """Whether a new plan may have a kernel for it: also if it moved to a device that this plan does not know."""
        kernel = self._kernel_of(item[0])
        return kernel is None or _prepare(kernel, item, group)[1] is not None

    def _take_out_shared_memory(self, parts: dict[tuple[Any, ...], list[Member]]) -> None:
        """Remove tensors that share memory from the parts: no two threads may update the same memory at once."""
        members = [*chain.from_iterable(parts.values())]
        params = [member.operands[0] for member in members]
        sizes = [param.numel() * param.element_size() for param in params]
        shared = {members[i].place for i in overlapping(addresses_of(params), sizes)}
        for part in parts.values():
            for member in part:
                if member.place in shared:
                    self._shared[member.group].append(member.place)
            part[:] = [member for member in part if member.place not in shared]


def allows_kernels(group: Group) -> bool:
    """Whether the options of a group leave the choice of a path open, or force the kernel."""
    return bool(group["fused"] or (group["fused"] is None and group["foreach"] is None))


def _picker(places: list[int]) -> Callable[[list[Any]], list[Any]]:
    """A function that picks the values at some places; most parts take all of them, in order or reversed."""
    n = len(places)
    for whole in (slice(None), slice(None, None, -1)):
        if [*range(n)][whole] == places:
            return lambda values: values[whole] if len(values) == n else [*map(values.__getitem__, places)]
    return lambda values: [*map(values.__getitem__, places)]


def _names(state: dict[str, Any]) -> tuple[str, ...]:
    """The entries of a state that a kernel reads or writes."""
    names = ("step", "exp_avg", "exp_avg_sq", CORRECTION, *(() if state["exp_avg"].is_floating_point() else SCALES))
    return tuple(name for name in names if name in state)


def _prepare(kernel: Any, item: Item, group: Group) -> tuple[Operands | None, tuple[Hashable, Any] | None]:
    tensors = None if kernel is None else operands(*item)
    return tensors, None if tensors is None else kernel.prepare(item, tensors, group)
