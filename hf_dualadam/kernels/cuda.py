"""The CUDA kernel: a few Triton launches per step for all tensors of one device and one kind.

Tables in device memory hold the addresses of the tensors. A plan sends its tables again when addresses change or the
step runs on another stream. During the capture of a CUDA graph, tables are written by kernels that take the numbers as
arguments, so each replay fills the graph's own tables again. The larger tables, which never change, are shared between
graph and plan, and the optimizer keeps them alive.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
from array import array
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..functional import StepScalars, norm_ratio, step_scalars
from ..states import BLOCK, HALF_DTYPES, dither, exact_dtype, local_tensor
from . import plan
from .cpu import count_steps, read_steps
from .layout import Operands, addresses_of, can_sum_over_shards, mark_as_written, same_layout, sum_over_shards
from .plan import CORRECTION, SCALES

logger = logging.getLogger(__name__)

# The supported pairs of dtypes, of parameter and moments, with Triton's names for them.
_DTYPES = {
    (torch.float32, torch.float32): ("float32", "float32"),
    (torch.float64, torch.float64): ("float64", "float64"),
    (torch.bfloat16, torch.bfloat16): ("bfloat16", "bfloat16"),
    (torch.bfloat16, torch.float32): ("bfloat16", "float32"),
    (torch.float16, torch.float32): ("float16", "float32"),
    # 8-bit moments
    (torch.float32, torch.int8): ("float32", None),
    (torch.bfloat16, torch.int8): ("bfloat16", None),
    (torch.float16, torch.int8): ("float16", None),
}
_TORCH_DTYPES = {"q": torch.int64, "f": torch.float32, "d": torch.float64}  # of arrays
_OLDEST_TRITON = (3, 2)  # the interpreter of 3.1 and older computes wrong numbers
_REMEDY = "run `pip install 'triton>=3.2'` (torch 2.6 and newer bring it)"
# Without fused operations, the compiled kernels round as in Triton's interpreter, which the tests use.
_LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}
_LAUNCH_BLOCKS, _LAUNCH_SUMS = _LAUNCH | {"num_warps": 2}, _LAUNCH | {"num_warps": 16}  # 8 bits; norm_sums_kernel


@functools.cache
def load() -> Any:
    """Import the Triton kernels; None if Triton is missing or too old, which is logged once."""
    try:
        import triton

        if tuple(map(int, triton.__version__.split(".")[:2])) < _OLDEST_TRITON:
            raise ImportError(f"found {triton.__version__}")
        from . import dual_update_triton
    except ImportError as error:
        logger.warning(
            "The CUDA kernel of hf_dualadam needs Triton 3.2 (%s), so steps take longer: %s.", error, _REMEDY
        )
        return None
    return dual_update_triton


def unavailable_reason(param: Tensor, group: plan.Group) -> str | None:
    """Say why the kernel cannot update ``param`` with the options of ``group``, or None if it can."""
    if load() is None:
        return f"the CUDA kernel needs Triton 3.2 or newer; {_REMEDY}."
    bits = group["master_weight_bits"] if param.dtype in HALF_DTYPES else None
    dtypes = param.dtype, exact_dtype(param, bits)
    if dtypes not in _DTYPES:
        return f"the CUDA kernel does not support {param.dtype}."
    correction_bits = bits - 16 if bits else 0
    reason = _failure(param.device, *dtypes, group["capturable"], group["normalize_inverse"], correction_bits)
    return reason and f"the CUDA kernel fails on {param.device}: {reason}"


def is_here(param: Tensor) -> bool:
    """Whether the parameter is on a GPU, and Triton is installed."""
    return param.is_cuda and load() is not None


def prepare(item: plan.Item, tensors: Operands, group: plan.Group) -> tuple[Any, None] | None:
    """Group tensors by device and pair of dtypes, if the kernel can be launched for them."""
    param, grad, exp_avg, exp_avg_sq, step = tensors
    capturable = group["capturable"]
    measures = item[1] is item[0]  # a plan of measurements
    normalize = group["normalize_inverse"] or measures
    coded = exp_avg.dtype == torch.int8
    correction = item[2].get(CORRECTION)
    bits = 0 if correction is None else 8 * correction.element_size()
    more = {name: local_tensor(item[2][name]) for name in _more_names(item[2])}
    blocks = (param.shape[0], -(-param.shape[1:].numel() // BLOCK)) if coded else ()
    fits = (
        (param.dtype, exp_avg.dtype) in _DTYPES
        and grad.dtype == param.dtype
        and exp_avg_sq.dtype == (torch.uint8 if coded else exp_avg.dtype)
        and all(tensor.device == param.device for tensor in more.values())
        and all(scale.is_contiguous() and scale.shape == blocks for name, scale in more.items() if name in SCALES)
        and (correction is None or param.dtype in HALF_DTYPES and _same_place(more[CORRECTION], param))
        and param.device == grad.device == exp_avg.device == exp_avg_sq.device
        and step.device == (param.device if capturable else torch.device("cpu"))
        and same_layout(param, grad, exp_avg, exp_avg_sq, in_logical_order=coded)
        and not (normalize and not can_sum_over_shards(item[0]))
        and not (measures and capturable)  # the step counts are on the device
    )
    if not fits or _failure(param.device, param.dtype, exp_avg.dtype, capturable, normalize, bits):
        return None
    return (param.device, param.dtype, exp_avg.dtype, capturable, bits), None


def _same_place(correction: Tensor, param: Tensor) -> bool:
    """Whether the correction of element i of memory is at i."""
    return correction.shape == param.shape and correction.stride() == param.stride()


def _more_names(state: dict[str, Any]) -> list[str]:
    """The entries of a state that only 8-bit moments and corrected weights have."""
    return [name for name in (CORRECTION, *SCALES) if name in state]


@functools.cache
def _failure(
    device: torch.device,
    param_dtype: torch.dtype,
    state_dtype: torch.dtype,
    capturable: bool,
    normalize: bool,
    correction_bits: int = 0,
) -> str | None:
    """Try the kernels on one element, before any step is counted; return why they failed, or None."""
    group = {
        "lr": 0.0,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "switch_rate": 0.0,
        "inverse_scale": 1.0,
        "normalize_inverse": normalize,
        "maximize": False,
        "capturable": capturable,
    }
    try:
        param, grad = (torch.zeros(1, 1, dtype=param_dtype, device=device) for _ in range(2))
        exp_avg, exp_avg_sq = (torch.zeros(1, 1, dtype=state_dtype, device=device) for _ in range(2))
        step = torch.zeros((), device=device if capturable else "cpu")
        state = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "step": step}
        if state_dtype == torch.int8:
            state |= {name: torch.zeros(1, 1, device=device) for name in SCALES}
        if correction_bits:
            integers = torch.int8 if correction_bits == 8 else torch.int16
            state[CORRECTION] = torch.zeros(1, 1, dtype=integers, device=device)
        part = Part([plan.Member(0, 0, (param, grad, exp_avg, exp_avg_sq, step), state, None)], False, {})
        part.run(plan.Found([param], [param], [grad], [grad.data_ptr()]), [group])
    except Exception as error:  # from Triton, the compiler that it calls, or the driver
        reason = f"{type(error).__name__}: {error}"
        _report(device, reason)
        return reason
    return None


@functools.cache
def _report(device: torch.device, reason: str) -> None:
    """Warn once, however many variants of the kernels fail for the same reason."""
    logger.warning("The CUDA kernel of hf_dualadam cannot run on %s, so steps take longer: %s", device, reason)


class _Tables(NamedTuple):
    """The tables on the device that do not change while a plan fits."""

    tensors: Tensor
    chunks: Tensor  # the tensor of each chunk
    ones: Tensor  # norm ratios of tensors that are not normalized


class Part(plan.Part):
    """The tensors of one device, one pair of dtypes and one value of ``capturable``."""

    def __init__(self, members: list[plan.Member], *args: Any) -> None:
        """Collect the contents of the tables; the first step sends them."""
        super().__init__(members, *args)
        param, _, exp_avg, *_ = members[0].operands
        self._device, self._dtypes = param.device, (param.dtype, exp_avg.dtype)
        self._real = torch.float64 if param.dtype == torch.float64 else torch.float32
        correction = members[0].state.get(CORRECTION)
        self._correction_bits = 0 if correction is None else 8 * correction.element_size()
        self._coded = exp_avg.dtype == torch.int8
        self._launch = _LAUNCH_BLOCKS if self._coded else _LAUNCH
        kernels = load()
        self._variant = [getattr(kernels.tl, name) for name in _DTYPES[self._dtypes] if name]
        if self._coded:
            from . import blocks_triton as blocks

            self._norms_kernel, self._update_kernel = blocks.norms_blocks_kernel, blocks.update_blocks_kernel
        else:
            self._norms_kernel, self._update_kernel = kernels.norms_kernel, kernels.update_kernel
            self._variant.append(kernels.tl.float64 if self._real == torch.float64 else kernels.tl.float32)
        self._rows_of_elements = array("q", (max(1, member.operands[0].shape[1:].numel()) for member in members))
        self._more = {
            name: array("q", addresses_of([local_tensor(member.state[name]) for member in members]))
            for name in _more_names(members[0].state)
        }
        n_chunks = [*map(self._chunks_of, self.numels, self._rows_of_elements)]
        self._n_chunks, self._first_chunks = (
            array("q", n_chunks),
            array("q", itertools.accumulate(n_chunks, initial=0)),
        )
        # On the host, the scalars of a step are computed once per group and step count.
        self._scalar_groups, self._counts = [0], array("f", [-1])
        self._scalar_rows = array("q", [0]) * len(members)
        # What has been sent, and for which stream.
        self._stream: int | None = None
        self._tables: _Tables | None = None
        self._grads: tuple[list[int], Tensor] | None = None
        self._options: tuple[array[Any], Tensor] | None = None
        self._capturing = False

    def _chunks_of(self, numel: int, row: int) -> int:
        """The number of programs for a tensor; blocks of 8-bit moments do not cross rows."""
        kernels = load()
        if self._coded:
            return -(-numel // row * -(-row // BLOCK) // kernels.tables.BLOCKS.value)
        return -(-numel // kernels.tables.CHUNK.value)

    def run(self, found: plan.Found, groups: list[plan.Group]) -> None:
        """Count the step and update, without waiting for the device."""
        with self._on_its_stream():
            self._run(found, groups)
        mark_as_written(found.owners)

    @contextlib.contextmanager
    def _on_its_stream(self) -> Iterator[None]:
        """Make the device the current one, and drop tables sent on another stream: this one does not wait for it."""
        with torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext():
            self._capturing, stream = _is_capturing(self._device), _stream(self._device)
            if not self._capturing and self._stream != stream:
                self._tables = self._grads = self._options = None
                self._stream = stream
            yield

    def _run(self, found: plan.Found, groups: list[plan.Group]) -> None:
        own = [groups[index] for index in dict.fromkeys(self.groups)]
        if own[0]["capturable"]:
            self._scalar_rows = array("q", range(len(self.groups)))
            normalized = any(group["normalize_inverse"] for group in own)
            tables = self._send_tables()
            scalars = self._scalars_on_device(groups, tables)
        else:
            rows = self._count(groups)
            normalized = any(row.normalize_inverse and row.inverse_weight for row in rows)
            tables, scalars = self._send_tables(), self._send_scalars(rows, groups)
        grads = self._send_grads(found.grad_addresses)
        norm_ratios = tables.ones
        if normalized:
            sums = self._norm_sums(tables, grads, scalars)
            sum_over_shards(sums, found.owners)
            norm_ratios = norm_ratio(*sums.sqrt_().unbind(1)).to(self._real)
        if len(tables.chunks):
            arguments = tables.tensors, grads, tables.chunks, scalars, norm_ratios
            variant = *self._variant, self._correction_bits, load().tables.LAYOUT
            self._update_kernel[(len(tables.chunks),)](*arguments, *variant, **self._launch)

    def _norm_sums(self, tables: _Tables, grads: Tensor, scalars: Tensor) -> Tensor:
        """Squared norms of each tensor's m/d and m*d in the coming update, in float64; 1 if it is not normalized."""
        kernels, n_chunks = load(), len(tables.chunks)
        chunk_sums = torch.empty(4 * n_chunks, dtype=self._real, device=self._device)
        sums = torch.empty(len(self.groups), 2, dtype=torch.float64, device=self._device)
        layout = kernels.tables.LAYOUT
        if n_chunks:
            arguments = tables.tensors, grads, tables.chunks, scalars, chunk_sums
            self._norms_kernel[(n_chunks,)](*arguments, *self._variant, layout, **self._launch)
        kernels.norm_sums_kernel[(len(sums),)](tables.tensors, scalars, chunk_sums, sums, layout, **_LAUNCH_SUMS)
        return sums

    def counts(self) -> array[float]:
        """The step counts of all tensors, which are on the host."""
        return read_steps(self.addresses[3])

    def last_norms(self, found: plan.Found, groups: list[plan.Group]) -> Tensor:
        """Use the norms kernel twice: beta1 = beta2 = 1 leaves m and v as they are, and d = 1 gives the norm of m."""
        with self._on_its_stream():
            self._group_by_count(groups)
            tables, grads = self._send_tables(), self._send(self.addresses[0])  # times 0: any gradients do
            rows = [_scalars(groups[index], max(t, 1)) for index, t in zip(self._scalar_groups, self._counts)]
            frozen = [row._replace(beta1=1, beta2=1, sign=0, inverse_weight=1, normalize_inverse=True) for row in rows]
            directions = self._norm_sums(tables, grads, self._send_rows(frozen))
            frozen = [row._replace(eps=1, bias2_rsqrt=0) for row in frozen]
            first = self._norm_sums(tables, grads, self._send_rows(frozen))[:, :1]
            self._tables = None  # large, and seldom needed
            sizes = torch.stack(torch._foreach_norm(found.params, dtype=self._real)).double().square()
            return torch.cat([directions, first, sizes.unsqueeze(1)], 1).cpu()

    # ---- scalars ----

    def _count(self, groups: list[plan.Group]) -> list[StepScalars]:
        """Count the step on the host; returns the rows of the table of scalars."""
        for row, count in enumerate(self._counts):
            self._counts[row] = count + 1
        if not count_steps(self.addresses[3], self._scalar_rows, self._counts):
            self._group_by_count(groups)
        return [_scalars(groups[index], t) for index, t in zip(self._scalar_groups, self._counts)]

    def _group_by_count(self, groups: list[plan.Group]) -> None:
        """Give a row of the table of scalars to every combination of group and step count."""
        rows: dict[tuple[int, float], int] = {}
        self._scalar_rows = array("q", (rows.setdefault(key, len(rows)) for key in zip(self.groups, self.counts())))
        self._scalar_groups, self._counts = [group for group, _ in rows], array("f", (count for _, count in rows))
        self._tables = None

    def _send_scalars(self, rows: list[StepScalars], groups: list[plan.Group]) -> Tensor:
        table = self._send_rows(rows)
        for row, index in enumerate(self._scalar_groups):
            group = groups[index]
            if _is_on_device(group["lr"]):  # the row is that of lr = 1
                kernels, lr = load(), group["lr"].detach().reshape(()).double()
                own = table[row * kernels.tables.N_SCALARS.value :]
                own[kernels.tables.STEP_SIZE.value].mul_(lr)
                own[kernels.tables.DECAY.value].copy_(1 - lr * group["weight_decay"])
        return table

    def _send_rows(self, rows: list[StepScalars]) -> Tensor:
        """Send the table of scalars."""
        typecode = "d" if self._real == torch.float64 else "f"
        return self._send(array(typecode, itertools.chain.from_iterable(map(_row, rows, self._counts))))

    def _scalars_on_device(self, groups: list[plan.Group], tables: _Tables) -> Tensor:
        """Count the step on the device and compute a row of scalars for each tensor."""
        kernels = load()
        options = array("d", itertools.chain.from_iterable(map(_options, groups)))
        if self._capturing:
            table = self._send(options)
        else:
            if self._options is None or self._options[0] != options:
                self._options = options, self._send(options)
            table = self._options[1]
        for row, group in enumerate(groups):
            if _is_on_device(group["lr"]):
                table[row * kernels.tables.N_OPTIONS.value + kernels.tables.LR.value].copy_(
                    group["lr"].detach().reshape(())
                )
        n = len(self.groups)
        scalars = torch.empty(n * kernels.tables.N_SCALARS.value, dtype=self._real, device=self._device)
        kernels.step_scalars_kernel[(n,)](tables.tensors, table, scalars, kernels.tables.LAYOUT, **_LAUNCH)
        return scalars

    # ---- tables ----

    def _send(self, numbers: array[Any]) -> Tensor:
        return _on_device(numbers, self._device, self._capturing)

    def _send_tables(self) -> _Tables:
        if self._tables is None:
            tables = self._new_tables()
            if self._capturing:  # only replays of this graph will fill them
                return tables
            self._tables = tables
        elif self._capturing:
            key = (self._device, self._rows().tobytes())
            self._tables = self.graph_tables.setdefault(key, self._tables)
        return self._tables

    def _rows(self) -> array[int]:
        """The table of tensors."""
        kernels, n = load(), len(self.groups)
        columns = {
            kernels.tables.PARAM.value: self.addresses[0],
            kernels.tables.EXP_AVG.value: self.addresses[1],
            kernels.tables.EXP_AVG_SQ.value: self.addresses[2],
            kernels.tables.STEP.value: self.addresses[3],
            kernels.tables.NUMEL.value: array("q", self.numels),
            kernels.tables.FIRST_CHUNK.value: self._first_chunks[:n],
            kernels.tables.SCALARS.value: self._scalar_rows,
            kernels.tables.OPTIONS.value: array("q", self.groups),
            kernels.tables.ROW.value: self._rows_of_elements,
            kernels.tables.N_CHUNKS.value: self._n_chunks,
        }
        places = dict(zip((CORRECTION, *SCALES), (kernels.tables.CORRECTION, *_scale_columns(kernels.tables))))
        columns |= {places[name].value: addresses for name, addresses in self._more.items()}
        rows = array("q", [0]) * (n * kernels.tables.N_COLUMNS.value)
        for column, values in columns.items():
            rows[column :: kernels.tables.N_COLUMNS.value] = values
        return rows

    def _new_tables(self) -> _Tables:
        device, n = self._device, len(self.groups)
        numbers = torch.arange(n, dtype=torch.int32, device=device)
        chunks = numbers.repeat_interleave(self._send(self._n_chunks), output_size=self._first_chunks[-1])
        return _Tables(self._send(self._rows()), chunks, torch.ones(n, dtype=self._real, device=device))

    def _send_grads(self, addresses: list[int]) -> Tensor:
        if self._capturing:
            return self._send(array("q", addresses))
        if self._grads is None or self._grads[0] is not addresses:
            self._grads = addresses, self._send(array("q", addresses))
        return self._grads[1]


def _scale_columns(tables: Any) -> tuple[Any, ...]:
    return tables.EXP_AVG_SCALE, tables.EXP_AVG_SQ_MIN, tables.EXP_AVG_SQ_MAX


def _on_device(numbers: array[Any], device: torch.device, capturing: bool) -> Tensor:
    """Send numbers to the device without waiting for it; during a graph's capture, as arguments of kernels."""
    dtype = _TORCH_DTYPES[numbers.typecode]
    if capturing:
        table = torch.zeros(len(numbers), dtype=dtype, device=device)
        torch._foreach_add_(list(table.unbind()), numbers.tolist())
        return table
    host = torch.frombuffer(numbers, dtype=dtype)
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True, copy=True)


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _scalars(group: plan.Group, step: float) -> StepScalars:
    """The scalars of a step; if lr is on a device, for lr = 1, to be multiplied there."""
    lr = 1.0 if _is_on_device(group["lr"]) else float(group["lr"])
    names = ("betas", "eps", "weight_decay", "switch_rate", "inverse_scale", "normalize_inverse", "maximize")
    return step_scalars(step, lr=lr, **{name: group[name] for name in names})


def _row(s: StepScalars, step: float) -> tuple[float, ...]:
    """A row of the table of scalars."""
    moments = (s.beta1, 1 - s.beta1, s.beta2, 1 - s.beta2, s.eps, s.sign)
    normalize = float(s.normalize_inverse and s.inverse_weight != 0)
    return (
        *moments,
        s.decay,
        s.step_size,
        s.bias2_rsqrt,
        s.adam_weight,
        s.inverse_weight,
        normalize,
        dither(step),
    )


def _options(group: plan.Group) -> tuple[float, ...]:
    """A row of the table of options, without an lr that is on a device, which is filled in there."""
    lr = 0.0 if _is_on_device(group["lr"]) else float(group["lr"])
    sign = -1.0 if group["maximize"] else 1.0
    rest = (group[name] for name in ("eps", "weight_decay", "switch_rate", "inverse_scale"))
    return lr, *group["betas"], *rest, sign, float(group["normalize_inverse"])


def _is_on_device(lr: float | Tensor) -> bool:
    return isinstance(lr, Tensor) and lr.device.type != "cpu"
