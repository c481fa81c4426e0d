"""Tiled softmax attention on a GPU, by Numba: forward, backward, weights.

A bias of -inf and a gate of exactly 0 mask a pair, as the BlockMask and the lengths do: what lies
behind it has no say, with one exception. The gradient of a closed gate is what opening it would
change, so it does meet the values behind.

Numba is imported by the first problem that is not refused for what is missing here.
"""

from __future__ import annotations

from typing import Any

from pyattn.arrays import Array, dtype_name

from ..array_api.softmax import weights as dense_weights
from . import missing

INDEXED = False

DTYPES = ("float16", "float32", "float64")


def refuses(problem: Any) -> str | None:
    """Say why `problem` cannot run here."""
    given = {"q, k and v": problem.q, "bias": problem.bias and problem.bias.array,
             "gate": problem.gate and problem.gate.array, "offsets": problem.offsets}
    for name, x in given.items():
        if x is not None and dtype_name(x) not in DTYPES:
            return (f"{name} may be {', '.join(DTYPES)}; got {dtype_name(x)}, of which Numba has "
                    "no arrays")
    return missing(problem.q)


def forward(problem: Any) -> tuple[Array, Array]:
    """Output (B, H, N, E) and log-sum-exp (B, H, N)."""
    from . import launch

    return launch.forward(problem)


def delta(dout: Array, out: Array, lse: Array, dlse: Array | None) -> Array:
    """Return rowsum(dout * out) - dlse, and 0 in rows that see no key."""
    from . import launch

    return launch.delta(dout, out, lse, dlse)


def backward(problem: Any, dout: Array, lse: Array, delta: Array) -> dict[str, Array]:
    """Gradients of q, k, v, scale, and of bias, gate and offsets where given."""
    from . import launch

    return launch.backward(problem, dout, lse, delta)


def weights(problem: Any, lse: Array) -> Array:
    """The probabilities before dropout, (B, H, N, M): dense, so whole-array functions do."""
    return dense_weights(problem, lse)
