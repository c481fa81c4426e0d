"""Measures the tuning table of the CPU kernels for this host."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import ml_dtypes  # noqa: F401, gives NumPy the name bfloat16
import numpy as np

from pyattn.kernels.cpu import tuning
from pyattn.kernels.cpu.tuning import Table

from ..variants.attention import attention


def measure(advance: Callable[[str], None] = lambda text: None) -> Table:
    """Measure the table for this host; `advance` is told of every step."""
    found = tuning.DEFAULT
    for name, figures in tuning.CANDIDATES.items():
        for kind in tuning.KINDS:
            best = (_fastest_chunk if name == "chunk" else _longest_short)(found, kind, figures)
            found = dataclasses.replace(found, **{name: getattr(found, name) | {kind: best}})
            advance(f"{name} {kind}")
    return found


def _fastest_chunk(base: Table, kind: str, figures: tuple[int, ...]) -> int:
    call = _call(kind, heads=2, queries=1024, keys=1024)
    tables = {figure: dataclasses.replace(base, chunk=base.chunk | {kind: figure})
              for figure in figures}
    times = _alternate(call, tables)
    return min(times, key=times.__getitem__)


def _longest_short(base: Table, kind: str, figures: tuple[int, ...]) -> int:
    """Find up to how many queries reading in place beats packing."""
    longest = figures[0]
    for figure in figures[1:]:
        tables = {allowed: dataclasses.replace(base, short=base.short | {kind: allowed})
                  for allowed in (figures[0], figure)}
        times = _alternate(_call(kind, heads=4, queries=figure, keys=1024), tables)
        if times[figure] > times[figures[0]]:
            break
        longest = figure
    return longest


def _alternate(call: Callable[[], Any], tables: dict[int, Table], turns: int = 9,
               ) -> dict[int, float]:
    """Return the shortest time of a call by table, the tables taking turns."""
    times = dict.fromkeys(tables, np.inf)
    for _ in range(turns):
        for figure, candidate in tables.items():
            with tuning.trial(candidate):
                call()
                began = time.perf_counter()
                call()
                times[figure] = min(times[figure], time.perf_counter() - began)
    return times


def _call(kind: str, *, heads: int, queries: int, keys: int) -> Callable[[], Any]:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, heads, length, 64)).astype(kind)
               for length in (queries, keys, keys))
    return lambda: attention(q, k, v)
