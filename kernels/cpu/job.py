"""From a Problem to the record that kernels read, and the arrays that live as long as it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import threads
from .memory import address, aligned
from .ownership import TermGradient, components
from .pack import TILE, pack, padded, source
from .records import JOB

PRODUCTS_PER_CHUNK = 2**21
"""A thread takes so many at a time, at least: some 20 microseconds."""


class Job:
    """One call: ``job[field]`` is the record's."""

    def __init__(self, problem: Any, lse: np.ndarray | None = None) -> None:
        p = problem
        self.dtype = np.dtype(np.float64 if p.q.dtype == np.float64 else np.float32)
        self.record = np.zeros(1, JOB)
        self.alive: dict[str, Any] = {}
        _, heads, n, d = p.q.shape
        _, groups, m, e = p.v.shape
        for name, value in dict(
                size=self.dtype.itemsize, heads=heads, groups=groups, n=n, m=m, d=d, e=e,
                d_padded=padded(d, self.dtype), e_padded=padded(e, self.dtype),
                row_tiles=-(-n // TILE), key_tiles=-(-m // TILE)).items():
            self[name] = value
        self["scale"] = self.hold("scale", p.scale, self.dtype)
        self.describe("q", p.q, p.q_lengths, self["scale"], lse)
        self.describe("k", p.k, p.kv_lengths)
        self.describe("v", p.v, p.kv_lengths)
        self.describe_mask(p)
        self.describe_terms(p)

    def __getitem__(self, name: str) -> Any:
        return self.record[0][name]

    def __setitem__(self, name: str, value: Any) -> None:
        self.record[0][name] = value

    def hold(self, name: str, x: np.ndarray, dtype: Any) -> int:
        """Keep `x`, contiguous, for as long as the job lives; return its address."""
        self.alive[name] = np.ascontiguousarray(x, dtype)
        return address(self.alive[name])

    def strided(self, name: str, x: np.ndarray) -> np.ndarray:
        """Keep `x` in the compute dtype, its own memory where it is that already."""
        self.alive[name] = np.require(x, self.dtype, ["ALIGNED"])
        return self.alive[name]

    def describe(self, name: str, x: np.ndarray, lengths: np.ndarray, scale: int = 0,
                 lse: np.ndarray | None = None) -> None:
        """Make `x` known to `pack_tile` under `name`."""
        lengths_at = self.hold(f"{name} lengths", lengths, np.int32)
        lse_at = 0 if lse is None else self.hold("lse", lse, self.dtype)
        self[name] = source(self.strided(name, x), lengths_at, scale, lse_at)[0]

    def describe_mask(self, p: Any) -> None:
        """Make the BlockMask known."""
        self["layout"] = self.hold("layout", p.layout, np.int32)
        self["bits"] = self.hold("bits", p.blocks.bits, np.uint64)
        for name in ("rows", "columns"):
            runs = getattr(p.blocks, name)
            self[name] = (
                self.hold(f"{name} start", runs.start, np.int64),
                *(self.hold(f"{name} {part}", getattr(runs, part), np.int32)
                  for part in ("first", "count", "tile", "names")), runs.start.shape[1] - 1)

    def describe_terms(self, p: Any) -> None:
        """Make the score terms known."""
        for name, term in (("bias", p.bias), ("gate", p.gate)):
            if term is not None:
                x = self.strided(name, term.array)
                strides = (0 if size == 1 else step
                           for size, step in zip(x.shape, x.strides, strict=True))
                self[name] = (address(x), self.hold(f"{name} item", term.item, np.int32), *strides)
        if p.offsets is not None:
            rows, self["offsets_width"] = p.offsets.shape
            self["offsets"] = self.hold("offsets", p.offsets, self.dtype)
            self["offsets_h"] = self["offsets_width"] * self["size"] if rows > 1 else 0
            self["offset_origin"] = p.offset_origin
        if p.sinks is not None:
            self["sinks"] = self.hold("sinks", p.sinks, self.dtype)
        self["softcap"] = p.softcap or 0
        if p.dropout:
            self["threshold"] = int(p.dropout * 2**32)
            self["keep"] = 1 / (1 - p.dropout)
            self["seed_low"], self["seed_high"] = p.dropout_seed % 2**32, p.dropout_seed >> 32
        for name in ("q_positions", "k_positions", "streams"):
            x = getattr(p, name)
            if x is not None:
                self[name] = self.hold(name, x, np.int32)
                self[f"{name}_b"] = 4 * x.shape[1] if len(x) > 1 else 0

    def pack(self, name: str, *, rows: bool = False, columns: bool = False) -> None:
        """Pack an array as a whole, its tiles or their transposes or both."""
        record = np.array([self[name]])
        self.alive[f"packed {name}"] = pack(record, self.dtype, rows=rows, columns=columns)
        self[name] = record[0]

    def unpack(self, *names: str) -> None:
        """Give the memory of packed copies back."""
        for name in names:
            del self.alive[f"packed {name}"]

    def own(self, owner: str, terms: dict[str, TermGradient], labels: list[np.ndarray], batch: int,
            heads: int) -> tuple[np.ndarray, np.ndarray]:
        """Hand the terms' gradients that `owner` sums to its pass, and the list of its pairs."""
        for name, term in terms.items():
            self[f"d{name}"] = term.record() if term.owner == owner else 0
            if term.owner == owner and term.array is not None:
                labels = [*labels, term.labels(heads)]
        members, start = components(labels, batch * heads)
        self["pairs"] = self.hold("pairs", members, np.int64)
        self["pair_start"] = self.hold("pair_start", start, np.int64)
        return members, start

    def run(self, kernel: Any, units: int, scratch_bytes: Callable[[int, int, int], int]) -> None:
        """Run `kernel` over its units of work, in chunks that are worth a thread's while."""
        start, count = self.alive["rows start"], self.alive["rows count"]
        tiles = max(1.0, count.sum() / max(1, start.shape[0] * (start.shape[1] - 1)))
        products = tiles * TILE * TILE * (self["d"] + self["e"] + 1)
        size = scratch_bytes(int(self["d_padded"]), int(self["e_padded"]), self.dtype.itemsize)
        place, unit = address(self.record), self.dtype.type(1)

        def work(first: int, last: int, scratch: np.ndarray) -> None:
            kernel(place, first, last, address(scratch), unit)

        threads.run(work, int(units), max(1, int(PRODUCTS_PER_CHUNK / products)),
                    lambda: aligned((size,), np.uint8))
