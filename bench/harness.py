"""Measures a row: checks that rivals agree, times them in turns, counts peak memory.

Machines drift, so a time alone says little: rivals are timed in one process, in turns, and what is
reported is the median of the ratios within a turn, with its quartiles.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .content import ContentRow
from .linear import LinearRow
from .rivals import JUDGES, RIVALS, Inputs, Unsupported, gemms, reads
from .rows import PatternRow, Row

TOLERANCE = {"float64": 1e-11, "float32": 1e-5, "bfloat16": 5e-2, "float16": 5e-3}
"""Largest difference from the float64 formulas, relative to the largest value, that is timed."""

FEWEST = 3
"""Turns that are taken however long they last; more are, until `LONGEST` times the seconds."""

LONGEST = 3

WAKEFUL = 0.5
"""A call of more seconds than this wakes its threads in a small part of its time."""

PATIENCE = 6.0
"""A call of more seconds than this is timed in the first turn alone."""

ENOUGH = 30.0
"""A call of more seconds than this is made once, and that is timed."""

SHORTEST = 0.02
"""Seconds that one timing takes at least; a faster call is repeated."""


@dataclasses.dataclass(frozen=True)
class Spread:
    """A median with its quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def times(self, factor: float) -> Spread:
        return Spread(self.median * factor, self.low * factor, self.high * factor)


@dataclasses.dataclass
class Measurement:
    """All about one row and pass."""

    row: Row
    backward: bool
    seconds: dict[str, Spread] = dataclasses.field(default_factory=dict)
    """By rival, the time of one call."""
    ratios: dict[str, Spread] = dataclasses.field(default_factory=dict)
    """By rival, its time divided by the first rival's: above 1, the first is faster."""
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    """By rival, the largest difference from float64, relative to the largest value."""
    absent: dict[str, str] = dataclasses.field(default_factory=dict)
    """By rival, why it was not timed."""
    different: list[str] = dataclasses.field(default_factory=list)
    """Rivals that compute something else, such as all pairs: timed, and compared with nothing."""
    machine: float | None = None
    """Work in a second of the machine's own matrix product, or read, in the same turns."""
    share: Spread | None = None
    """The first rival's rate divided by that, in each turn."""
    megabytes: dict[str, float | None] = dataclasses.field(default_factory=dict)
    """By rival, peak memory above the inputs."""

    def rate(self, rival: str) -> float:
        """Work in a second: multiplications and additions, or bytes read."""
        return self.row.work(self.backward) / self.seconds[rival].median


def measure(row: Row, backward: bool, *, seconds: float = 3.0, memory: bool = True,
            rest: float = 0.0) -> Measurement:
    """Measure one row and pass; `seconds` is about what the turns take together."""
    found = Measurement(row, backward)
    calls = _agreeing(found, row.inputs())
    calls["machine"], work = _machine(row)
    times = alternate(calls, seconds, rest=rest)
    machine = times.pop("machine")
    found.machine = work / statistics.median(machine)
    found.seconds = {rival: Spread.of(values) for rival, values in times.items()}
    first = row.rivals[0]
    if first in times:
        found.ratios = {rival: ratios(values, times[first])
                        for rival, values in times.items() if rival != first}
        found.share = ratios(machine, times[first]).times(row.work(backward) / work)
    if memory and row.memory:
        found.megabytes = {rival: peak_megabytes(row, backward, rival) for rival in times
                           if rival not in found.different}
    return found


def _agreeing(found: Measurement, inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """The calls of those rivals that are here and give the right result."""
    row = found.row
    right = JUDGES[row.function](row, inputs, found.backward)
    calls = {}
    found.absent.update({rival: reason for rival, reason in row.without.items()
                         if rival in row.rivals})
    found.absent.update({rival: f"it needs {gigabytes} GB, more than half of this machine's memory"
                         for rival, gigabytes in row.gigabytes.items()
                         if gigabytes > machine_gigabytes() / 2})
    for rival in row.rivals:
        if rival in found.absent:
            continue
        try:
            call, host = RIVALS[row.function][rival](row, inputs, found.backward)
            error = None if host is None else difference(host(call()), right)
        except (ImportError, Unsupported) as reason:
            found.absent[rival] = str(reason)
            continue
        if error is None:
            found.different.append(rival)
            calls[rival] = call
            continue
        found.errors[rival] = error
        if error <= TOLERANCE[row.dtype]:
            calls[rival] = call
        else:
            found.absent[rival] = f"wrong by {error:.1e} of the largest value"
    return calls


def machine_gigabytes() -> float:
    """Memory of the machine; inf if it is not told."""
    if not hasattr(os, "sysconf"):
        return float("inf")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def difference(got: Iterable[np.ndarray], right: Iterable[np.ndarray]) -> float:
    """The largest difference, relative to the largest value of its array; inf if any is NaN."""
    worst = 0.0
    for a, b in zip(got, right, strict=True):
        error = np.max(np.abs(a.astype(np.float64) - b)) / np.max(np.abs(b))
        worst = max(worst, float(error) if np.isfinite(error) else np.inf)
    return worst


def alternate(calls: dict[str, Callable[[], Any]], seconds: float, *, least: int = 5,
              most: int = 50, rest: float = 0.0) -> dict[str, list[float]]:
    """Time each call once per turn, for about `seconds`.

    Every list has one time per turn, but that of a call slower than `PATIENCE` has the first alone.

    Before each timing, `rest` seconds pass and the call is made once: worker threads of the library
    that ran last may spin for a while, and this one's must wake up.
    """
    alone = {name: _timed(call, 1) for name, call in calls.items()}
    repeats = {name: max(1, round(SHORTEST / took)) for name, took in alone.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    began = time.perf_counter()
    for turn in itertools.count():
        passed = time.perf_counter() - began
        if turn >= most or (turn >= least and passed > seconds) or (
                turn >= FEWEST and passed > LONGEST * seconds):
            return times
        for name in order:
            if turn and alone[name] > PATIENCE:
                continue
            if alone[name] > ENOUGH:
                times[name].append(alone[name])
                continue
            time.sleep(rest)
            if alone[name] < WAKEFUL:
                calls[name]()
            times[name].append(_timed(calls[name], repeats[name]))
        order.append(order.pop(0))
    raise AssertionError("unreachable")


def ratios(times: Sequence[float], first: Sequence[float]) -> Spread:
    """Of each turn that has both, the time divided by the first rival's."""
    return Spread.of([a / b for a, b in zip(times, first, strict=False)])


def _timed(call: Callable[[], Any], repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) / repeats


def _machine(row: Row) -> tuple[Callable[[], Any], float]:
    """What the machine does at best where `row` has its limit, and how much work that is."""
    if row.limit == "read":
        nbytes = int(row.work(False))
        return _fastest_read(nbytes), float(nbytes)
    size = 1024
    return _fastest_gemm(row.dtype, size), 2.0 * size**3


@functools.cache
def _fastest_gemm(dtype: str, size: int) -> Callable[[], Any]:
    return fastest(gemms(dtype, size))


@functools.lru_cache(maxsize=1)     # one, for the arrays are large
def _fastest_read(nbytes: int) -> Callable[[], Any]:
    return fastest(reads(nbytes))


def fastest(calls: dict[str, Callable[[], Any]]) -> Callable[[], Any]:
    """The call that takes the least time."""
    once = {name: _timed(call, 1) for name, call in calls.items()}
    # the first call may start threads; what is slower by far is not worth another
    near = [name for name in once if once[name] < 10 * min(once.values())]
    best = {name: min(_timed(calls[name], 1) for _ in range(8)) for name in near}
    return calls[min(best, key=lambda name: best[name])]


def peak_megabytes(row: Row, backward: bool, rival: str) -> float | None:
    """Peak memory of one call above its inputs, in a process of its own; None if not told.

    The process has run a small problem of the same kind before, so that libraries, compiled code
    and thread pools do not count.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    request = json.dumps({"row": dataclasses.asdict(row), "kind": type(row).__name__,
                          "backward": backward, "rival": rival})
    child = subprocess.run(
        [sys.executable, "-m", "bench.harness", request], capture_output=True, text=True,
        check=False, env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])})
    if child.returncode:
        raise RuntimeError(f"measuring the memory of {rival} failed:\n{child.stderr}")
    return float(child.stdout)


def _print_peak(request: str) -> None:
    wanted = json.loads(request)
    kinds = (Row, PatternRow, ContentRow, LinearRow)
    [kind] = [kind for kind in kinds if kind.__name__ == wanted["kind"]]
    row = kind(**wanted["row"])
    prepare = RIVALS[row.function][wanted["rival"]]

    def run(row: Row) -> Callable[[], Any]:
        return prepare(row, row.inputs(), wanted["backward"])[0]

    run(row.shortened(128))()
    call = run(row)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)     # what making the inputs has freed would hide as much of the call's own use
    Path("/proc/self/clear_refs").write_text("5")
    before = _high_water()
    call()
    print((_high_water() - before) / 1024)


def _high_water() -> int:
    """Kilobytes of the largest resident size since the last reset."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


if __name__ == "__main__":
    _print_peak(sys.argv[1])
