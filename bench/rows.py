"""What is measured: one line for each row of the table."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import ml_dtypes  # noqa: F401, gives NumPy the name bfloat16
import numpy as np

EVERYONE = ("pyattn", "torch", "jax", "numpy")


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
    quick: bool = False
    """Part of the short set."""
    rivals: tuple[str, ...] = EVERYONE
    """The first is the one that the others are compared with."""
    function: str = "attention"
    """The table of `rivals.RIVALS` that has the rivals."""

    @property
    def name(self) -> str:
        return f"{self.pattern}, N={self.length}, D={self.width}, {self.dtype}"

    @property
    def groups(self) -> int:
        return self.kv_heads or self.heads

    def inputs(self) -> dict[str, np.ndarray]:
        """q, k, v and the output's gradient; the same in every process."""
        rng = np.random.default_rng(0)
        tokens = self.length, self.width
        query, key = (self.batch, self.heads, *tokens), (self.batch, self.groups, *tokens)
        shapes = {"q": query, "k": key, "v": key, "dout": query}
        return {name: rng.standard_normal(shape).astype(self.dtype)
                for name, shape in shapes.items()}

    def allowed(self) -> np.ndarray | None:
        """The mask as a boolean array (1 or B, 1, N, N), or None if every pair is allowed."""
        if not self.options:
            return None
        i = np.arange(self.length)[:, None]
        j = np.arange(self.length)
        mask = np.ones((1, 1, self.length, self.length), bool)
        if self.options.get("causal"):
            mask &= j <= i
        if "window" in self.options:
            mask &= abs(i - j) <= self.options["window"]
        if "kv_lengths" in self.options:
            mask = mask & (j < np.reshape(self.options["kv_lengths"], (-1, 1, 1, 1)))
        return mask

    def flops(self, backward: bool) -> float:
        """Multiplications and additions of the allowed pairs: 2 products forward, 5 backward."""
        allowed = self.allowed()
        pairs = self.length**2 if allowed is None else allowed.sum() / len(allowed)
        products = 7 if backward else 2
        return 2.0 * products * self.width * self.batch * self.heads * pairs


HEADS = {512: 8, 2048: 4, 8192: 4}


def _patterns(length: int) -> dict[str, dict[str, Any]]:
    heads = HEADS[length]
    return {
        "dense": {},
        "causal": {"options": {"causal": True}},
        "causal window 256": {"options": {"causal": True, "window": 256}},
        "key padding": {"batch": 2, "options": {"kv_lengths": (length, length // 2)}},
        "causal, 4 heads to a key": {"kv_heads": heads // 4, "options": {"causal": True}},
    }


def _attention() -> list[Row]:
    rows = []
    for dtype, width, length in itertools.product(
            ("float32", "float64", "bfloat16"), (64, 128), HEADS):
        for pattern, settings in _patterns(length).items():
            quick = length == 2048 and width == 64 and (dtype == "float32" or pattern == "causal")
            # plain NumPy at 8192 would only measure the memory of its N x N arrays
            rivals = EVERYONE if length < 8192 else ("pyattn", "torch", "jax")
            rows.append(Row(pattern, HEADS[length], length, width, dtype, **settings, quick=quick,
                            rivals=rivals))
    return rows


ROWS = (
    *_attention(),
)
