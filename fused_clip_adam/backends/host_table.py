"""`tensor_table` in Python: the words and the refusals of csrc/cpu/table.cpp, for installations without a C++ compiler.

lists of tensors -> rows (struct Row of csrc/table.h), stride records -> one int64 tensor on the host

tests/test_triton_interpreter.py holds it to the operator, word for word.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_SLOTS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")
_PARAM, _GRAD, _EXP_AVG = 0, 1, 2
_SAMPLES = 16
_DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
"""enum DType of csrc/table.h."""
_NAMES = ("float64", "float32", "bfloat16", "float16")
_BYTES = (8, 4, 2, 2)
_MAX_DIMS = 64

_found_disjoint: dict[int, int] = {}
"""Fingerprints of tables without overlaps, at most 64: addresses rarely change from step to step."""


class _Meta(NamedTuple):
    """What a row needs to know of one tensor."""

    sizes: torch.Size
    strides: tuple[int, ...]
    contiguous: bool
    dtype: int
    address: int


class _Range(NamedTuple):
    """The memory of one slot of one row."""

    begin: int
    end: int
    row: int
    slot: int


class _Row(NamedTuple):
    words: list[int]
    metas: list[_Meta | None]
    flat: bool
    strided: bool
    numel: int


def tensor_table(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    bias_weights: list[Tensor],
    group: int,
    samples: int = -1,
) -> Tensor:
    """Checks a batch's tensors and returns their table: int64, see csrc/cpu/table.cpp.

    Args:
        params, grads, exp_avgs, exp_avg_sqs, steps: parallel lists. max_exp_avg_sqs, bias_weights: the same, or empty.
        group: index of the parameter group.
        samples: where not negative, every gradient is a stack of so many samples, [samples, *shape].

    Raises:
        RuntimeError: a shape, dtype or device that does not fit; tensors that overlap themselves or each other; a
            pending negation; a storage without memory.
    """
    lists = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs)
    _refuse_lazy(*lists, steps, bias_weights)
    if params:
        _check_one_device(params[0].device, (*zip(_SLOTS, lists), ("steps", steps), ("bias_weights", bias_weights)))
    rows = _make_rows(lists, steps, bias_weights, group, samples)
    n = len(rows)
    words, records = [n], []
    for row in rows:
        if row.strided:
            row.words[13] = 1 + n * len(row.words) + len(records)
            sizes = row.metas[_PARAM].sizes
            records += [len(sizes), *sizes]
            for meta in row.metas:
                records += (0,) * len(sizes) if meta is None else meta.strides
        words += row.words
    table = torch.tensor(words + records, dtype=torch.int64, device="cpu")
    _check_disjoint(rows, hash(tuple(words + records)))
    return table


def check_tensors(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    bias_weights: list[Tensor],
    group: int,
) -> None:
    """What `tensor_table` refuses, but for tensors that are on several devices."""
    lists = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs)
    _refuse_lazy(*lists, steps, bias_weights)
    rows = _make_rows(lists, steps, bias_weights, group, -1)
    _check_disjoint(rows, hash(tuple(tuple(row.metas) for row in rows)))


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill a range of memory without holes, in whatever order."""
    return tensor.is_contiguous() or _is_dense(_Meta(tensor.shape, tensor.stride(), False, 0, 0))


def _make_rows(lists, steps: list[Tensor], bias_weights: list[Tensor], group: int, samples: int) -> list[_Row]:
    params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs = lists
    n = len(params)
    required, optional = (grads, exp_avgs, exp_avg_sqs, steps), (max_exp_avg_sqs, bias_weights)
    if any(len(x) != n for x in required) or any(x and len(x) != n for x in optional):
        raise RuntimeError("tensor_table: lists differ in length")
    return [_make_row(lists, steps, bias_weights, group, samples, i) for i in range(n)]


def _refuse_lazy(*lists: list[Tensor]) -> None:
    if any(tensor.is_neg() or tensor._is_zerotensor() for tensors in lists for tensor in tensors):
        raise RuntimeError(
            "a parameter, gradient or state has a pending negation or is a ZeroTensor; make it real first: "
            "tensor.resolve_neg().clone()"
        )


def _check_one_device(device: torch.device, lists) -> None:
    """A row of device addresses that held one of the host's (or of another device) would be read by a kernel."""
    for name, tensors in lists:
        for i, tensor in enumerate(tensors):
            if tensor.device != device:
                raise RuntimeError(f"{name}[{i}] is not on the device of params[0]")


def _read_meta(tensor: Tensor, name: str, index: int) -> _Meta:
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None:
        raise RuntimeError(f"{name}[{index}] must be float64, float32, bfloat16 or float16")
    sizes = tensor.shape
    if len(sizes) > _MAX_DIMS:
        raise RuntimeError(f"{name}[{index}] has {len(sizes)} dimensions; accepted: up to {_MAX_DIMS}")
    address = tensor.data_ptr()
    if address == 0 and 0 not in sizes:
        raise RuntimeError(f"{name}[{index}] has no memory (was its storage resized to 0?)")
    return _Meta(sizes, tensor.stride(), tensor.is_contiguous(), dtype, address)


def _make_row(lists, steps: list[Tensor], bias_weights: list[Tensor], group: int, samples: int, i: int) -> _Row:
    metas: list[_Meta | None] = []
    dtypes = [0, 0, 0]
    contiguous = same_order = True
    param, between = None, 0
    for slot, (name, tensors) in enumerate(zip(_SLOTS, lists)):
        if not tensors:
            metas.append(None)
            continue
        meta = _read_meta(tensors[i], name, i)
        stack = slot == _GRAD and samples >= 0
        if stack:
            if len(meta.sizes) != len(param.sizes) + 1 or meta.sizes[0] != samples:
                raise RuntimeError(f"grads[{i}] must be a stack of {samples} samples of the shape of params[{i}]")
            between, meta = meta.strides[0], _of_one_sample(meta)
        if param is None:
            param = meta
        if meta.sizes != param.sizes:
            raise RuntimeError(f"{name}[{i}] must have the shape of params[{i}]")
        if slot <= _EXP_AVG:
            dtypes[slot] = meta.dtype
        expected = dtypes[min(slot, 2)]
        if meta.dtype != expected:
            raise RuntimeError(f"{name}[{i}] is {_NAMES[meta.dtype]} but exp_avgs[{i}] is {_NAMES[expected]}")
        narrow_scores = stack and 0 not in (param.dtype, meta.dtype)
        if meta.dtype not in (param.dtype, _DTYPES[torch.float32]) and not narrow_scores:
            raise RuntimeError(
                f"{name}[{i}] is {_NAMES[meta.dtype]}; accepted for a {_NAMES[param.dtype]} parameter: the same, or "
                "float32"
            )
        if slot != _GRAD and not meta.contiguous and _overlaps_itself(meta):
            raise RuntimeError(
                f"{name}[{i}] has elements that share memory (an expanded view?); it cannot be updated in place"
            )
        metas.append(meta)
        contiguous = contiguous and meta.contiguous
        same_order = same_order and (meta.strides == param.strides or _same_strides(param, meta))
    flat = contiguous or (same_order and _is_dense(param))
    numel = param.sizes.numel()

    step = steps[i]
    step_meta = _read_meta(step, "steps", i)
    if step.numel() != 1 or step_meta.dtype > 1:
        raise RuntimeError(f"steps[{i}] must be a 0-d float32 or float64 tensor")
    weights_at = 0
    if bias_weights:
        weights = _read_meta(bias_weights[i], "bias_weights", i)
        if weights.dtype != 0 or weights.sizes.numel() != 2 or not weights.contiguous:
            raise RuntimeError(f"bias_weights[{i}] must be a contiguous float64 tensor of 2 elements")
        weights_at = weights.address
    addresses = [0 if meta is None else meta.address for meta in metas]
    words = [*addresses, step_meta.address, int(step_meta.dtype == 0), weights_at, numel, *dtypes]
    rows = param.sizes[0] if len(param.sizes) > 1 else 1
    words += [int(flat), 0, group, numel // rows if rows else numel]  # 0: tensor_table fills in a record's offset
    words += [samples, between]
    return _Row(words, metas, flat, not contiguous, numel)


def _of_one_sample(stack: _Meta) -> _Meta:
    """What a stack of samples has after its first dimension."""
    sizes, strides = stack.sizes[1:], stack.strides[1:]
    contiguous, expected = True, 1
    for size, stride in zip(reversed(sizes), reversed(strides)):
        contiguous = contiguous and (size == 1 or stride == expected)
        expected *= size
    return stack._replace(sizes=sizes, strides=strides, contiguous=contiguous or expected == 0)


def _sorted_dims(meta: _Meta) -> list[tuple[int, int]]:
    """The (stride, size) of dimensions longer than one, innermost first."""
    return sorted((stride, size) for stride, size in zip(meta.strides, meta.sizes) if size > 1)


def _overlaps_itself(meta: _Meta) -> bool:
    """Could two of its elements share an address? Each stride must step over all that lies inside it."""
    reach = 0
    for stride, size in _sorted_dims(meta):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _is_dense(meta: _Meta) -> bool:
    expected = 1
    for stride, size in _sorted_dims(meta):
        if stride != expected:
            return False
        expected *= size
    return True


def _same_strides(x: _Meta, y: _Meta) -> bool:
    return all(a == b or size <= 1 for a, b, size in zip(x.strides, y.strides, x.sizes))


# ---------------------------------------------------------------- memory that two tensors share


def _check_disjoint(rows: list[_Row], fingerprint: int) -> None:
    """Raises:
    RuntimeError: two written tensors share memory, or a gradient would be written while it is read.
    """
    if _found_disjoint.get(fingerprint % 64) == fingerprint:
        return
    ranges = []
    for r, row in enumerate(rows):
        for slot, meta in enumerate(row.metas):
            if meta is None or meta.address == 0 or row.numel == 0:
                continue
            extent = row.numel
            if row.strided:
                extent = 1 + sum((size - 1) * stride for size, stride in zip(meta.sizes, meta.strides))
            samples, between = row.words[_SAMPLES : _SAMPLES + 2]
            if slot == _GRAD and samples > 1:
                extent += (samples - 1) * between
            ranges.append(_Range(meta.address, meta.address + extent * _BYTES[meta.dtype], r, slot))
    ranges.sort(key=lambda own: own.begin)
    for i, x in enumerate(ranges):
        for j in range(i + 1, len(ranges)):
            y = ranges[j]
            if y.begin >= x.end:
                break
            if (x.slot == _GRAD and y.slot == _GRAD) or _may_share(rows, x, y):
                continue
            raise RuntimeError(
                f"{_SLOTS[x.slot]}[{x.row}] and {_SLOTS[y.slot]}[{y.row}] share memory, so that updating one would "
                "change the other. Pass each storage once"
            )
    _found_disjoint[fingerprint % 64] = fingerprint


def _may_share(rows: list[_Row], x: _Range, y: _Range) -> bool:
    # Reading a gradient that is its own parameter (or state), element for element, is well defined.
    same_row, one_reads = x.row == y.row, _GRAD in (x.slot, y.slot)
    if any(own.slot == _GRAD and rows[own.row].words[_SAMPLES] >= 0 for own in (x, y)):
        return False
    if same_row and one_reads and x.begin == y.begin and rows[x.row].flat:
        metas = rows[x.row].metas
        if metas[x.slot].dtype == metas[y.slot].dtype:
            return True
    if not rows[x.row].strided and not rows[y.row].strided:
        return False
    return not bool(torch.isin(_addresses(rows, x), _addresses(rows, y)).any())


def _addresses(rows: list[_Row], own: _Range) -> Tensor:
    """Addresses of every element, for the exact test where two bounding ranges meet and one of them is strided."""
    meta = rows[own.row].metas[own.slot]
    offsets = torch.zeros((), dtype=torch.int64, device="cpu")
    for size, stride in zip(meta.sizes, meta.strides):
        offsets = offsets.unsqueeze(-1) + torch.arange(size, device="cpu") * stride
    return meta.address + offsets.reshape(-1) * _BYTES[meta.dtype]
