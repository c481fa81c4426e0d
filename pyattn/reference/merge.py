"""Two results over disjoint sets of keys, made one by their log-sum-exps."""

from __future__ import annotations

from typing import Any

import numpy as np

from .precision import FLOAT64, Precision


def merge(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, *,
          precision: Precision = FLOAT64) -> tuple[np.ndarray, np.ndarray]:
    """Return ``(out, lse)`` of the union: lse = log(e^a + e^b), out = sum of e^(lse_r - lse) out_r.

    Shapes: `out` (..., N, E), `lse` (..., N). A part whose lse is -inf is not looked at.

    Examples
    --------
    >>> from pyattn import reference
    >>> reference.merge([[2.0]], [0.0], [[4.0]], [0.0])
    (array([[3.]]), array([0.69314718]))
    """
    with np.errstate(all="ignore"):
        out, lse, _ = _merged(out_a, lse_a, out_b, lse_b, precision)
        return out.astype(precision.store), lse


def merge_backward(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, dout: Any, dlse: Any = None, *,
                   precision: Precision = FLOAT64) -> dict[str, np.ndarray]:
    """Gradients of `merge`: ``dout_r = w_r dout``, ``dlse_r = w_r (dlse + dout.(out_r - out))``."""
    with np.errstate(all="ignore"):
        out, lse, parts = _merged(out_a, lse_a, out_b, lse_b, precision)
        dout = precision.load(dout)
        dlse = np.zeros_like(lse) if dlse is None else precision.load(dlse)
        result = {}
        for name, given, part, weight in zip("ab", (out_a, out_b), *zip(*parts, strict=True),
                                             strict=True):
            seen = weight != 0
            pull = np.where(seen, dlse + (dout * (part - out)).sum(-1), 0)
            dpart = np.where(seen[..., None], weight[..., None] * dout, 0)
            result[f"out_{name}"] = precision.gradient(dpart, given)
            result[f"lse_{name}"] = weight * pull
        return result


def _merged(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, precision: Precision) -> Any:
    outs = [precision.load(out_a), precision.load(out_b)]
    lses = [precision.load(lse_a), precision.load(lse_b)]
    lse = np.logaddexp(*lses)
    weights = [np.where(x == -np.inf, 0, np.exp(x - lse)) for x in lses]
    parts = [(np.where((w != 0)[..., None], out, 0), w)
             for out, w in zip(outs, weights, strict=True)]
    (part_a, w_a), (part_b, w_b) = parts
    out = precision.round(w_a[..., None] * part_a + w_b[..., None] * part_b)
    return out, lse, parts
