"""What the kernels' structs look like from Python, and arrays in the form that kernels read."""

from __future__ import annotations

import functools
import math
import weakref
from typing import Any

import numpy as np

from pyattn.arrays import Array, dtype_name

from .device import Device
from .walk import Walk, coarse

TILE = 64

ELEMENTS = {"float16": 0, "bfloat16": 1, "float32": 2, "float64": 3}
"""The dtypes of q, k and v by their number in element.cuh."""

CHUNK_BYTES = 16
"""Kernels copy so many bytes at a time, from addresses that are multiples of it."""


def struct(*fields: tuple[str, Any]) -> np.dtype:
    """Return the dtype of a C++ struct with these fields."""
    return np.dtype(list(fields), align=True)


def fields(kind: str, names: str) -> list[tuple[str, str]]:
    """Return fields of one kind."""
    return [(name, kind) for name in names.split()]


OPERAND = struct(*fields("u8", "at"), *fields("i8", "b h n"))
LISTS = struct(*fields("u8", "start first count at names bits layout"), *fields("i4", "lines"))


@functools.cache
def structs(sum_type: str) -> dict[str, np.dtype]:
    """Return the structs of softmax.cuh, for sums that are "f4" or "f8"."""
    term = struct(*fields("u8", "at item"), *fields("i8", "b h n m"))
    scores = struct(
        *fields("u8", "scale"), *fields(sum_type, "softcap"), ("bias", term),
        *fields("u8", "offsets"), *fields("i8", "offsets_h"),
        *fields("i4", "offsets_width offset_origin"),
        ("gate", term), *fields("i4", "gate_block gate_shift"), *fields(sum_type, "gate_ramp"),
        *fields("i4", "gate_width"), *fields("u4", "threshold seed_low seed_high"),
        *fields(sum_type, "keep"), *fields("u8", "q_positions"), *fields("i8", "q_positions_b"),
        *fields("u8", "k_positions"), *fields("i8", "k_positions_b"), *fields("u8", "streams"),
        *fields("i8", "streams_b"))
    problem = struct(
        ("q", OPERAND), ("k", OPERAND), ("v", OPERAND), ("lists", LISTS),
        *fields("u8", "q_lengths kv_lengths"), *fields("i4", "batch heads groups n m d e"),
        ("scores", scores))
    return {"term": term, "scores": scores, "problem": problem}


def sum_type(name: str) -> str:
    """Return the type that a dtype's sums have, by its name."""
    return "f8" if name == "float64" else "f4"


def readable(device: Device, x: Array) -> Array:
    """Return `x` (..., width) as kernels read it: a copy only if its strides or address forbid.

    The copy's rows have zeros up to a multiple of 16 bytes, which kernels read along.
    """
    steps = [stride for stride, size in zip(x.strides[:-1], x.shape[:-1], strict=True) if size > 1]
    fits = x.shape[-1] == 1 or x.strides[-1] == x.itemsize
    if fits and not any(step % CHUNK_BYTES for step in (*steps, device.address(x),
                                                        x.shape[-1] * x.itemsize)):
        return x
    copy = device.zeros((*x.shape[:-1], roomy_width(x.shape[-1], x.dtype)), x.dtype)
    copy[..., :x.shape[-1]] = x
    return narrowed(device, copy, x.shape[-1])


def roomy(device: Device, shape: tuple[int, ...], dtype: Any) -> Array:
    """Return an empty array whose rows have room up to a multiple of 16 bytes."""
    return narrowed(device, device.empty((*shape[:-1], roomy_width(shape[-1], dtype)), dtype),
                    shape[-1])


def narrowed(device: Device, x: Array, width: int) -> Array:
    """Return the first columns of `x`; kernels may reach all of them."""
    device.address(x)
    return x[..., :width]


def roomy_width(width: int, dtype: Any) -> int:
    """Return `width` rounded up to a multiple of 16 bytes."""
    chunk = CHUNK_BYTES // np.dtype(dtype).itemsize
    return -(-width // chunk) * chunk


def copied(device: Device, x: np.ndarray, dtype: Any = None) -> Array:
    """Return a copy of a host array; of records, which CuPy does not know, the bytes."""
    x = np.ascontiguousarray(x, dtype)
    return device.constant(x.view(np.uint8) if x.dtype.names else x)


class Keeper:
    """A device, and the arrays whose addresses a launch was given: they must outlive it."""

    def __init__(self, device: Device) -> None:
        self.device, self._kept = device, list[Array]()

    def address(self, x: Array | None) -> int:
        """Return where `x` is; 0 for None."""
        if x is None:
            return 0
        self._kept.append(x)
        return self.device.address(x)

    def constant(self, x: np.ndarray, dtype: Any = np.int32) -> int:
        """Return where a copy of a host array is."""
        return self.address(copied(self.device, x, dtype))


def operand(device: Device, x: Array) -> tuple[int, int, int, int]:
    """Return the OPERAND of an array (B, H, N, width)."""
    return (device.address(x) if math.prod(x.shape) else 0,
            *(stride // x.itemsize for stride in x.strides[:3]))


def term(keep: Keeper, x: Array, item: np.ndarray) -> tuple[int, ...]:
    """Return the term of an array (b, h, n, m): axes that it broadcasts along have no stride."""
    strides = (0 if size == 1 else stride // x.itemsize
               for size, stride in zip(x.shape[1:], x.strides[1:], strict=True))
    return keep.address(x), keep.constant(item), x.strides[0] // x.itemsize, *strides


def as_sums(x: Array, name: str) -> Array:
    """Return `x` in the dtype in which sums are carried for q of dtype `name`."""
    wanted = np.float64 if name == "float64" else np.float32
    return x if dtype_name(x) == np.dtype(wanted).name else x.astype(wanted)


_lists: weakref.WeakKeyDictionary[Any, dict[Any, tuple[tuple[int, ...], tuple[Array, ...]]]] = (
    weakref.WeakKeyDictionary())


def lists(keep: Keeper, blocks: Any, layout: np.ndarray, rows: int,
          transposed: bool = False) -> tuple[int, ...]:
    """Return the LISTS of a BlockMask with lines of `rows` tiles; its arrays stay on the device."""
    known = _lists.setdefault(blocks, {})
    device = keep.device
    key = (device, device.stream, rows, transposed)
    if key not in known:
        walk: Walk = coarse(blocks, rows=rows, columns=1, transposed=transposed)
        arrays = tuple(device.constant(x) for x in walk)
        known[key] = tuple(device.address(x) for x in arrays), arrays
    addresses, arrays = known[key]
    return (*addresses, keep.constant(layout), arrays[0].shape[1] - 1)
