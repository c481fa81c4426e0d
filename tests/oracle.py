"""Dense attention by the textbook, for judging. Imports nothing from the package under test.

Everything is an explicit (..., H, N, M) array. `Arithmetic` says how numbers are kept: exact
(float64, or longdouble when float64 is judged), or plain, where matmuls accumulate in float32 and
every intermediate array is rounded to the dtype under test.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    work: type
    """The dtype that sums are carried in."""
    keep: np.dtype | None = None
    """The dtype every intermediate is rounded to; None keeps the work dtype."""

    def __call__(self, x):
        x = np.asarray(x)
        with np.errstate(over="ignore"):
            return (x if self.keep is None else x.astype(self.keep)).astype(self.work)


def exact(dtype):
    return Arithmetic(np.longdouble if np.dtype(dtype) == np.float64 else np.float64)


def plain(dtype):
    return Arithmetic(np.float64 if np.dtype(dtype) == np.float64 else np.float32, np.dtype(dtype))


@dataclasses.dataclass(frozen=True)
class Dense:
    """One attention problem with everything spelled out. H query heads, G key/value heads."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    scale: np.ndarray
    """(H,)."""
    allowed: np.ndarray
    """bool, broadcasts to (..., H, N, M)."""
    bias: np.ndarray | None = None
    gate: np.ndarray | None = None
    softcap: float | None = None
    sinks: np.ndarray | None = None
    slopes: np.ndarray | None = None
    distance: np.ndarray | None = None
    """|i - j| by positions, for the slopes."""
    factor: np.ndarray | None = None
    """What dropout multiplies the weights by: 0 or 1 / (1 - rate)."""


def repeat_heads(x, heads):
    return np.repeat(x, heads // x.shape[-3], axis=-3) if x.shape[-3] else x


def select_matmul(a, b, allowed, r):
    """a @ b over the allowed pairs only, so that what b holds elsewhere (NaN) has no say."""
    poisoned = not np.isfinite(b).all()
    if not poisoned:
        return r(a @ b)
    product = a[..., :, :, None] * b[..., None, :, :]
    return r(np.where(allowed[..., None], product, 0).sum(axis=-2))


def sum_to(x, shape):
    """Undo a broadcast."""
    while x.ndim > len(shape):
        x = x.sum(axis=0)
    axes = tuple(a for a, size in enumerate(shape) if size == 1 and x.shape[a] != 1)
    return x.sum(axis=axes, keepdims=True) if axes else x


def forward(p: Dense, r: Arithmetic):
    return _forward(p, r)[:2]


def _forward(p, r):
    heads = p.q.shape[-3]
    batch = np.broadcast_shapes(p.q.shape[:-3], p.k.shape[:-3], p.v.shape[:-3])
    q = np.broadcast_to(r(p.q), batch + p.q.shape[-3:])
    k, v = (
        np.broadcast_to(repeat_heads(r(x), heads), (*batch, heads, *x.shape[-2:]))
        for x in (p.k, p.v)
    )
    shape = (*batch, heads, q.shape[-2], k.shape[-2])
    allowed = np.broadcast_to(p.allowed, shape)
    with np.errstate(all="ignore"):
        raw = r(q @ np.swapaxes(k, -1, -2))
        scaled = r(r(p.scale)[:, None, None] * raw)
        s = scaled
        if p.softcap is not None:
            s = r(p.softcap * np.tanh(scaled / r(p.softcap)))
        if p.bias is not None:
            bias = np.broadcast_to(p.bias, shape)
            allowed = allowed & (bias != -math.inf)
            s = r(s + r(np.where(bias == -math.inf, 0, bias)))
        if p.slopes is not None:
            s = r(s - r(r(p.slopes)[:, None, None] * p.distance))
        gate = np.ones(shape) if p.gate is None else np.broadcast_to(r(p.gate), shape)
        live = allowed & (gate != 0)
        masked = np.where(live, s, -np.inf)
        high = masked.max(axis=-1, initial=-np.inf)
        if p.sinks is not None:
            high = np.maximum(high, np.broadcast_to(r(p.sinks)[:, None], high.shape))
        base = np.where(high == -np.inf, 0, high)
        a = np.where(live, r(gate * r(np.exp(r(masked - base[..., None])))), 0)
        total = a.sum(axis=-1)
        if p.sinks is not None:
            total = total + np.exp(r(p.sinks)[:, None] - base)
        total = r(total)
        lse = np.where(total == 0, -np.inf, base + np.log(np.where(total == 0, 1, total)))
        weights = r(a / np.where(total == 0, 1, total)[..., None])
        factor = np.ones(shape) if p.factor is None else p.factor
        out = select_matmul(r(weights * factor), v, live, r)
    return out, lse, (q, k, v, raw, scaled, s, allowed, live, gate, weights, factor)


def backward(p: Dense, dout, dlse, r: Arithmetic):
    """Gradients of all arguments that are there, in their own shapes."""
    out, lse, (q, k, v, raw, scaled, s, allowed, live, gate, weights, factor) = _forward(p, r)
    dout = r(dout)
    seen = (lse != -np.inf)[..., None]
    with np.errstate(all="ignore"):
        dp = r(r(dout @ np.swapaxes(v, -1, -2)) * factor)
        delta = np.where(live.any(axis=-1), (dout * out).sum(axis=-1), 0)
        if dlse is not None:
            delta = np.where(seen[..., 0], delta - dlse, 0)
        delta = r(delta)
        # weights from the log-sum-exp, as every backward that keeps no N x M array has them
        u = np.where(allowed & seen, np.exp(s - np.where(seen, lse[..., None], 0)), 0)
        weights = r(np.where(live, gate * u, 0))
        pull = np.where(allowed & seen, r(dp - delta[..., None]), 0)
        ds = r(np.where(live & seen, weights * pull, 0))
        grads = {}
        if p.bias is not None:
            grads["bias"] = sum_to(ds, p.bias.shape)
        if p.gate is not None:
            grads["gate"] = sum_to(r(np.where(allowed & seen, u * pull, 0)), p.gate.shape)
        if p.slopes is not None:
            grads["alibi_slopes"] = sum_to(-(ds * p.distance), (p.slopes.shape[0], 1, 1))[:, 0, 0]
        if p.sinks is not None:
            share = np.exp(r(p.sinks)[:, None] - lse)
            grads["sinks"] = sum_to(-(share * delta)[..., None], (p.sinks.shape[0], 1, 1))[:, 0, 0]
        if p.softcap is not None:
            ds = r(np.where(live, ds * (1 - np.tanh(scaled / p.softcap) ** 2), 0))
        grads["scale"] = sum_to(np.where(live, ds * raw, 0), (p.q.shape[-3], 1, 1))[:, 0, 0]
        draw = r(r(p.scale)[:, None, None] * ds)
        dq = select_matmul(draw, k, live, r)
        transposed = np.swapaxes(live, -1, -2)
        dk = select_matmul(np.swapaxes(draw, -1, -2), q, transposed, r)
        dv = select_matmul(np.swapaxes(r(weights * factor), -1, -2), dout, transposed, r)

    def groups(x, like):
        size = like.shape[-3]
        return x.reshape(*x.shape[:-3], size, x.shape[-3] // max(size, 1), *x.shape[-2:]).sum(
            axis=-3
        )

    grads["q"] = sum_to(dq, p.q.shape)
    grads["k"] = sum_to(groups(dk, p.k), p.k.shape)
    grads["v"] = sum_to(groups(dv, p.v), p.v.shape)
    return grads


def ulp(dtype, value):
    """Distance to the next number of `dtype` above `value`."""
    bits = {"float16": 10, "bfloat16": 7, "float32": 23, "float64": 52}[np.dtype(dtype).name]
    least = {"float16": -14, "bfloat16": -126, "float32": -126, "float64": -1022}[
        np.dtype(dtype).name
    ]
    exponent = max(math.floor(math.log2(value)), least) if value > 0 else least
    return 2.0 ** (exponent - bits)


def assert_close(got, want, rough, *, factor, name, dtype=None, again=None):
    """The rule: an error at most `factor` times that of plain arithmetic, + 2 ulp of the largest.

    Also dtype, shape, and the same places for NaN and inf. Plain arithmetic can be right by luck,
    most of all where a gradient is one number or a few (a scale, a sink): `again` then gives (want,
    rough) of other draws, and the largest error of plain arithmetic among them, relative to the
    largest value, counts.
    """
    dtype = np.dtype(dtype or got.dtype)
    assert got.dtype == dtype, f"{name}: dtype {got.dtype}, expected {dtype}"
    assert got.shape == want.shape, f"{name}: shape {got.shape}, expected {want.shape}"
    if not got.size:
        return
    got = np.asarray(got).astype(np.longdouble)
    assert (np.isnan(got) == np.isnan(want)).all(), f"{name}: NaN in other places"
    infinite = np.isinf(want)
    assert (got[infinite] == want[infinite]).all(), f"{name}: inf in other places"
    finite = np.isfinite(want)
    if not finite.any():
        return
    largest = float(np.abs(want[finite]).max())
    with np.errstate(invalid="ignore"):
        slack = np.abs(rough - want)[finite & np.isfinite(rough)]
        error = np.where(finite, np.abs(got - want), 0)
    unit = float(slack.max(initial=0))
    worst = np.unravel_index(np.argmax(error), error.shape)
    if again is not None and error[worst] > factor * unit + 2 * ulp(dtype, largest):
        shares = [np.abs(b - a).max() / np.abs(a).max() for a, b in again() if a.any()]
        unit = max(unit, largest * float(max(shares, default=0)))
    bound = factor * unit + 2 * ulp(dtype, largest)
    assert error[worst] <= bound, (
        f"{name}: error {float(error[worst]):.3g} at {tuple(map(int, worst))} exceeds {bound:.3g} "
        f"(got {float(got[worst]):.6g}, exact {float(want[worst]):.6g})"
    )
