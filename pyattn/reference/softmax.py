"""Softmax attention as the textbooks write it, one head at a time, with its gradients.

    scores = scale * q.k  ->  softcap  ->  + bias - slope |i - j|  ->  x gate, mask  ->  softmax

Letters: H query heads, G key/value heads (head h reads h // (H // G)), N queries, M keys, D and E
the widths of q, k and of v. A row that sees no key has out 0 and lse -inf (lse = sink with a
sink) and adds nothing to a gradient. A NaN or inf reaches only what an allowed pair carries it to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from .precision import FLOAT64, Precision


def attention(q: Any, k: Any, v: Any, *, precision: Precision = FLOAT64,
              **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return ``(out, lse)`` by the dense formulas.

    Parameters
    ----------
    q, k, v : array_like
        (..., H, N, D), (..., G, M, D), (..., G, M, E); leading axes broadcast.
    precision : Precision
        How the formulas are evaluated; float64 unless told otherwise.
    **options
        mask, bias, gate, keep : broadcast to (..., H, N, M); `mask` and `keep` are boolean. `keep`
            tells which weights dropout leaves, and they are divided by 1 - `dropout`.
        causal : False, True (query i stands at i + keys - queries), or "top_left" (at i).
        window : ``w`` for |i - j| <= w (causal: 0 <= i - j <= w), or (left, right); None is open.
        scale : float or (H,), 1 / sqrt(D) if None. softcap : float.
        sinks, alibi_slopes : (H,).
        q_lengths, kv_lengths : integers that broadcast over the leading axes.
        segments : lengths of the sequences packed along N and M, or a pair of such lists.

    Returns
    -------
    out : (..., H, N, E) in ``precision.store``
    lse : (..., H, N) in ``precision.sums``

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn import reference
    >>> x = np.array([[[1.0], [3.0]]])
    >>> out, lse = reference.attention(0 * x, 0 * x, x, causal=True)
    >>> out.ravel(), lse.ravel()
    (array([1., 2.]), array([0.        , 0.69314718]))
    """
    with np.errstate(all="ignore"):
        call = _Call.of(q, k, v, precision, options)
        out = np.zeros((*call.lead, call.n, call.v.shape[-1]), precision.sums)
        lse = np.zeros((*call.lead, call.n), precision.sums)
        for index, head in call.heads():
            w = head.softmax()
            out[index] = _matmul(precision, precision.round(w.p * head.kept), head.v, w.pairs)
            lse[index] = w.lse
        return out.astype(precision.store), lse


def weights(q: Any, k: Any, *, precision: Precision = FLOAT64, **options: Any) -> np.ndarray:
    """Return the probabilities (..., H, N, M), before dropout; options are those of `attention`."""
    with np.errstate(all="ignore"):
        call = _Call.of(q, k, np.asarray(k)[..., :0], precision, options)
        p = np.zeros((*call.lead, call.n, call.m), precision.sums)
        for index, head in call.heads():
            p[index] = head.softmax().p
        return p.astype(precision.store)


def attention_backward(q: Any, k: Any, v: Any, dout: Any, dlse: Any = None, *,
                       return_terms: bool = False, precision: Precision = FLOAT64,
                       **options: Any) -> Any:
    """Return the gradients of `attention` for the loss ``sum(dout * out) + sum(dlse * lse)``.

    Options are those of `attention`. The result is a dict that has q, k and v, and bias, gate,
    scale, sinks and alibi_slopes where they were given as arrays; each in the shape that it was
    given in. With `return_terms` a pair: besides, a dict of what was summed to make the latter,
    (..., H, N, M) or, for sinks, (..., H, N), and two measures of how ill-conditioned the others
    are: "pull", p (|dp| + |delta|), whose two parts nearly cancel in dq and dk, and "push",
    p |lse| max |dout|, as p = e^(s - lse) has a relative error of |lse| eps.
    """
    with np.errstate(all="ignore"):
        call = _Call.of(q, k, v, precision, options)
        dout = np.broadcast_to(precision.load(dout), (*call.lead, call.n, call.v.shape[-1]))
        dlse = np.broadcast_to(precision.load(0 if dlse is None else dlse), (*call.lead, call.n))
        arguments = {"q": q, "k": k, "v": v} | {
            name: options[name] for name in ("bias", "gate", "scale", "sinks", "alibi_slopes")
            if np.ndim(options.get(name, 0)) > 0}
        total = {name: np.zeros(getattr(call, name).shape, precision.sums) for name in "qkv"}
        pairs = (*call.lead, call.n, call.m)
        terms = {name: np.zeros((*call.lead, call.n) if name == "sinks" else pairs, precision.sums)
                 for name in ("pull", "push", *arguments) if name not in "qkv"}
        for index, head in call.heads():
            group = (*index[:-1], index[-1] // call.share)
            gradients = head.gradients(dout[index], dlse[index])
            for name in "qkv":
                total[name][index if name == "q" else group] += gradients[name]
            for name, kept in terms.items():
                kept[index] = gradients[name]
        per_head = {name: precision.sum(terms[name], tuple(range(len(call.lead), terms[name].ndim)))
                    for name in ("scale", "sinks", "alibi_slopes") if name in terms}
        total |= terms | per_head
        result = {name: precision.gradient(_summed(total[name], np.shape(x)), x)
                  for name, x in arguments.items()}
        return (result, terms) if return_terms else result


@dataclasses.dataclass(frozen=True)
class _Weights:
    """One head's (N, M) arrays: scores without mask, and what softmax makes of them."""

    dots: np.ndarray
    """q.k before scale."""
    slope: np.ndarray | float
    """d score / d (scale * q.k): what softcap takes away."""
    scores: np.ndarray
    p: np.ndarray
    pairs: np.ndarray
    """Pairs that are looked at: allowed, and of a row that is not empty."""
    lse: np.ndarray
    """(N,)"""


@dataclasses.dataclass(frozen=True)
class _Head:
    """One query head of one batch item, everything spread out to (N, .) and (N, M)."""

    precision: Precision
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    allowed: np.ndarray
    distance: np.ndarray
    """|i - j| by positions."""
    scale: np.ndarray
    softcap: float | None
    bias: np.ndarray | None
    gate: np.ndarray | None
    sink: np.ndarray | None
    alibi: np.ndarray | None
    kept: np.ndarray | float
    """Dropout's factor: 0, or 1 / (1 - rate)."""

    def softmax(self) -> _Weights:
        r = self.precision.round
        dots = self.precision.matmul(self.q, self.k.T)
        s = r(self.scale * dots)
        slope: Any = 1.0
        if self.softcap is not None:
            t = r(np.tanh(r(s / self.softcap)))
            slope = r(1 - t * t)
            s = r(self.softcap * t)
        allowed = self.allowed
        if self.bias is not None:
            s = r(s + self.bias)
            allowed = allowed & (self.bias != -np.inf)
        if self.alibi is not None:
            s = r(s - r(self.alibi * self.distance))
        gate = np.ones_like(s) if self.gate is None else self.gate
        is_open = allowed & (gate != 0)

        top = np.max(s, axis=1, initial=-np.inf, where=is_open)
        if self.sink is not None:
            top = np.maximum(top, self.sink)
        top = np.where(top == -np.inf, 0, top)
        a = np.where(is_open, gate * np.exp(s - top[:, None]), 0)
        total = self.precision.sum(a, 1) + (0 if self.sink is None else np.exp(self.sink - top))
        lse = top + np.log(total)
        pairs = allowed & (lse != -np.inf)[:, None]
        p = np.where(pairs, r(a / total[:, None]), 0)
        return _Weights(dots, slope, s, p, pairs, lse)

    def gradients(self, dout: np.ndarray, dlse: np.ndarray) -> dict[str, np.ndarray]:
        r = self.precision.round
        w = self.softmax()
        u = np.where(w.pairs, r(np.exp(w.scores - w.lse[:, None])), 0)
        p = u if self.gate is None else np.where(self.gate == 0, 0, r(self.gate * u))
        dp = np.where(w.pairs, r(self.precision.matmul(dout, self.v.T) * self.kept), 0)
        # a row without pairs has an output of 0, whatever dout holds there
        out = _matmul(self.precision, r(p * self.kept), self.v, w.pairs)
        delta = np.where(w.pairs.any(1), self.precision.sum(dout * out, 1), 0) - dlse
        pull = dp - delta[:, None]
        ds = np.where(w.pairs, r(p * pull), 0)
        dx = np.where(w.pairs, r(ds * w.slope), 0)
        result = {
            "q": r(self.scale * _matmul(self.precision, dx, self.k, w.pairs)),
            "k": r(self.scale * _matmul(self.precision, dx.T, self.q, w.pairs.T)),
            "v": _matmul(self.precision, r(p * self.kept).T, dout, w.pairs.T),
            "bias": ds,
            "gate": np.where(w.pairs, r(u * pull), 0),
            "scale": np.where(w.pairs, dx * w.dots, 0),
            "alibi_slopes": -ds * self.distance,
            "pull": np.where(w.pairs, p * (abs(dp) + abs(delta)[:, None]), 0),
            "push": np.where(w.pairs, p * (abs(w.lse) * abs(dout).max(1, initial=0))[:, None], 0),
        }
        if self.sink is not None:
            share = np.where(w.lse == -np.inf, 0, np.exp(self.sink - w.lse))
            result["sinks"] = -share * delta
        return result


@dataclasses.dataclass(frozen=True)
class _Call:
    """All heads of a call: arrays with their leading axes spread out."""

    precision: Precision
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    options: dict[str, Any]

    @classmethod
    def of(cls, q: Any, k: Any, v: Any, precision: Precision, options: dict[str, Any]) -> _Call:
        unknown = set(options) - _OPTIONS
        if unknown:
            raise TypeError(f"unknown option {', '.join(sorted(unknown))}; "
                            f"there are {', '.join(sorted(_OPTIONS))}")
        q, k, v = (precision.load(x) for x in (q, k, v))
        lead = np.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
        q, k, v = (np.broadcast_to(x, (*lead, *x.shape[-3:])) for x in (q, k, v))
        h, g = q.shape[-3], k.shape[-3]
        if (h % g if g else h) or k.shape[-3:-1] != v.shape[-3:-1] or q.shape[-1] != k.shape[-1]:
            raise ValueError("q (..., H, N, D), k (..., G, M, D) and v (..., G, M, E) with H a "
                             f"multiple of G do not fit; got {q.shape}, {k.shape}, {v.shape}")
        if options.get("segments") is not None and (options.get("q_lengths") is not None
                                                    or options.get("kv_lengths") is not None):
            raise ValueError("segments and q_lengths or kv_lengths exclude each other")
        return cls(precision, q, k, v, options)

    @property
    def lead(self) -> tuple[int, ...]:
        """Batch axes and query heads."""
        return self.q.shape[:-2]

    @property
    def n(self) -> int:
        return int(self.q.shape[-2])

    @property
    def m(self) -> int:
        return int(self.k.shape[-2])

    @property
    def share(self) -> int:
        """How many query heads read one key/value head."""
        return max(1, int(self.lead[-1]) // max(1, int(self.k.shape[-3])))

    def heads(self) -> Iterator[tuple[tuple[int, ...], _Head]]:
        option = self.options.get
        scale = option("scale")
        if scale is None:
            scale = 1 / np.sqrt(self.precision.sums.type(max(1, self.q.shape[-1])))
        scales = self._spread(scale)
        biases, gates = self._spread(option("bias"), 2), self._spread(option("gate"), 2)
        sinks, slopes = self._spread(option("sinks")), self._spread(option("alibi_slopes"))
        masks = self._spread(option("mask"), 2, load=False)
        keeps = self._spread(option("keep"), 2, load=False)
        given = {"q_lengths": self.n, "kv_lengths": self.m} | {
            name: self.options[name] for name in ("q_lengths", "kv_lengths")
            if option(name) is not None}
        lengths = [np.broadcast_to(x, self.lead[:-1]) for x in given.values()]
        for index in np.ndindex(self.lead):
            item, group = index[:-1], (*index[:-1], index[-1] // self.share)
            allowed, distance = _pairs(
                self.n, self.m, option("causal", False), option("window"),
                option("segments") or ([int(lengths[0][item])], [int(lengths[1][item])]))
            if masks is not None:
                allowed = allowed & masks[index]
            kept: Any = 1.0
            if keeps is not None:
                kept = np.where(keeps[index], 1 / (1 - option("dropout", 0.0)), 0)
            yield index, _Head(
                self.precision, self.q[index], self.k[group], self.v[group], allowed,
                self.precision.load(distance), scales[index], option("softcap"),
                _at(biases, index), _at(gates, index), _at(sinks, index), _at(slopes, index), kept)

    def _spread(self, x: Any, trailing: int = 0, load: bool = True) -> Any:
        if x is None:
            return None
        x = self.precision.load(x) if load else np.asarray(x, bool)
        return np.broadcast_to(x, self.lead + (self.n, self.m)[2 - trailing:])


def _at(x: Any, index: tuple[int, ...]) -> Any:
    return None if x is None else x[index]


_OPTIONS = {"mask", "bias", "gate", "keep", "dropout", "causal", "window", "scale", "softcap",
            "sinks", "alibi_slopes", "q_lengths", "kv_lengths", "segments"}


def _pairs(n: int, m: int, causal: Any, window: Any,
           segments: Any) -> tuple[np.ndarray, np.ndarray]:
    """Which pairs causality, window and lengths allow, and |i - j| by positions; both (n, m).

    A padded batch item is one packed sequence that does not fill its axes.
    """
    q_lengths, kv_lengths = segments if np.ndim(segments[0]) else (segments, segments)
    if sum(q_lengths) > n or sum(kv_lengths) > m or min(0, *q_lengths, *kv_lengths) < 0:
        raise ValueError(f"lengths {q_lengths} and {kv_lengths} do not fit {n} queries, {m} keys")
    q_position, k_position = np.zeros(n, int), np.zeros(m, int)
    q_sequence, k_sequence = np.full(n, -1), np.full(m, -2)
    i = j = 0
    for number, (rows, keys) in enumerate(zip(q_lengths, kv_lengths, strict=True)):
        q_sequence[i:i + rows] = k_sequence[j:j + keys] = number
        q_position[i:i + rows] = np.arange(rows) + (0 if causal == "top_left" else keys - rows)
        k_position[j:j + keys] = np.arange(keys)
        i, j = i + rows, j + keys

    allowed = q_sequence[:, None] == k_sequence
    ahead = q_position[:, None] - k_position
    if causal:
        allowed &= ahead >= 0
    if window is not None:
        left, right = (window, window) if np.ndim(window) == 0 else window
        if left is not None:
            allowed &= ahead <= left
        if right is not None:
            allowed &= ahead >= -right
    return allowed, abs(ahead)


def _matmul(precision: Precision, w: np.ndarray, x: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """``w @ x`` over `pairs` alone: nothing else is multiplied, so that 0 * NaN cannot happen."""
    finite = np.isfinite(x).all(1)
    out = precision.matmul(np.where(pairs & finite, w, 0), np.where(finite[:, None], x, 0))
    for j in np.flatnonzero(~finite):
        rows = pairs[:, j]
        out[rows] += w[rows, j, None] * x[j]
    return out


def _summed(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Sum the gradient of what was broadcast from `shape`."""
    extra = x.ndim - len(shape)
    x = x.sum(tuple(range(extra)))
    axes = tuple(a for a, s in enumerate(shape) if s == 1 and x.shape[a] != 1)
    return np.asarray(x.sum(axes, keepdims=True))
