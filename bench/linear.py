"""Rows of the variants whose time grows with the tokens alone, not with their pairs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

import pyattn
from pyattn.features import random_projection

from .rows import Row

LENGTHS = (2048, 4096, 16384, 65536, 262144)

FAR = 16384
"""From here on memory is counted; beyond it, only causal rows are compared with all pairs."""

RANK = 256
"""Mixtures of tokens that Linformer attends to."""

FEATURES = 266
"""Of a head of width 64: D ln D, as the packages have it."""


def odd(x: np.ndarray) -> np.ndarray:
    """Round to odd sixteenths.

    Where a feature of ReLU is next to 0, its gradient is there or not by the last bit, for every
    rival and for the judge. Products of such numbers keep away from 0.
    """
    return ((2 * np.floor(8 * x) + 1) / 16).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class LinearRow(Row):
    """A variant that sums over keys before queries read them: `function` is its name."""

    def inputs(self) -> dict[str, np.ndarray]:
        """As for `Row`; for Linformer also what mixes keys and values."""
        found = super().inputs()
        if self.options.get("kernel") == "relu":
            found |= {name: odd(found[name]) for name in "qk"}
        if self.function != "linformer_attention":
            return found
        dout, rng = found.pop("dout"), np.random.default_rng(1)
        mixing = {name: (rng.standard_normal((RANK, self.length), dtype=np.float32)
                         / self.length**0.5).astype(self.dtype) for name in "ef"}
        return {**found, **mixing, "dout": dout}

    def arguments(self) -> dict[str, Any]:
        """The options, and the directions of random features."""
        if self.function != "performer_attention":
            return self.options
        return {**self.options, "projection": self.projection()}

    def projection(self) -> np.ndarray:
        """The directions, the same for every rival."""
        found = random_projection(FEATURES, self.width, rng=1).astype(self.dtype)
        if self.options.get("kernel") == "relu":
            found = odd(found)
            # a sum of an odd number of odd products is not 0
            found[:, 0] += found.dtype.type(1 / 16)
        return found

    def shortened(self, most: int) -> Row:
        """The same variant at the length of its shortest row."""
        return linear_row(self.pattern, min(self.length, max(most, LENGTHS[0])))

    def over_all_pairs(self) -> Row:
        """Softmax attention, causal if the variant is."""
        causal = {"causal": True} if self.options.get("causal") else {}
        return Row("dense", self.heads, self.length, self.width, self.dtype, causal)

    def pairs(self) -> float:
        """Pairs of a query and a key, or a mixture, of one head that are multiplied out."""
        return self._counted["pairs"] / (self.batch * self.heads)

    def work(self, backward: bool) -> float:
        """As the variant counts a forward; a backward counts as two."""
        return float(self._counted["flops"] * (3 if backward else 1))

    @functools.cached_property
    def _counted(self) -> dict[str, int]:
        """The variant's counters: of a short row, times how much longer this one is."""
        times = max(1, self.length // LENGTHS[1])
        short = dataclasses.replace(self, length=min(self.length, LENGTHS[1]))
        inputs = short.inputs()
        del inputs["dout"]
        saved = getattr(pyattn, self.function).forward(**inputs, **short.arguments())[1]
        return {name: times * saved.stats[name] for name in ("pairs", "flops")}


@dataclasses.dataclass(frozen=True)
class Described:
    """What is common to the rows of one variant."""

    function: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    peers: tuple[str, ...] = ("lucidrains",)
    peer_kilobytes: float = 40.0
    """Memory of a peer by token, all heads."""


LINEAR: dict[str, Described] = {
    "linear, causal": Described("linear_attention", {"causal": True}),
    "linear": Described("linear_attention"),
    "Performer, softmax": Described("performer_attention", peer_kilobytes=60),
    "Performer, ReLU": Described("performer_attention", {"kernel": "relu"}, peer_kilobytes=60),
    # the peer has an array of N x F x D
    "Performer, softmax, causal": Described("performer_attention", {"causal": True},
                                            peer_kilobytes=2200),
    "Performer, ReLU, causal": Described(
        "performer_attention", {"kernel": "relu", "causal": True}, peer_kilobytes=2200),
    "efficient": Described("efficient_attention"),
    "Linformer, 256 mixtures": Described("linformer_attention"),
}
"""By name, the variants."""


def linear_row(name: str, length: int, **settings: Any) -> LinearRow:
    """The row of one of `LINEAR`, for `length` tokens."""
    found = LINEAR[name]
    causal = bool(found.options.get("causal"))
    # over all pairs the longest would take half an hour
    dense = ("pyattn dense",) if length <= (LENGTHS[-2] if causal else FAR) else ()
    gigabytes = dict.fromkeys(found.peers, found.peer_kilobytes * length / 1e6)
    return LinearRow(name, 8, length, 64, "float32", dict(found.options), function=found.function,
                     rivals=("pyattn", *dense, *found.peers), memory=length >= FAR,
                     gigabytes=gigabytes, **settings)


def _rows() -> Iterator[LinearRow]:
    for name in LINEAR:
        for length in LENGTHS:
            yield linear_row(name, length)


LINEAR_ROWS = tuple(_rows())
