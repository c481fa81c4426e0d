"""The one table of attention cases: what is called, and the same thing spelled out densely.

A row names options of `pyattn.attention` and gives, apart from the package, the rule that they
stand for: which pairs are allowed by position, and every other term as an explicit array.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import oracle

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True)
class Shape:
    batch: tuple[int, ...]
    heads: int
    groups: int
    n: int
    m: int
    d: int
    e: int

    def __str__(self):
        return (
            "x".join(map(str, self.batch))
            + f"H{self.heads}G{self.groups}N{self.n}M{self.m}D{self.d}E{self.e}"
        )


SHAPES = [
    Shape((), 1, 1, 1, 1, 1, 1),
    Shape((2,), 2, 2, 3, 3, 8, 8),
    Shape((2,), 4, 2, 63, 63, 16, 16),
    Shape((1,), 2, 1, 64, 64, 32, 24),
    Shape((2,), 3, 3, 65, 65, 64, 64),
    Shape((2,), 4, 1, 70, 133, 5, 7),
    Shape((1,), 2, 2, 133, 70, 80, 33),
    Shape((2, 2), 2, 1, 17, 29, 16, 16),
]
EMPTY = [
    Shape((2,), 2, 1, 0, 5, 4, 4),
    Shape((2,), 2, 1, 5, 0, 4, 4),
    Shape((0,), 2, 2, 3, 3, 4, 4),
    Shape((1,), 0, 0, 3, 3, 4, 4),
]


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A case made concrete: arguments for pyattn, and the dense problem for the oracle."""

    arrays: dict[str, np.ndarray]
    """Every array argument that has a gradient."""
    options: dict[str, Any]
    dense: oracle.Dense
    again: Callable[[int], Drawn] | None = None
    """The same case from another seed."""
    function: str = "attention"


def positions(shape: Shape, alignment="bottom_right", q_lengths=None, kv_lengths=None):
    """(..., 1, N, 1) and (1, M) positions, and which pairs lie within the lengths."""
    q_length = (
        np.full(shape.batch, shape.n)
        if q_lengths is None
        else np.broadcast_to(q_lengths, shape.batch)
    )
    kv_length = (
        np.full(shape.batch, shape.m)
        if kv_lengths is None
        else np.broadcast_to(kv_lengths, shape.batch)
    )
    q_length, kv_length = q_length[..., None, None, None], kv_length[..., None, None, None]
    i, j = np.arange(shape.n)[:, None], np.arange(shape.m)[None]
    start = 0 if alignment == "top_left" else kv_length - q_length
    return i + start, j + 0 * start, (i < q_length) & (j < kv_length)


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    draw: Callable[[np.random.Generator, Shape], dict[str, Any]] = lambda rng, s: {}
    """Options, of which arrays with a gradient are made here too."""
    rule: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    """allowed(i, j) by position."""
    alignment: str = "bottom_right"
    suits: Callable[[Shape], bool] = lambda s: True
    function: str = "attention"
    pattern: Callable[[dict[str, Any], Shape], np.ndarray] | None = None
    """Allowed pairs (..., H, N, M), or what broadcasts to it, of a variant given these options."""

    def make(self, shape: Shape, dtype, seed=0) -> Drawn:
        rng = np.random.default_rng(
            [seed, shape.n, shape.m, shape.d, zlib.crc32(self.name.encode())]
        )
        q, k, v = (
            rng.standard_normal((*shape.batch, *tail)).astype(dtype)
            for tail in (
                (shape.heads, shape.n, shape.d),
                (shape.groups, shape.m, shape.d),
                (shape.groups, shape.m, shape.e),
            )
        )
        options = self.draw(rng, shape)
        arrays = {"q": q, "k": k, "v": v}
        for name in ("bias", "gate", "scale", "sinks", "alibi_slopes"):
            if isinstance(options.get(name), np.ndarray):
                arrays[name] = options.pop(name)
        i, j, allowed = positions(
            shape, self.alignment, options.get("q_lengths"), options.get("kv_lengths")
        )
        if "segments" in options:
            i, j, allowed = packed(options["segments"], self.alignment)
        if self.rule is not None:
            allowed = allowed & self.rule(i, j)
        if self.pattern is not None:
            allowed = allowed & self.pattern(options, shape)
        if "mask" in options and isinstance(options["mask"], np.ndarray):
            allowed = allowed & options["mask"]
        scale = arrays.get("scale", options.get("scale", shape.d**-0.5))
        dense = oracle.Dense(
            q,
            k,
            v,
            np.broadcast_to(np.asarray(scale, dtype=np.float64), (shape.heads,)),
            allowed,
            bias=arrays.get("bias"),
            gate=arrays.get("gate"),
            softcap=options.get("softcap"),
            sinks=arrays.get("sinks"),
            slopes=arrays.get("alibi_slopes"),
            distance=np.abs(i - j),
        )
        return Drawn(
            arrays, options, dense, lambda seed: self.make(shape, dtype, seed), self.function
        )


def packed(segments, alignment):
    pair = isinstance(segments, tuple)
    queries, keys = segments if pair else (segments, segments)
    lead = [0 if alignment == "top_left" else b - a for a, b in zip(queries, keys, strict=True)]
    i = np.concatenate(
        [np.arange(a) + s for a, s in zip(queries, lead, strict=True)] or [[]]
    ).astype(int)
    j = np.concatenate([np.arange(b) for b in keys] or [[]]).astype(int)
    which_i, which_j = (
        np.repeat(np.arange(len(queries)), queries),
        np.repeat(np.arange(len(keys)), keys),
    )
    return i[:, None], j[None], which_i[:, None] == which_j[None]


def split(rng, total, parts):
    cuts = np.sort(rng.integers(0, total + 1, parts - 1))
    return np.diff([0, *cuts, total]).tolist()


def normal(*axes, dtype=np.float32):
    """A random array over some of the axes of (..., H, N, M): 1 keeps an axis short."""

    def draw(rng, s):
        full = {
            "B": s.batch,
            "H": (s.heads,),
            "N": (s.n,),
            "M": (s.m,),
            "1": (1,),
            "b": (1,) * len(s.batch),
        }
        return rng.standard_normal(sum((tuple(full[a]) for a in axes), ())).astype(dtype)

    return draw


def gate(*axes):
    def draw(rng, s):
        x = 1 / (1 + np.exp(-3 * normal(*axes)(rng, s)))
        return np.where(x < 0.2, 0, x).astype(np.float32)

    return draw


def lengths(rng, s):
    return {"kv_lengths": rng.integers(0, s.m + 1, s.batch)}


def both_lengths(rng, s):
    return {
        "q_lengths": rng.integers(0, s.n + 1, s.batch),
        "kv_lengths": rng.integers(0, s.m + 1, s.batch),
    }


CASES = [
    Case("dense"),
    Case("causal", lambda r, s: {"causal": True}, lambda i, j: j <= i),
    Case("causal_top_left", lambda r, s: {"causal": "top_left"}, lambda i, j: j <= i, "top_left"),
    Case("window", lambda r, s: {"window": 5}, lambda i, j: abs(i - j) <= 5),
    Case(
        "window_sides", lambda r, s: {"window": (70, 3)}, lambda i, j: (i - j <= 70) & (j - i <= 3)
    ),
    Case("window_left_open", lambda r, s: {"window": (None, 2)}, lambda i, j: j - i <= 2),
    Case(
        "causal_window",
        lambda r, s: {"causal": True, "window": 3},
        lambda i, j: (i - j <= 3) & (j <= i),
    ),
    Case("causal_window_0", lambda r, s: {"causal": True, "window": 0}, lambda i, j: i == j),
    Case("mask_full", lambda r, s: {"mask": r.random((*s.batch, s.heads, s.n, s.m)) < 0.3}),
    Case("mask_keys", lambda r, s: {"mask": r.random((*s.batch, 1, 1, s.m)) < 0.7}),
    Case(
        "mask_pairs_causal",
        lambda r, s: {"mask": r.random((s.n, s.m)) < 0.5, "causal": True},
        lambda i, j: j <= i,
    ),
    Case("mask_heads", lambda r, s: {"mask": r.random((s.heads, s.n, s.m)) < 0.5}),
    Case("mask_nothing", lambda r, s: {"mask": np.zeros((s.n, s.m), bool)}),
    Case("kv_lengths", lengths),
    Case("lengths_causal", lambda r, s: both_lengths(r, s) | {"causal": True}, lambda i, j: j <= i),
    Case(
        "lengths_window",
        lambda r, s: both_lengths(r, s) | {"window": 9},
        lambda i, j: abs(i - j) <= 9,
    ),
    Case(
        "lengths_top_left",
        lambda r, s: both_lengths(r, s) | {"causal": "top_left"},
        lambda i, j: j <= i,
        "top_left",
    ),
    Case("segments", lambda r, s: {"segments": (split(r, s.n, 4), split(r, s.m, 4))}),
    Case(
        "segments_causal",
        lambda r, s: {"segments": (split(r, s.n, 3), split(r, s.m, 3)), "causal": True},
        lambda i, j: j <= i,
    ),
    Case(
        "segments_alibi",
        lambda r, s: {
            "segments": (split(r, s.n, 3), split(r, s.m, 3)),
            "window": 20,
            "alibi_slopes": abs(normal("H")(r, s)),
        },
        lambda i, j: abs(i - j) <= 20,
    ),
    Case("bias_full", lambda r, s: {"bias": normal("B", "H", "N", "M")(r, s)}),
    Case("bias_heads", lambda r, s: {"bias": normal("H", "N", "M")(r, s)}),
    Case(
        "bias_pairs_float64",
        lambda r, s: {"bias": normal("N", "M", dtype=np.float64)(r, s), "causal": True},
        lambda i, j: j <= i,
    ),
    Case("bias_keys", lambda r, s: {"bias": normal("B", "1", "1", "M")(r, s)}),
    Case("bias_queries", lambda r, s: {"bias": normal("H", "N", "1")(r, s)}),
    Case(
        "bias_one",
        lambda r, s: {"bias": normal("b", "H", "1", "1")(r, s), "sinks": normal("H")(r, s)},
    ),
    Case(
        "bias_masks",
        lambda r, s: {"bias": np.where(r.random((s.n, s.m)) < 0.4, -np.inf, 0.5).astype("f")},
    ),
    Case("gate_full", lambda r, s: {"gate": gate("B", "H", "N", "M")(r, s)}),
    Case(
        "gate_pairs",
        lambda r, s: {"gate": gate("N", "M")(r, s), "causal": True},
        lambda i, j: j <= i,
    ),
    Case("gate_keys", lambda r, s: {"gate": gate("B", "1", "1", "M")(r, s)}),
    Case("scale", lambda r, s: {"scale": 0.3}),
    Case("scale_array", lambda r, s: {"scale": normal("H")(r, s) * np.float32(2 * s.d**-0.5)}),
    Case("softcap", lambda r, s: {"softcap": 1.5, "scale": 1.0}),
    Case("sinks", lambda r, s: {"sinks": normal("H")(r, s)}),
    Case(
        "sinks_empty_rows",
        lambda r, s: {"sinks": normal("H")(r, s), "mask": r.random((s.n, s.m)) < 0.05},
    ),
    Case(
        "alibi",
        lambda r, s: {"alibi_slopes": abs(normal("H")(r, s)), "causal": True},
        lambda i, j: j <= i,
    ),
    Case(
        "alibi_lengths", lambda r, s: both_lengths(r, s) | {"alibi_slopes": abs(normal("H")(r, s))}
    ),
    Case(
        "everything",
        lambda r, s: (
            both_lengths(r, s)
            | {
                "causal": True,
                "window": 40,
                "softcap": 2.0,
                "sinks": normal("H")(r, s),
                "scale": normal("H")(r, s),
                "bias": normal("B", "1", "N", "M")(r, s),
                "gate": gate("H", "1", "M")(r, s),
                "alibi_slopes": abs(normal("H")(r, s)),
                "mask": r.random((*s.batch, s.heads, s.n, s.m)) < 0.8,
            }
        ),
        lambda i, j: (j <= i) & (i - j <= 40),
    ),
]
