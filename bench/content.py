"""Rows of the variants that choose keys by what tokens hold, or by a given graph or tree."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

import pyattn

from .rows import Row

LENGTHS = (2048, 4096, 16384)
LONGEST = 65536

DECIDED = "pyattn decided"
"""The rival that is pyattn itself, told what to decide."""

CLUSTER = 128


@dataclasses.dataclass(frozen=True)
class ContentRow(Row):
    """A variant that chooses keys: `function` is its name, and `options` are its own."""

    def inputs(self) -> dict[str, np.ndarray]:
        """As for `Row`; for hashing one array for queries and keys; for NSA also gates."""
        found = super().inputs()
        if self.function == "lsh_attention":
            return {"qk": found["q"], "v": found["v"], "dout": found["dout"]}
        if self.function == "nsa_attention":
            dout, rng = found.pop("dout"), np.random.default_rng(1)
            gates = rng.uniform(size=(self.batch, self.heads, self.length, 3)).astype(self.dtype)
            return {**found, "gates": gates, "dout": dout}
        return found

    def arguments(self) -> dict[str, Any]:
        """The options, and what is not differentiated: centroids, or a graph."""
        found = dict(self.options)
        if self.function == "routing_attention":
            clusters = max(1, self.length // found["cluster_size"])
            rng = np.random.default_rng(1)
            shape = (self.heads, clusters, self.width)
            found["centroids"] = rng.standard_normal(shape).astype(self.dtype)
        if self.function == "graph_attention":
            found["graph"] = _graph(self.length, found.pop("degree"))
        return found

    @property
    def decisions(self) -> dict[str, Any]:
        """What pyattn decides in the row's own dtype; empty if there is nothing to decide."""
        return self._trial[0]

    def shortened(self, most: int) -> Row:
        """The same variant at the length of its shortest row."""
        return content_row(self.pattern, min(self.length, max(most, LENGTHS[0])))

    def over_all_pairs(self) -> Row:
        """The problem with all pairs, causal if the variant is."""
        causal = self.options.get("causal", self.function == "nsa_attention")
        return Row("dense", self.heads, self.length, self.width, self.dtype,
                   {"causal": True} if causal else {}, kv_heads=self.kv_heads)

    def pairs(self) -> float:
        """Pairs of one head, the mean over the heads, as counted by the variant.

        A pair that is met in two rounds or branches counts twice.
        """
        return self._trial[1] / (self.batch * self.heads)

    @functools.cached_property
    def _trial(self) -> tuple[dict[str, Any], int]:
        """What pyattn decides, and how many pairs that is."""
        inputs = self.inputs()
        del inputs["dout"]
        saved = getattr(pyattn, self.function).forward(**inputs, **self.arguments())[1]
        return getattr(saved, "decisions", {}), saved.stats["pairs"]


@functools.lru_cache(maxsize=1)
def _graph(length: int, degree: int) -> Any:
    """A graph in which each token has `degree` others, drawn at random."""
    import scipy.sparse

    keys = np.random.default_rng(1).integers(length, size=length * degree)
    start = np.arange(length + 1) * degree
    return scipy.sparse.csr_array((np.ones(keys.size, np.int8), keys, start),
                                  shape=(length, length))


@dataclasses.dataclass(frozen=True)
class Described:
    """What is common to the rows of one variant."""

    function: str
    options: dict[str, Any]
    heads: int = 8
    kv_heads: int | None = None
    peers: tuple[str, ...] = ()
    most: int = 16384
    """The longest row that the peers are measured at: what is longer takes them too much memory."""
    longest: int = LENGTHS[-1]
    decides: bool = True


def _lsh(rounds: int, **options: Any) -> Described:
    return Described("lsh_attention", {"causal": True, "num_rounds": rounds, "bucket_length": 64,
                                       "rng": 0, **options},
                     peers=("lucidrains", "transformers"), longest=LONGEST)


def _routing(**options: Any) -> Described:
    return Described("routing_attention", {"cluster_size": CLUSTER, **options},
                     peers=("lucidrains",), longest=LONGEST)


def _nsa(heads: int = 8, **options: Any) -> Described:
    # the layer of others makes a copy of the selected keys for every query
    return Described("nsa_attention", {"window": 511, **options}, heads, kv_heads=1, most=2048,
                     peers=() if "mode" in options else ("lucidrains",),
                     longest=LENGTHS[-1] if "mode" in options else LONGEST)


PAPER = {"block_size": 32, "stride": 16, "select_block": 64, "num_selected": 16}

CONTENT: dict[str, Described] = {
    "LSH, 4 rounds": _lsh(4),
    "LSH, 8 rounds": _lsh(8),
    "LSH, 8 rounds, as the original": _lsh(8, reference=True),
    "routing, clusters of 128": _routing(causal=True),
    "routing, top 128": _routing(mode="top"),
    "routing, top 128, causal": _routing(mode="top", causal=True),
    "NSA, 8 heads to a key": _nsa(8, **PAPER),
    "NSA, 16 heads to a key": _nsa(16, **PAPER),
    "NSA by clusters": _nsa(mode="kmeans"),
    "NSA by trees of clusters": _nsa(mode="kmeans", tree=True),
    "NSA by hashes": _nsa(mode="lsh", rng=0),
    "top 64 of all keys": Described("top_k_attention", {"top": 64, "causal": True}),
    "graph, 64 random edges": Described("graph_attention", {"degree": 64}, decides=False),
    "binary partition, step 16": Described("bp_attention", {"step": 16, "causal": True},
                                           decides=False),
}
"""By name, the variants that choose keys."""


def content_row(name: str, length: int, **settings: Any) -> ContentRow:
    """The row of one of `CONTENT`, for `length` tokens."""
    found = CONTENT[name]
    decided = (DECIDED,) if found.decides else ()
    peers = found.peers if length <= found.most else ()
    return ContentRow(name, found.heads, length, 64, "float32", dict(found.options),
                      kv_heads=found.kv_heads, function=found.function,
                      rivals=("pyattn", "pyattn dense", *decided, *peers),
                      memory=length >= LENGTHS[-1], **settings)


def _rows() -> Iterator[ContentRow]:
    for name, found in CONTENT.items():
        for length in (*LENGTHS, LONGEST):
            if length <= found.longest:
                yield content_row(name, length)


CONTENT_ROWS = tuple(_rows())
