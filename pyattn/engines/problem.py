"""The one frozen record that the softmax engine hands to a kernel module, and what it asks of one.

Letters: B batch items (all leading axes in one), H query heads, G key/value heads (H a multiple of
G; head h reads h // (H // G)), N queries, M keys, D width of q and k, E width of v and out.

A kernel module for this engine, ``pyattn.kernels.<backend>.softmax``, has a constant and five
functions:

``refuses(problem)``
    Why it cannot run this problem, or None.
``forward(problem)``
    ``(out, lse)``, (B, H, N, E) and (B, H, N). A row that sees no key: out 0, lse -inf (with a
    sink: the sink).
``delta(dout, out, lse, dlse)``
    ``rowsum(dout * out) - dlse``, (B, H, N); 0 where lse is -inf, whatever the others hold there.
    `dout` and `out` are (B, H, N, E) in the dtype of q, `lse` and `dlse` (may be None) in acc.
``backward(problem, dout, lse, delta)``
    Gradients by name: "q", "k", "v", "scale" (H,), and those of bias, gate (in the shape of the
    term's array) and offsets where given. `lse` and `delta` are those of the merged result.
``weights(problem, lse)``
    The probabilities before dropout, (B, H, N, M).

``INDEXED`` says whether it takes problems with a `q_index` or `k_index`. Then ``forward`` and
``backward`` also take ``onto``: out and lse, or the gradients of q, k and v by name, in acc, to
which theirs are added (out by the shares that the log-sum-exps tell), in place.

Arrays may be strided views, and are not written to. lse, delta and the gradients of scale and
offsets come in acc; out, weights and the other gradients in acc or in the dtype of their argument,
as the kernel likes, but what `Problem.summed` names in acc: it is added to others.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import numpy as np

from ..arrays import Array

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Term:
    """An array that broadcasts over the scores (B, H, N, M), kept in its own shape.

    `array` is (b, h, n, m) with h in {1, H}, n in {1, N}, m in {1, M}; batch item B reads row
    ``item[B]`` of the first axis.
    """

    array: Array
    item: np.ndarray
    """int32, shape (B,)."""


@dataclasses.dataclass(frozen=True)
class GateForm:
    """How the array of a gate becomes a factor for each pair: by strides unless told otherwise.

    The gradient is that of the array. One at most of the forms is taken.
    """

    block: int = 1
    """Query i and key j read ``[i // block, j // block]``."""
    ramp: float = 0.0
    """If not 0, the array holds spans, m = 1: ``clip((ramp + span - distance) / ramp, 0, 1)``, with
    the distance query position - key position - shift; its gradient is 0 where that is clipped."""
    shift: int = 0
    by_offset: bool = False
    """The array is a table (1, h, 1, W), read like `Problem.offsets`."""

    @property
    def positional(self) -> bool:
        """Whether positions are needed."""
        return self.by_offset or self.ramp != 0


BY_STRIDES = GateForm()


@dataclasses.dataclass(frozen=True)
class Problem:
    """Softmax attention over some pairs, ready for a kernel.

    scores = scale * q.k -> softcap -> + bias + offsets -> x gate, mask -> softmax with sinks

    Arrays of the caller's library may be strided views of any float dtype in `arrays.FLOATS`;
    q, k and v share theirs. "acc" is float64 where that is float64, else float32. What tells
    kernels where to go (lengths, layouts, positions) lives on the host.
    """

    q: Array
    """(B, H, N, D)."""
    k: Array
    """(B, G, M, D)."""
    v: Array
    """(B, G, M, E)."""
    scale: Array
    """(H,), acc."""
    blocks: Any
    """The BlockMask over N x M, before lengths are clipped."""
    layout: np.ndarray
    """int32 (B, H): which layout of `blocks` a batch item and head reads."""
    q_lengths: np.ndarray
    """int32 (B,): queries from here on are padding, treated as rows that see no key."""
    kv_lengths: np.ndarray
    """int32 (B,): keys from here on are padding; a kernel clips its last tile here."""
    softcap: float | None = None
    """scores become softcap * tanh(scores / softcap)."""
    bias: Term | None = None
    """Added to the scores; -inf masks. Any float dtype."""
    gate: Term | None = None
    """In [0, 1]; multiplies the exponentials. Any float dtype."""
    gate_form: GateForm = BY_STRIDES
    offsets: Array | None = None
    """(1 or H, W): added to the score by key position - query position - offset_origin."""
    offset_origin: int = 0
    """The distance that column 0 of `offsets` and of a gate by offset stands for."""
    sinks: Array | None = None
    """(H,), acc: a logit that joins every row's denominator and has no value."""
    dropout: float = 0.0
    """Probability that a weight is dropped; the others are divided by 1 - dropout."""
    dropout_seed: int = 0
    """64 bits, the key of the counter-based generator."""
    q_positions: np.ndarray | None = None
    """int32 (1 or B, N); given when offsets, a gate or dropout need it."""
    k_positions: np.ndarray | None = None
    """int32 (1 or B, M); likewise."""
    streams: np.ndarray | None = None
    """int32 (1 or B, N): dropout's number of the sequence that a query is of."""
    q_index: np.ndarray | None = None
    """int32 (B, 1 or H, N), for kernels that are ``INDEXED``: which token of q a query is, -1 for a
    row of zeros whose results are dropped. q is then (B', H, T, D), item b takes its tokens from
    ``b // (B // B')``, and no token of a head is listed twice. So are dout and all results."""
    k_index: np.ndarray | None = None
    """int32 (B, 1 or G, M): likewise for k and v; without `q_index`, B' is B."""
    summed: tuple[str, ...] = ()
    """Those of q, k, v whose gradients, and "out" if the output, are added to others."""


def record(kind: type[T], fields: dict[str, Any]) -> T:
    """Make a frozen dataclass of `fields`; those left out have their defaults, which are constants.

    Its own constructor takes several microseconds, as it sets every field apart.
    """
    made = object.__new__(kind)
    object.__setattr__(made, "__dict__", fields)
    return made
