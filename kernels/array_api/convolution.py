"""Convolution over tokens for any array-API namespace: tap by tap, over all tokens at once.

The tokens of a tap are a slice of the padded sequence. Weights (B, N, H, K) are as large as the
logits that they come from; beside them there are a few arrays of the size of x.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pyattn.arrays import accumulator, device, from_host, namespace

from .philox import kept

Array = Any


def refuses(problem: Any) -> str | None:
    """Nothing: this is the backend that runs everywhere."""
    return None


def forward(problem: Any) -> Array:
    """Output (B, N, C), in acc."""
    p, xp = problem, namespace(problem.x)
    weights, _, _, keep = _weights(p)
    out = None
    with np.errstate(all="ignore"):
        for k, part in enumerate(_taps(p)):
            w = _tap(xp, weights, k) if keep is None else _tap(xp, weights * keep, k)
            term = _times(xp, w, _by_head(xp, p, part))
            out = term if out is None else out + term
    return _inside(xp, p, xp.reshape(out, p.x.shape))


def backward(problem: Any, dout: Array) -> dict[str, Array]:
    """Gradients of x, logits and, where given, span (B, N, H); in acc."""
    p, xp = problem, namespace(problem.x)
    weights, allowed, gate, keep = _weights(p)
    taps = weights.shape[3]
    dout = _inside(xp, p, xp.astype(dout, weights.dtype))
    wide = _by_head(xp, p, dout)
    with np.errstate(all="ignore"):
        # forward: out[t] = sum_k weight[t, k] x[t + k - pad]
        dweights = xp.stack([xp.sum(wide * _by_head(xp, p, part), axis=3) for part in _taps(p)],
                            axis=-1)
        used = weights if keep is None else weights * keep
        dx = None
        for k in range(taps):
            term = xp.reshape(_times(xp, _tap(xp, used, k), wide), p.x.shape)
            term = _shifted(xp, term, p.pad - k)
            dx = term if dx is None else dx + term
        if keep is not None:
            dweights = dweights * keep
        live = allowed & (weights != 0)
        delta = xp.sum(xp.where(live, weights * dweights, 0.0), axis=-1, keepdims=True)
        # forward: weight = gate e^logits / sum of these
        dlogits = xp.where(live, weights * (dweights - delta), 0.0)
        found = {"x": _inside(xp, p, dx), "logits": dlogits}
        if gate is not None:
            # forward: gate = clip((ramp + span - distance) / ramp, 0, 1)
            inside = live & (gate > 0) & (gate < 1)
            safe = xp.where(inside, gate, xp.ones_like(gate))
            found["span"] = xp.sum(xp.where(inside, dlogits / safe, 0.0), axis=-1) / p.ramp
    return found


def constant(problem: Any) -> Array:
    """Output (B, N, C), in acc."""
    p, xp = problem, namespace(problem.x)
    w = xp.astype(p.w, accumulator(xp, p.x))
    out = None
    with np.errstate(all="ignore"):
        for k, part in enumerate(_taps(p, w.shape[0])):
            out = part * w[k, :] if out is None else out + part * w[k, :]
    return _inside(xp, p, out)


def constant_backward(problem: Any, dout: Array) -> tuple[Array, Array]:
    """Gradients of x and w, in acc."""
    p, xp = problem, namespace(problem.x)
    w = xp.astype(p.w, accumulator(xp, p.x))
    dout = _inside(xp, p, xp.astype(dout, w.dtype))
    dx, dw = None, []
    with np.errstate(all="ignore"):
        for k, part in enumerate(_taps(p, w.shape[0])):
            # forward: out[t] = sum_k w[k] x[t + k - pad]
            dw.append(xp.sum(dout * part, axis=(0, 1)))
            term = _shifted(xp, dout * w[k, :], p.pad - k)
            dx = term if dx is None else dx + term
    return _inside(xp, p, dx), xp.stack(dw)


def _index(xp: Any, p: Any, x: np.ndarray) -> Array:
    return from_host(xp, x, device(p.x))


def _inside(xp: Any, p: Any, x: Array) -> Array:
    """Return `x` (B, N, C) with zeros from the lengths on."""
    n = p.x.shape[1]
    if not (p.lengths < n).any():
        return x
    there = _index(xp, p, np.arange(n)[:, None] < p.lengths[:, None, None])
    return xp.where(there, x, xp.zeros_like(x))


def _shifted(xp: Any, x: Array, by: int) -> Array:
    """Return y[t] = x[t + by] for x (B, N, C), zeros where there is no such token."""
    batch, n, c = x.shape
    if not by:
        return x
    zeros = xp.zeros((batch, min(abs(by), n), c), dtype=x.dtype, device=device(x))
    if by > 0:
        return xp.concat([x[:, min(by, n):, :], zeros], axis=1)
    return xp.concat([zeros, x[:, :max(n + by, 0), :]], axis=1)


def _taps(p: Any, count: int | None = None) -> Any:
    """Give, tap by tap, the tokens of all positions (B, N, C), in acc."""
    xp = namespace(p.x)
    x = _inside(xp, p, xp.astype(p.x, accumulator(xp, p.x)))
    for k in range(p.logits.shape[3] if count is None else count):
        yield _shifted(xp, x, k - p.pad)


def _by_head(xp: Any, p: Any, x: Array) -> Array:
    """(B, N, C) as (B, N, H, C / H)."""
    batch, n, c = x.shape
    heads = p.logits.shape[2]
    return xp.reshape(x, (batch, n, heads, c // heads))


def _tap(xp: Any, weights: Array, k: int) -> Array:
    return weights[:, :, :, k][..., None]


def _times(xp: Any, weight: Array, x: Array) -> Array:
    """Weight times `x`, and 0 for a weight of 0 whatever `x` holds."""
    return xp.where(weight != 0, weight * x, xp.zeros_like(x))


def _weights(p: Any) -> tuple[Array, Array, Array | None, Array | None]:
    """Weights before dropout, which taps count, the gate, and the factors of dropout."""
    xp, acc = namespace(p.x), accumulator(namespace(p.x), p.x)
    batch, n, heads, taps = p.logits.shape
    at = np.arange(n)[:, None]
    token = at + np.arange(taps) - p.pad
    allowed = at < p.lengths[:, None, None]
    if p.renorm:
        allowed = allowed & (token >= 0) & (token < p.lengths[:, None, None])
    allowed = np.broadcast_to(allowed, (batch, n, taps))[:, :, None, :]
    allowed = xp.broadcast_to(_index(xp, p, allowed), p.logits.shape)
    gate, keep = None, None
    if p.span is not None:
        distance = xp.astype(_index(xp, p, np.abs(np.arange(taps) - p.pad)), acc)
        gate = xp.clip((p.ramp + p.span[..., None] - distance) / p.ramp, 0.0, 1.0)
        allowed = allowed & (gate != 0)
    with np.errstate(all="ignore"):
        s = xp.where(allowed, xp.astype(p.logits, acc), -math.inf)
        top = xp.max(s, axis=-1, keepdims=True)
        top = xp.where(top == -math.inf, xp.zeros_like(top), top)
        weights = xp.where(allowed, xp.exp(s - top), 0.0)
        if gate is not None:
            weights = weights * gate
        total = xp.sum(weights, axis=-1, keepdims=True)
        weights = weights / xp.where(total == 0, xp.ones_like(total), total)
    if p.dropout:
        stays = kept(p.dropout, p.dropout_seed, np.arange(batch)[:, None, None, None],
                     np.arange(heads)[:, None], at[:, :, None], np.arange(taps))
        keep = xp.astype(_index(xp, p, stays), acc) / (1 - p.dropout)
    return weights, allowed, gate, keep
