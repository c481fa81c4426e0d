"""Which distances to attend to is learned: SparseBERT's differentiable attention mask."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from .. import arrays, masks
from ..arrays import Array
from ..checks import ShapeError, require_choice
from ..differentiable import ON_HOST, Saved, differentiable, gradients
from ..engines.problem import GateForm
from ..features.connections import sample_distances, spread_alpha
from ..features.gates import GatesSaved
from .attention import attend, handed_on

REFUSED = ("gate", "alibi_slopes")

CLOSED = 1e4
"""What the additive form takes from the score of a closed distance."""


@dataclasses.dataclass(frozen=True)
class SparseBertSaved(Saved):
    """What attention keeps, and the gates by distance that its table was made from."""

    attended: Any
    sampled: GatesSaved
    alpha: Array
    additive: bool
    distances: np.ndarray = dataclasses.field(metadata=ON_HOST)
    """Those of the table's columns, of either sign."""

    @property
    def decisions(self) -> dict[str, Array]:
        """``noise``, with hard gates ``gates``, and those of the attention."""
        return {**self.attended.decisions, **self.sampled.decisions}

    @property
    def stats(self) -> dict[str, int]:
        """Those of the attention."""
        return self.attended.stats

    def backward(self, dout: Array, dlse: Array | None = None) -> Any:
        """Gradients of the array arguments given, ``alpha`` after ``v``."""
        found = self.attended.backward(dout, dlse)._asdict()
        xp = arrays.namespace(self.alpha)
        table = found.pop("offsets" if self.additive else "gate")
        # forward: the score has 1e4 (gate - 1) added
        table = table * CLOSED if self.additive else table
        dgates = _folded(xp, table, self.distances, self.alpha.shape[1])
        if self.alpha.shape[0] != dgates.shape[0]:
            dgates = xp.sum(dgates, axis=0, keepdims=True)
        dalpha = spread_alpha(xp, self.sampled.backward(dgates).logits, self.alpha)
        operands = {name: found.pop(name) for name in ("q", "k", "v")}
        found = {**operands, "alpha": dalpha, **found}
        return gradients(tuple(found))(**found)


def _folded(xp: Any, table: Array, distances: np.ndarray, size: int) -> Array:
    """Sum a table's columns by the size of their distance: (H, W) as (H, size)."""
    # columns are in the order of their distances, so those before 0 count down
    before = int(np.count_nonzero(distances < 0))

    def padded(x: Array, first: int) -> Array:
        heads, width = x.shape
        pieces = [xp.zeros((heads, count), dtype=x.dtype, device=arrays.device(x))
                  for count in (first, size - first - width)]
        return xp.concat([pieces[0], x, pieces[1]], axis=1)

    return padded(xp.flip(table[:, :before], axis=1), 1 if before else 0) + padded(
        table[:, before:], 0)


@differentiable
def sparsebert_attention(q: Array, k: Array, v: Array, alpha: Array, *, temperature: float = 1.0,
                         hard: bool = True, additive: bool = False, drop_diagonal: bool = False,
                         causal: bool | str = False, mask: Any = None, rng: Any = None,
                         decisions: dict[str, Any] | None = None,
                         **options: Any) -> tuple[Any, SparseBertSaved]:
    """Attention with a gate for each distance and head, drawn from logits that learn.

    The gate of distance d = |i - j| is the second of the two classes in a Gumbel-softmax of
    ``alpha[h, d]``: ``sigmoid((alpha[h, d, 1] - alpha[h, d, 0] + noise) / temperature)``; if `hard`
    it is 1 above one half and 0 below, with the gradient as it was. It multiplies the exponentials.
    E.g. open distances {0, 2}, four tokens: 0->{0, 2}  1->{1, 3}  2->{0, 2}  3->{1, 3}.

    Parameters
    ----------
    q : array, shape (..., H, N, D), float16, bfloat16, float32 or float64
        Queries.
    k : array, shape (..., G, M, D), dtype of `q`
        Keys; G divides H.
    v : array, shape (..., G, M, E), dtype of `q`
        Values.
    alpha : array, shape (H or 1, L, 2), any float dtype, L >= max(N, M)
        Logits by distance: closed, open. Near 0 at first, say 1e-3 times normal noise.
    temperature : float, > 0
        Near 0 gates are near 0 or 1.
    hard : bool
    additive : bool
        The authors' form: ``1e4 (gate - 1)`` is added to the score. A closed distance then has no
        weight and no gradient, and opens again by noise alone.
    drop_diagonal : bool
        No token sees itself, which the paper found to be of little use.
    causal : bool or "top_left"
        True: query i stands at position ``i + M - N`` and sees keys up to its own; "top_left": i.
    mask : Mask or boolean array, optional
        Intersected with the rule above.
    rng : int, numpy.random.Generator or None
    decisions : dict, optional
        ``noise (H, L)``, the difference of two Gumbel draws, 0 for gates without chance; ``gates
        (H, L)`` where they are hard; ``dropout_seed``.
    **options
        As for `pyattn.attention`, but ``gate`` and ``alibi_slopes``.

    Returns
    -------
    array, shape (..., H, N, E), dtype of `q`
        Rows that see no key are 0. With ``return_lse`` a tuple, as for `pyattn.attention`.
        Gradients: q, k, v, alpha, then those of options.

    Raises
    ------
    ShapeError
        `alpha` does not fit the heads, or holds too few distances.
    OptionError
        A temperature that is not positive.

    Notes
    -----
    All pairs are visited while the gates learn, O(N M (D + E)); their gradient is summed along
    diagonals, never by pair. `pyattn.features.sparsebert_mask` exports what was learned, to be
    computed sparsely; `sparsebert_loss`, there too, is the penalty that closes distances. The
    default differs from the authors' code, which has `additive`: multiplied, ``d gate = u (dp -
    delta)``, ``u = e^(score - lse)``, so that what is closed can open again.

    References
    ----------
    .. [1] Shi et al., "SparseBERT: Rethinking the Importance Analysis in Self-attention", 2021,
       arXiv:2102.12871, section 4.1 (the mask), 3.3 (the diagonal).

    Examples
    --------
    >>> import numpy as np, pyattn
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 6, 4))
    >>> alpha = np.zeros((2, 6, 2))
    >>> alpha[:, :2, 1] = 9                      # distances 0 and 1
    >>> out, saved = pyattn.sparsebert_attention.forward(q, k, v, alpha,
    ...                                                  decisions={"noise": np.zeros((2, 6))})
    >>> np.allclose(out, pyattn.sliding_window_attention(q, k, v, window=1))
    True
    >>> saved.backward(out).alpha.shape
    (2, 6, 2)
    """
    options = handed_on(options, REFUSED, "the gates by distance take its place")
    causal = require_choice("causal", causal, (False, True, "top_left"))
    known = dict(decisions or {})
    if "dropout_seed" in known:
        options["decisions"] = {"dropout_seed": known.pop("dropout_seed")}
    rng = np.random.default_rng(rng)
    gates, sampled = sample_distances(alpha, temperature, hard, rng, known)
    heads, n, m = q.shape[-3], q.shape[-2], k.shape[-2]
    if alpha.shape[0] not in (1, heads) or alpha.shape[1] < max(n, m):
        raise ShapeError(f"alpha must be (H or 1, L, 2) with H = {heads} and L at least "
                         f"{max(n, m)}; got {tuple(alpha.shape)}")
    xp, seen = arrays.namespace(q, k, v, alpha), []

    def table(distances: np.ndarray) -> Array:
        seen.append(distances)
        index = arrays.from_host(xp, np.abs(distances), arrays.device(gates))
        found = xp.take(gates, index, axis=1)
        return CLOSED * (found - 1) if additive else found

    if drop_diagonal:
        mask = masks.restrict(~masks.window(0, 0), mask)
    term = {"offsets": table} if additive else {"gate": table,
                                                "gate_form": GateForm(by_offset=True)}
    out, attended = attend(q, k, v, mask=mask, causal=causal, rng=rng, **term, **options)
    return out, SparseBertSaved(attended, sampled, alpha, additive, seen[0])
