"""How fast pyattn should be, and how much of that was reached."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

from .content import CONTENT, DECIDED, LONGEST
from .harness import Measurement, Spread
from .linear import FAR, LINEAR
from .linear import LENGTHS as LINEAR_LENGTHS
from .rows import PATTERNS, Row

FORWARD, BOTH, BACKWARD = "forward", "forward + backward", "backward"

MICROSECONDS, GROWTH, MACHINE, MEMORY = "microseconds", "growth", "machine", "memory"
MEGABYTES, DECIDING = "megabytes", "deciding"
"""What `Target.against` may be beside the name of a rival: the time of a call, the time per token
at the longest row divided by that at the shortest, the share of what the machine can do, the peak
memory divided by the least of those that compute the same, peak memory itself, and the share of the
time that a call does not take if it is told what to decide."""


@dataclasses.dataclass(frozen=True)
class Target:
    """One wish: of the rows that match, the worst must reach it."""

    text: str
    rows: str
    """A regular expression for the whole name of a row."""
    steps: str
    """The pass."""
    target: float
    stretch: float
    against: str = "torch"
    """A rival, whose time divided by pyattn's is meant, or what else is measured."""

    @property
    def backward(self) -> bool:
        return self.steps != FORWARD

    @property
    def smaller_is_better(self) -> bool:
        return self.against in (MICROSECONDS, GROWTH, MEMORY, MEGABYTES, DECIDING)

    def speaks_of(self, row: Row) -> bool:
        return re.fullmatch(self.rows, row.name) is not None

    def met(self, value: float) -> bool:
        return value <= self.target if self.smaller_is_better else value >= self.target


LONG = r"N=(512|2048|8192|16384), D=(64|128)"
AT_2048 = r"N=2048, D=(64|128)"
SHORT = r"(Swin windows.*, N=49, D=32|batch of 8 x 8 heads, N=64, D=64), float32"
WINDOW = r"causal window 256, N=16384, D=64, float32"
ALONE = r"causal window 256 alone, .*"



def _patterns(length: int, *left_out: str) -> str:
    names = "|".join(re.escape(name) for name in PATTERNS if name not in left_out)
    return rf"({names}), N={length}, .*"


QUARTER = "BlockBERT, 4 blocks"
"""Its pairs are a fourth of all, so it cannot be five times as fast."""

SMALL = "axial"
"""Others need little memory for it as well: output and gradients alone are a fourth of theirs."""

TARGETS = (
    Target("torch, float32, dense", rf"dense, {LONG}, float32", FORWARD, 1.1, 1.2),
    Target("torch, float32, causal", rf"causal, {LONG}, float32", FORWARD, 1.25, 1.4),
    Target("torch, float32, dense", rf"dense, {LONG}, float32", BOTH, 1.1, 1.2),
    Target("torch, float32, causal", rf"causal, {LONG}, float32", BOTH, 1.3, 1.5),
    Target("torch, float64", rf"(dense|causal), {LONG}, float64", BOTH, 1.2, 1.3),
    Target("torch, bfloat16 (CPU with AMX)", rf"(dense|causal), {LONG}, bfloat16", FORWARD,
           1.2, 1.7),
    Target("torch, bfloat16 (CPU with AMX)", rf"(dense|causal), {LONG}, bfloat16", BOTH, 2, 3),
    Target("torch, float16", rf"(dense|causal), {LONG}, float16", BOTH, 1.25, 2),
    Target("torch, boolean mask", r"boolean mask, .*, float32", BOTH, 1.3, 1.5),
    Target("torch, bias with gradient", r"bias with gradient, .*, float32", BOTH, 3, 4),
    Target("torch, causal window of 16384", WINDOW, FORWARD, 20, 40),
    Target("torch, causal window of 16384", WINDOW, BOTH, 20, 40),
    Target("time per token, longest window row / shortest", ALONE, FORWARD, 1.1, 1.0, GROWTH),
    Target("time per token, longest window row / shortest", ALONE, BOTH, 1.1, 1.0, GROWTH),
    Target("torch, Swin windows and N = 64", SHORT, BOTH, 1.5, 2.5),
    Target("microseconds of a tiny call", r"tiny call, .*", FORWARD, 30, 20, MICROSECONDS),
    Target("share of read bandwidth, decode", r"decode.*", FORWARD, 0.9, 0.97, MACHINE),
    *(Target(f"share of GEMM, {dtype}", rf"dense, {AT_2048}, {dtype}", steps, *wanted,
             MACHINE)
      for dtype, forward, backward in (("float32", (0.9, 0.95), (0.85, 0.92)),
                                       ("float64", (0.9, 0.95), (0.85, 0.92)),
                                       ("bfloat16", (0.5, 0.5), (0.5, 0.5)))
      for steps, wanted in ((FORWARD, forward), (BACKWARD, backward))),
    Target("NumPy", rf"(dense|causal), {AT_2048}, float32", FORWARD, 4, 4, "numpy"),
    Target("NumPy", rf"(dense|causal), {AT_2048}, float32", BOTH, 4, 4, "numpy"),
    Target("FlexAttention", rf"(dense|causal), {AT_2048}, .*", FORWARD, 2, 2, "flex"),
    Target("JAX", rf"(dense|causal), {AT_2048}, .*", FORWARD, 2, 2, "jax"),
)

PATTERN_TARGETS = tuple(
    target for steps in (FORWARD, BOTH) for target in (
        Target("pyattn over all pairs, N = 16384", _patterns(16384, QUARTER), steps, 5, 10,
               "pyattn dense"),
        Target("pyattn over all pairs, N = 16384, a fourth of the pairs",
               rf"{QUARTER}, N=16384, .*", steps, 3, 4, "pyattn dense"),
        Target("transformers, N = 16384", _patterns(16384), steps, 8, 16, "transformers"),
        Target("lucidrains, N = 16384", _patterns(16384), steps, 3, 6, "lucidrains"),
        Target("peak memory / theirs, N = 16384", _patterns(16384, SMALL), steps, 0.1, 0.05,
               MEMORY),
        Target("peak memory / theirs, N = 16384, axial", rf"{SMALL}, N=16384, .*", steps, 1.0, 0.5,
               MEMORY),
        *(Target(f"{rival}, N = 1024", _patterns(1024), steps, 1.0, 1.5, rival)
          for rival in ("pyattn dense", "torch dense", "transformers", "lucidrains")),
    ))
"""Of the rows of `PATTERNS`: those that ``--patterns`` selects."""


def _content(length: int | str, kind: str = "") -> str:
    names = "|".join(re.escape(name) for name in CONTENT if name.startswith(kind))
    return rf"({names}), N={length}, .*"


PAPER = "NSA, "
"""Its rows with the paper's sizes, whose pairs allow 3.7 times dense attention's speed, and 7.9."""

CONTENT_TARGETS = (
    *(Target(f"pyattn over all pairs, {kind}, N = 16384", _content(16384, kind), BOTH, 5, 10,
             "pyattn dense") for kind in ("LSH", "routing")),
    Target("pyattn over all pairs, NSA, N = 16384", _content(16384, PAPER), BOTH, 2, 3.7,
           "pyattn dense"),
    Target(f"pyattn over all pairs, NSA, N = {LONGEST}", _content(LONGEST, PAPER), BOTH, 5, 7.9,
           "pyattn dense"),
    *(Target(f"{rival}, {kind}", _content(r"\d+", kind), BOTH, 5, 10, rival)
      for rival, kind in (("lucidrains", "LSH"), ("transformers", "LSH"),
                          ("lucidrains", "routing"), ("lucidrains", PAPER))),
    *(Target(f"share of deciding, {kind}, N = 16384", _content(16384, kind), BOTH, 1 / 3, 1 / 5,
             DECIDING) for kind in ("LSH", "routing", "NSA")),
    Target(f"MB at N = {LONGEST}", _content(LONGEST), BOTH, 2000, 1000, MEGABYTES),
)
"""Of the rows of `CONTENT`: those that ``--content`` selects."""


def _linear(length: int | str, kind: str = "") -> str:
    names = "|".join(re.escape(name) for name in LINEAR if name.startswith(kind))
    return rf"({names}), N={length}, .*"


FROM_4096 = "|".join(str(length) for length in LINEAR_LENGTHS if length >= 4096)

LINEAR_TARGETS = (
    *(Target(f"time per token, N = {LINEAR_LENGTHS[-1]} / 4096, {name}",
             rf"{re.escape(name)}, N=({FROM_4096}), .*", BOTH, 1.2, 1.05, GROWTH)
      for name in LINEAR),
    *(Target(f"pyattn over all pairs, {kind}, N = {length}", _linear(length, kind), BOTH, *wanted,
             "pyattn dense")
      for kind in ("linear", "Performer", "efficient", "Linformer")
      for length, wanted in ((2048, (1, 2)), (FAR, (8, 16)))),
    *(Target(f"lucidrains, {kind}, N = {FAR}", _linear(FAR, kind), BOTH, *wanted, "lucidrains")
      for kind, wanted in (("linear", (3, 6)), ("Performer", (3, 6)), ("efficient", (3, 6)),
                           # matrix products that others have as well are most of it
                           ("Linformer", (1.5, 2)))),
    Target("lucidrains, causal Performer", r"Performer, (softmax|ReLU), causal, .*", BOTH, 3, 6,
           "lucidrains"),
    Target(f"peak memory / theirs, N = {FAR}", _linear(FAR), BOTH, 0.5, 0.25, MEMORY),
)
"""Of the rows of `LINEAR`: those that ``--linear`` selects."""


def reached(target: Target, measurements: Iterable[Measurement]) -> dict[str, Spread]:
    """By row, what was reached; what was not measured is left out."""
    rows = [found for found in measurements if target.speaks_of(found.row)]
    wanted = [found for found in rows if found.backward == target.backward
              and found.row.rivals[0] in found.seconds]
    if target.against == GROWTH:
        return _growth(wanted)
    if target.steps == BACKWARD:
        forward = {found.row.name: found for found in rows if not found.backward}
        values = {found.row.name: _backward_share(forward.get(found.row.name), found)
                  for found in wanted}
    else:
        values = {found.row.name: _value(target, found) for found in wanted}
    return {name: value for name, value in values.items() if value is not None}


def _value(target: Target, found: Measurement) -> Spread | None:
    if target.against == MACHINE:
        return found.share
    if target.against == MEMORY:
        return _share_of_memory(found)
    if target.against == MEGABYTES:
        peak = found.megabytes.get(found.row.rivals[0])
        return None if peak is None else Spread.of([peak])
    if target.against == DECIDING:
        told = found.ratios.get(DECIDED)
        return None if told is None else Spread(1 - told.median, 1 - told.high, 1 - told.low)
    if target.against == MICROSECONDS:
        return found.seconds[found.row.rivals[0]].times(1e6)
    return found.ratios.get(target.against)


def _share_of_memory(found: Measurement) -> Spread | None:
    """Its peak memory divided by that of the rival that needs least."""
    peaks = {rival: peak for rival, peak in found.megabytes.items() if peak is not None}
    own = peaks.pop(found.row.rivals[0], None)
    return Spread.of([own / min(peaks.values())]) if own is not None and peaks else None


def _backward_share(forward: Measurement | None, both: Measurement) -> Spread | None:
    """The backward alone: what the two passes did beyond the forward, in the time beyond its."""
    first = both.row.rivals[0]
    if forward is None or first not in forward.seconds or both.machine is None:
        return None
    work = both.row.work(True) - forward.row.work(False)
    seconds = both.seconds[first].median - forward.seconds[first].median
    return Spread.of([work / seconds / both.machine])


def _growth(wanted: list[Measurement]) -> dict[str, Spread]:
    """The time per token of the longest row, divided by that of the shortest."""
    if len(wanted) < 2:
        return {}
    *_, longest = ordered = sorted(wanted, key=lambda found: found.row.length)
    per_token = [found.seconds[found.row.rivals[0]].median / found.row.length
                 for found in (ordered[0], longest)]
    return {longest.row.name: Spread.of([per_token[1] / per_token[0]])}
