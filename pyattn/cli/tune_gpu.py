"""Measures the tuning table of the CUDA kernels for the GPU at hand.

Each question is one class of the table: some calls that differ in what one choice is. The
candidates take turns, the device's own clock tells, and medians are compared. A candidate is taken
only if it is clearly faster than the rule, and its results are those of the rule but for rounding.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from pyattn.arrays import dtype_name
from pyattn.kernels.cuda import device as devices
from pyattn.kernels.cuda import hopper, softmax, tilings, tuning
from pyattn.kernels.cuda.layout import as_sums

from .. import masks
from ..dispatch import use_backend
from ..variants.attention import attention

TURNS = 7
GAIN = 0.97
"""How much of the rule's time a candidate may take, to be chosen instead."""

TOKENS = 4096

NOT_ON_HOPPER = {f"hopper {way} {width}": hopper.NEVER
                 for way in ("forward", "backward") for width in hopper.WIDTHS}
ON_HOPPER = dict.fromkeys(NOT_ON_HOPPER, 0.0)
FILL_QUESTIONS = len(ON_HOPPER)


@dataclasses.dataclass(frozen=True)
class Call:
    """What is timed: `heads` share `groups` heads of keys."""

    dtype: str
    d: int
    n: int
    m: int
    heads: int = 16
    groups: int = 16
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    backward: bool = False

    def ready(self, asarray: Callable[[np.ndarray], Any]) -> Callable[[], list[Any]]:
        """Return what makes the call; a backward has done its forward."""
        rng = np.random.default_rng(0)
        q, k, v, dout = (asarray(rng.standard_normal((1, heads, length, self.d),
                                                     dtype=np.float32).astype(self.dtype))
                         for heads, length in ((self.heads, self.n), (self.groups, self.m),
                                               (self.groups, self.m), (self.heads, self.n)))
        if not self.backward:
            return lambda: [attention(q, k, v, **self.options)]
        saved = attention.forward(q, k, v, **self.options)[1]
        return lambda: list(saved.backward(dout))


@dataclasses.dataclass(frozen=True)
class Question:
    """A class of the table; its candidates, the rule first; and what else is chosen meanwhile."""

    name: str
    candidates: Sequence[Any]
    call: Call
    given: dict[str, Any]


@dataclasses.dataclass
class Measured:
    """What was chosen, the times in seconds that it was chosen by, and what went wrong."""

    choices: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    wrong: list[str] = dataclasses.field(default_factory=list)


def measure(asarray: Callable[[np.ndarray], Any],
            advance: Callable[[str], None] = lambda text: None, *, tokens: int = TOKENS,
            only: Callable[[str], bool] = lambda name: True) -> Measured:
    """Measure the table for the current device; `advance` is told of every question."""
    device = devices.of(asarray(np.zeros(1, np.float32)))
    found = Measured()
    with use_backend("cuda"):
        for question in questions(device, tokens):
            if only(question.name) and len(question.candidates) > 1:
                times = _alternate(device, question, asarray, found)
                found.choices[question.name] = _fastest(times, question.candidates)
                advance(question.name)
        if device.capability == hopper.CAPABILITY:
            for way in ("forward", "backward"):
                for width in hopper.WIDTHS:
                    name = f"hopper {way} {width}"
                    if only(name):
                        found.choices[name] = _least_fill(device, name, way, width, asarray, found,
                                                          tokens)
                        advance(name)
    return found


def questions(device: Any, tokens: int = TOKENS) -> Iterator[Question]:
    """Yield the questions for a device, in the order in which answers serve those that follow."""
    patterns: dict[str, dict[str, Any]] = {
        "dense": {}, "causal": {"causal": True},
        "sparse": {"mask": masks.window(tokens // 16, tokens // 16)}}
    for part, kind, width in tilings.FURTHER:
        dtype = "bfloat16" if kind == "half" else kind
        length = tokens if kind == "half" else tokens // 4
        backward = part in ("keys", "queries")
        kinds: dict[Any, Call] = {"": Call(dtype, width, length, length, backward=backward)}
        if part == "forward":
            kinds = {name: Call(dtype, width, length, length, options=options)
                     for name, options in patterns.items()}
        elif part == "packed":
            kinds = {rows: Call(dtype, width, rows // 4, 2 * tokens, 32, 8)
                     for rows in softmax.PACKED_ROWS}
        for name, call in kinds.items():
            found = tilings.candidates(part, dtype, width, width, 0, device.shared_memory,
                                       name if part == "packed" else 0,
                                       tilings.rule(part, dtype, width, device.shared_memory))
            yield Question(f"{part} {kind} {width} {name}".strip(), found, call, NOT_ON_HOPPER)
    for width in hopper.WIDTHS:
        yield Question(f"split half {width}", softmax.SPLITS,
                       Call("bfloat16", width, 4, 4 * tokens, 32, 8), NOT_ON_HOPPER)
    if device.capability != hopper.CAPABILITY:
        return
    for (file, width), builds in hopper.BUILDS.items():
        yield Question(f"{file} {width}", builds,
                       Call("bfloat16", width, tokens, tokens, backward="backward" in file),
                       ON_HOPPER)
    for width in hopper.WIDTHS:
        yield Question(f"hopper few {width}", (False, True),
                       Call("bfloat16", width, 16, 4 * tokens, 32, 8), ON_HOPPER)


def _alternate(device: Any, question: Question, asarray: Callable[[np.ndarray], Any],
               found: Measured) -> dict[int, float]:
    """Return the median seconds by the candidate's number, the candidates taking turns."""
    tables = [found.choices | question.given | {question.name: candidate}
              for candidate in question.candidates]
    with tuning.trial(tables[0]):
        call = question.call.ready(asarray)
    times: dict[int, list[float]] = {}
    right: list[Any] = []
    for number, choices in enumerate(tables):
        with tuning.trial(choices):
            try:
                results = call()        # compiles
                right = right or results
                far = _distance(results, right)
            except Exception as error:  # of a driver, of a compiler: the others are still measured
                if number == 0:
                    raise
                found.wrong.append(f"{question.name}, {question.candidates[number]}: {error}")
                continue
        if not far <= float(ml_dtypes.finfo(question.call.dtype).eps) ** 0.5:
            found.wrong.append(f"{question.name}, {question.candidates[number]}: results differ "
                               f"from the rule's by {far:.2g} of the largest")
            continue
        times[number] = []
    for _ in range(TURNS):
        for number, taken in times.items():
            with tuning.trial(tables[number]):
                taken.append(device.seconds(call))
    medians = {number: statistics.median(taken) for number, taken in times.items()}
    found.seconds[question.name] = {told(question.candidates[number]): median
                                    for number, median in medians.items()}
    return medians


def told(candidate: Any) -> str:
    """Return a candidate as the table's times name it."""
    return " ".join(map(str, candidate)) if isinstance(candidate, tuple) else str(candidate)


def _distance(results: list[Any], right: list[Any]) -> float:
    """Return the largest difference, as a part of the largest number; NaN if there is any NaN."""
    found = []
    for x, y in zip(results, right, strict=True):
        x, y = (as_sums(array, dtype_name(array)) for array in (x, y))
        found.append(float(abs(x - y).max()) / max(float(abs(y).max()), 1e-30))
    return float(np.max(found))


def _fastest(times: dict[int, float], candidates: Sequence[Any]) -> Any:
    best = min(times, key=times.__getitem__)
    return candidates[best if times[best] < GAIN * times[0] else 0]


def _least_fill(device: Any, name: str, way: str, width: int,
                asarray: Callable[[np.ndarray], Any], found: Measured, tokens: int) -> float:
    """Find from which share of tiles that hold pairs on the kernels for Hopper are faster."""
    least = hopper.NEVER
    # every two by two tiles alike; a quarter of them is the least that there can be
    for fill, own in ((1.0, (1, 1, 1, 1)), (0.75, (1, 1, 0, 1)), (0.5, (1, 0, 0, 1)),
                      (0.0, (1, 0, 0, 0))):
        table = np.tile(np.array(own, bool).reshape(2, 2), (tokens // 128, tokens // 128))
        call = Call("bfloat16", width, tokens, tokens, backward=way == "backward",
                    options={"mask": masks.blocks(table, 64)})
        times = _alternate(device, Question(name, (hopper.NEVER, 0.0), call, {}), asarray, found)
        found.seconds[f"{name}, {sum(own)} of 4 tiles"] = found.seconds.pop(name)
        if 1 not in times or times[1] >= times[0]:
            break
        least = fill
    return least
