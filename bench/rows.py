"""What is measured: one line for each row of the table."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes  # noqa: F401, gives NumPy the name bfloat16
import numpy as np

import pyattn

EVERYONE = ("pyattn", "torch", "flex", "jax", "numpy")
UNCOMPILED = ("pyattn", "torch", "jax", "numpy")
"""Without FlexAttention, which takes seconds to compile for each shape."""

DTYPES = ("float32", "float64", "bfloat16", "float16")
WHOLE = slice(None)


@dataclasses.dataclass(frozen=True)
class Row:
    """One problem, measured forward and forward + backward for each rival."""

    pattern: str
    """What to call the row; with shape and dtype it names it."""
    heads: int
    length: int
    width: int
    dtype: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """causal, window, kv_lengths: what `rivals` understand."""
    batch: int = 1
    kv_heads: int | None = None
    keys: int | None = None
    """How many keys there are, where it is not `length`."""
    density: float | None = None
    """With a boolean mask, given as an array: the part of all pairs, drawn at random, it allows."""
    bias: bool = False
    """With an array (1, H, N, M) added to the scores, whose gradient the backward returns."""
    forward_only: bool = False
    limit: str = "gemm"
    """What the machine could do at best: "gemm", multiply this fast, or "read" keys and values."""
    quick: bool = False
    """Part of the short set."""
    memory: bool = False
    """Peak memory is counted."""
    rivals: tuple[str, ...] = UNCOMPILED
    """The first is the one that the others are compared with."""
    without: dict[str, str] = dataclasses.field(default_factory=dict)
    """Rivals left out, and why."""
    gigabytes: dict[str, float] = dataclasses.field(default_factory=dict)
    """Peak memory of rivals that need much: left out where half of the machine's is less."""
    function: str = "attention"
    """The function of pyattn that is measured; `rivals.RIVALS` has the rivals of each."""

    @property
    def name(self) -> str:
        keys = "" if self.keys is None else f" M={self.keys},"
        return f"{self.pattern}, N={self.length},{keys} D={self.width}, {self.dtype}"

    @property
    def groups(self) -> int:
        return self.kv_heads or self.heads

    @property
    def key_length(self) -> int:
        return self.length if self.keys is None else self.keys

    @property
    def passes(self) -> tuple[bool, ...]:
        """Whether with the backward, for each pass that is measured."""
        return (False,) if self.forward_only else (False, True)

    @property
    def masked(self) -> bool:
        return bool(self.options) or self.density is not None

    def inputs(self) -> dict[str, np.ndarray]:
        """q, k, v, bias if there is one, and the output's gradient; the same in every process."""
        rng = np.random.default_rng(0)
        query = (self.batch, self.heads, self.length, self.width)
        key = (self.batch, self.groups, self.key_length, self.width)
        shapes: dict[str, tuple[int, ...]] = {"q": query, "k": key, "v": key}
        if self.bias:
            shapes["bias"] = (1, self.heads, self.length, self.key_length)
        shapes["dout"] = query
        return {name: rng.standard_normal(shape).astype(self.dtype)
                for name, shape in shapes.items()}

    def arguments(self) -> dict[str, Any]:
        """What `function` takes beside the arrays of `inputs`."""
        mask = self.mask()
        return self.options if mask is None else {**self.options, "mask": mask}

    def shortened(self, most: int) -> Row:
        """The same kind of problem with no length above `most`."""
        options = dict(self.options)
        if "kv_lengths" in options:
            options["kv_lengths"] = [min(length, most) for length in options["kv_lengths"]]
        return dataclasses.replace(self, length=min(self.length, most), options=options,
                                   keys=None if self.keys is None else min(self.keys, most))

    def mask(self) -> np.ndarray | None:
        """The mask that is given as an array, (N, M)."""
        if self.density is None:
            return None
        return _random_mask(self.length, self.key_length, self.density)

    def seen(self) -> tuple[np.ndarray, np.ndarray]:
        """By `options`, the first key that each query may see and the one past the last.

        Both have the shape (1 or B, N).
        """
        lengths = np.reshape(self.options.get("kv_lengths", self.key_length), (-1, 1))
        position = np.arange(self.length) + lengths - self.length
        reach = self.options.get("window", self.length + self.key_length)
        end = np.minimum(lengths, position + (0 if self.options.get("causal") else reach) + 1)
        first = np.clip(position - reach, 0, end)
        return first, end

    def allowed(self, rows: slice = WHOLE, keys: slice = WHOLE) -> np.ndarray | None:
        """The pairs that attend as a boolean array (1 or B, 1, N, M); None if all do.

        `rows` and `keys` cut a part out of it without making the whole.
        """
        if not self.masked:
            return None
        first, end = (x[:, None, rows, None] for x in self.seen())
        j = np.arange(self.key_length)[keys]
        allowed = (first <= j) & (j < end)
        mask = self.mask()
        return allowed if mask is None else allowed & mask[rows, keys]

    def pairs(self) -> float:
        """Allowed pairs of one head, the mean over the batch."""
        if self.density is not None:
            return float(np.mean(np.sum(self.allowed(), axis=(-2, -1))))
        first, end = self.seen()
        return float(np.mean(np.sum(end - first, axis=-1)))

    def work(self, backward: bool) -> float:
        """Of allowed pairs, multiplications and additions: 2 products forward, 5 backward.

        Where reading is the limit: the bytes of keys and values.
        """
        if self.limit == "read":
            cache = 2 * self.batch * self.groups * self.key_length * self.width
            return float(cache * np.dtype(self.dtype).itemsize)
        products = 7 if backward else 2
        return 2.0 * products * self.width * self.batch * self.heads * self.pairs()


@dataclasses.dataclass(frozen=True)
class PatternRow(Row):
    """A variant with a fixed pattern: `function` is its name, and `options` are its own."""

    def inputs(self) -> dict[str, np.ndarray]:
        """As for `Row`, and Swin's table of biases."""
        found = super().inputs()
        if self.function != "swin_attention":
            return found
        dout = found.pop("dout")
        rows = (2 * self.options["window"] - 1) ** 2
        table = np.random.default_rng(2).standard_normal((rows, self.heads)).astype(self.dtype)
        return {**found, "bias_table": table, "dout": dout}

    def arguments(self) -> dict[str, Any]:
        """The options, and the blocks that are drawn at random, where there are any."""
        blocks = self.blocks()
        return self.options if blocks is None else {**self.options,
                                                    "decisions": {"blocks": blocks}}

    def blocks(self) -> np.ndarray | None:
        """Blocks of keys drawn at random, (H, query blocks, count), the same for every rival."""
        return self._trial.decisions.get("blocks")

    def shortened(self, most: int) -> Row:
        """The pattern at the length of the shortest row of it, which all rivals can do."""
        return pattern_row(self.pattern, min(self.length, max(most, PATTERN_LENGTHS[0])))

    def over_all_pairs(self) -> Row:
        """The problem without the pattern, causal if the pattern is."""
        causal = {"causal": True} if self.options.get("causal") else {}
        return Row("dense", self.heads, self.length, self.width, self.dtype, causal)

    def pairs(self) -> float:
        """Allowed pairs of one head, the mean over the heads, as counted by the variant."""
        return self._trial.stats["pairs"] / (self.batch * self.heads)

    @functools.cached_property
    def _trial(self) -> Any:
        """What the variant keeps of a call that has the tokens of the row and is narrow."""
        inputs = dataclasses.replace(self, width=8).inputs()
        del inputs["dout"]
        rng = {"rng": 0} if self.function in RANDOM else {}
        return getattr(pyattn, self.function).forward(**inputs, **self.options, **rng)[1]


@functools.lru_cache(maxsize=1)
def _random_mask(length: int, keys: int, density: float) -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.random((length, keys), dtype=np.float32) < density


HEADS = {128: 8, 512: 8, 2048: 4, 8192: 2, 16384: 1}

LONG = {"jax": "it makes arrays of N x N, gigabytes here, and takes minutes",
        "numpy": "its arrays of N x N take gigabytes, and it minutes"}


def _row(pattern: str, length: int, width: int, dtype: str, **settings: Any) -> Row:
    heads = HEADS[length]
    described: dict[str, Any] = {
        "dense": {},
        "causal": {"options": {"causal": True}},
        "causal window 256": {"options": {"causal": True, "window": 256}},
        "key padding": {"batch": 2, "options": {"kv_lengths": (length, length // 2)}},
        "causal, 4 heads to a key": {"kv_heads": heads // 4, "options": {"causal": True}},
        "boolean mask": {"density": 0.9},
        "bias with gradient": {"bias": True},
    }[pattern]
    if length >= 8192:
        described = {**described, "without": LONG}
    return Row(pattern, heads, length, width, dtype, **{**described, **settings})


def _patterns() -> Iterator[Row]:
    """Every pattern in every dtype, at one shape."""
    for dtype in DTYPES:
        flex = EVERYONE if dtype != "float64" else UNCOMPILED
        yield _row("dense", 2048, 64, dtype, rivals=flex, quick=True, memory=dtype == "float32")
        yield _row("causal", 2048, 64, dtype, rivals=flex, quick=dtype == "float32",
                   memory=dtype not in ("float32", "float16"))
        yield _row("causal window 256", 2048, 64, dtype, rivals=flex)
        yield _row("key padding", 2048, 64, dtype)
        yield _row("key padding", 512, 64, dtype)
        yield _row("causal, 4 heads to a key", 2048, 64, dtype, rivals=flex)
        yield _row("boolean mask", 2048, 64, dtype, quick=dtype == "float32")
        yield _row("bias with gradient", 2048, 64, dtype, quick=dtype == "float32",
                   memory=dtype == "bfloat16")


def _widths() -> Iterator[Row]:
    for dtype, widths in {"float32": (32, 80, 128, 256), "bfloat16": (32, 80, 128, 256),
                          "float64": (128,), "float16": (128,)}.items():
        for width in widths:
            yield _row("dense", 2048, width, dtype)
            yield _row("causal", 2048, width, dtype)


def _lengths() -> Iterator[Row]:
    for dtype, lengths in {"float32": (128, 512, 8192, 16384), "bfloat16": (128, 512, 8192, 16384),
                           "float64": (512, 8192), "float16": (512, 8192)}.items():
        for length in lengths:
            if dtype in ("float32", "bfloat16"):
                yield _row("dense", length, 64, dtype)
            yield _row("causal", length, 64, dtype, memory=length == 8192)
    for length in (512, 8192):
        yield _row("dense", length, 128, "float32")
        yield _row("causal", length, 128, "float32")


def _windows() -> Iterator[Row]:
    """A window whose time grows with N alone, beside the mask that others need for it."""
    yield _row("causal window 256", 16384, 64, "float32", quick=True)
    for length in (4096, 8192, 16384, 32768, 65536):
        yield Row("causal window 256 alone", 2, length, 64, "float32",
                  {"causal": True, "window": 256}, rivals=("pyattn",),
                  memory=length == 16384, quick=length in (4096, 65536))


def _short() -> Iterator[Row]:
    """Many small problems at once."""
    for dtype in DTYPES:
        quick = dtype == "float32"
        yield Row("batch of 8 x 8 heads", 8, 64, 64, dtype, batch=8, quick=quick)
        yield Row("Swin windows, 64 x 4 heads", 4, 49, 32, dtype, batch=64, quick=quick)
        yield Row("Swin windows with bias, 64 x 4 heads", 4, 49, 32, dtype, batch=64, bias=True,
                  quick=quick)
    for length in (16, 32, 128):
        yield Row("batch of 16 x 8 heads", 8, length, 64, "float32", batch=16)
    yield Row("tiny call", 1, 8, 16, "float32", quick=True)


def _decoding() -> Iterator[Row]:
    """One new query against a long cache: as fast as keys and values can be read."""
    for dtype in ("float32", "bfloat16"):
        yield Row("decode", 8, 1, 64, dtype, keys=8192, forward_only=True, limit="read",
                  quick=dtype == "float32")
        yield Row("decode, 4 heads to a key", 32, 1, 128, dtype, kv_heads=8, keys=8192,
                  forward_only=True, limit="read", quick=dtype == "float32")


RANDOM = ("bigbird_attention", "random_attention")
"""Variants that draw blocks."""

PATTERN_LENGTHS = (1024, 4096, 16384)


def _square(length: int) -> tuple[int, int]:
    return math.isqrt(length), math.isqrt(length)


PATTERNS: dict[str, tuple[str, Callable[[int], dict[str, Any]], tuple[str, ...]]] = {
    "sliding window 256": (
        "sliding_window_attention", lambda n: {"window": 256}, ("lucidrains",)),
    "sliding window 256, causal": (
        "sliding_window_attention", lambda n: {"window": 256, "causal": True}, ("lucidrains",)),
    "window 64, dilation 16": (
        "sliding_window_attention", lambda n: {"window": 64, "dilation": 16}, ()),
    "Longformer, window 256, 16 global": (
        "longformer_attention",
        lambda n: {"window": 256, "global_index": list(range(0, n, n // 16))}, ("transformers",)),
    "BigBird, block 64, 3 random": (
        "bigbird_attention", lambda n: {"block_size": 64, "num_random": 3}, ("transformers",)),
    "Sparse Transformer, strided 128": (
        "sparse_transformer_attention", lambda n: {"stride": 128, "causal": True}, ()),
    "Sparse Transformer, fixed 128": (
        "sparse_transformer_attention",
        lambda n: {"stride": 128, "mode": "fixed", "causal": True}, ()),
    "block diagonal 256": ("block_diagonal_attention", lambda n: {"block_size": 256}, ()),
    "BlockBERT, 4 blocks": ("blockbert_attention", lambda n: {"num_blocks": 4}, ()),
    "coarse and fine, block 128": ("coarse_fine_attention", lambda n: {"block_size": 128}, ()),
    "axial": ("axial_attention", lambda n: {"shape": _square(n)}, ("lucidrains",)),
    "temporal, 16 frames": ("temporal_attention", lambda n: {"frames": 16}, ()),
    "local 2-D, window 8": (
        "local_attention_2d", lambda n: {"shape": _square(n), "window": 8}, ()),
    "Swin, window 8": (
        "swin_attention", lambda n: {"shape": _square(n), "window": 8}, ("transformers",)),
    "random, block 64, 3 random": (
        "random_attention", lambda n: {"block_size": 64, "num_random": 3}, ()),
}
"""By name: the variant, its options for N tokens, and the packages that compute the same."""


def pattern_row(name: str, length: int, **settings: Any) -> PatternRow:
    """The row of one of `PATTERNS`, for `length` tokens."""
    function, options, peers = PATTERNS[name]
    # at the longest, torch takes as long as all others together, and it is in the rows of `dense`
    dense = ("pyattn dense", "torch dense") if length < 16384 else ("pyattn dense",)
    if (function, length) == ("bigbird_attention", 16384):
        settings = {"gigabytes": {"transformers": 10.5}, **settings}
    return PatternRow(name, 8, length, 64, "float32", options(length), function=function,
                      rivals=("pyattn", *dense, *peers), memory=length == 16384, **settings)


def _variants() -> Iterator[Row]:
    """Every fixed pattern, beside attention over all pairs and those who have the same pattern."""
    for name in PATTERNS:
        for length in PATTERN_LENGTHS:
            quick = (name, length) in (("sliding window 256", 4096),
                                       ("Longformer, window 256, 16 global", 1024))
            yield pattern_row(name, length, quick=quick)


ROWS = (
    *_patterns(),
    *_widths(),
    *_lengths(),
    *_windows(),
    *_short(),
    *_decoding(),
    *_variants(),
)
