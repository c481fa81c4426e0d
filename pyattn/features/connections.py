"""Which connections are learned: gates for pairs of blocks, and for distances.

What variants with learned gates share, what their gates leave open as a mask, and what they cost.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from .. import arrays, masks
from ..arrays import Array
from ..checks import ShapeError, require_broadcast, require_integer, require_real
from ..differentiable import Saved, differentiable, gradients
from ..masks.algebra import host_array
from .gates import GatesSaved, binary_concrete
from .precision import cast_like, widened


def is_relative(logits: Array) -> bool:
    """Whether there is a logit for each offset between blocks, and not for each pair."""
    return logits.ndim == 2


def block_offsets(rows: int, columns: int) -> np.ndarray:
    """Return which offset is that of each pair of blocks, the first being ``1 - rows``."""
    return np.arange(columns) - np.arange(rows)[:, None] + rows - 1


def own_blocks(n: int, m: int, block_size: int, causal: bool | str) -> np.ndarray:
    """Which key blocks hold the position of a query of the block, bool (rows, columns)."""
    rows, columns = -(-n // block_size), -(-m // block_size)
    position = np.arange(n) + (0 if causal == "top_left" else m - n)
    own = np.zeros((rows, columns), bool)
    inside = (position >= 0) & (position < m)
    own[np.arange(n)[inside] // block_size, position[inside] // block_size] = True
    return own


def gate_mask(gate_logits: Array, n: int, m: int, *, block_size: int,
              causal: bool | str = False) -> masks.Mask:
    """The blocks that learned gates leave open, as a mask: logits above 0, and the own block.

    E.g. ``gated_attention(..., frozen=True)`` is ``attention(..., mask=gate_mask(...))``.

    Parameters
    ----------
    gate_logits : array, as `pyattn.gated_attention` takes it
        Or gates, if they are 0 where closed.
    n, m : int
        Queries and keys.
    block_size : int, >= 1
    causal : bool or "top_left"
        Where queries stand; the mask itself is not causal.

    Returns
    -------
    Mask
        `pyattn.masks.blocks`.

    Raises
    ------
    ShapeError
        The logits are not those of so many blocks.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.features import gate_mask
    >>> print(gate_mask(np.array([[[-1.0, -2], [3, -1]]]), 4, 4, block_size=2).draw(4))
    ██··
    ██··
    ████
    ████
    """
    block_size = require_integer("block_size", block_size, minimum=1)
    own = own_blocks(n, m, block_size, causal)
    require_blocks(gate_logits, own, None)
    open_ = host_array(gate_logits) > 0
    if is_relative(gate_logits):
        open_ = open_[:, block_offsets(*own.shape)]
    return masks.blocks(open_ | own, block_size)


def require_blocks(logits: Array, own: np.ndarray, rows: tuple[int, ...] | None) -> None:
    """Raise ShapeError unless there are logits for these blocks, and for `rows`, (..., H)."""
    arrays.require_float("gate_logits", logits)
    if is_relative(logits):
        heads = logits.shape[:1] if rows is None else rows[-1:]
        require_broadcast("gate_logits", tuple(logits.shape), (*heads, max(0, sum(own.shape) - 1)),
                          "(H, offsets between blocks)")
        if logits.shape[1] != max(0, sum(own.shape) - 1):
            raise ShapeError(f"gate_logits must have {sum(own.shape) - 1} offsets; got "
                             f"{tuple(logits.shape)}")
    elif logits.ndim < 3 or tuple(logits.shape[-2:]) != own.shape:
        raise ShapeError(f"gate_logits must be (..., H, {own.shape[0]}, {own.shape[1]}), query "
                         f"blocks and key blocks; got {tuple(logits.shape)}")
    elif rows is not None:
        require_broadcast("gate_logits", tuple(logits.shape), (*rows, *own.shape),
                          "(..., H, query blocks, key blocks)")


def _logits(alpha: Array) -> Array:
    """The difference of the two classes, which is all that their softmax depends on."""
    return alpha[..., 1] - alpha[..., 0]


def spread_alpha(xp: Any, dlogits: Array, alpha: Array) -> Array:
    """Return the gradient of alpha from that of the difference of its classes."""
    # forward: logit = alpha[..., 1] - alpha[..., 0]
    return cast_like(xp, xp.stack([-dlogits, dlogits], axis=-1), alpha)


def sample_distances(alpha: Array, temperature: float, hard: bool, rng: Any,
                     decisions: dict[str, Any] | None) -> tuple[Array, GatesSaved]:
    """Draw a gate (H, L) for each distance."""
    arrays.require_float("alpha", alpha)
    if alpha.ndim != 3 or alpha.shape[2] != 2:
        raise ShapeError(f"alpha must be (H, distances, 2); got {tuple(alpha.shape)}")
    _, wide = widened(alpha=alpha)
    return binary_concrete.forward(_logits(wide), temperature=temperature, hard=hard, rng=rng,
                                   decisions=decisions)


@dataclasses.dataclass(frozen=True)
class SparseBertLossSaved(Saved):
    """The gates that a penalty counts."""

    sampled: GatesSaved
    alpha: Array
    strength: float

    @property
    def decisions(self) -> dict[str, Array]:
        """Those of the gates."""
        return self.sampled.decisions

    def backward(self, dout: Any = 1.0) -> Any:
        """Gradient of alpha."""
        xp = arrays.namespace(self.alpha)
        # forward: loss = strength * sum(gates)
        slope = xp.ones_like(self.sampled.logits) * (dout * self.strength)
        return gradients(("alpha",))(
            spread_alpha(xp, self.sampled.backward(slope).logits, self.alpha))


@differentiable
def sparsebert_loss(alpha: Array, *, strength: float, temperature: float = 1.0, hard: bool = True,
                    rng: Any = None, decisions: dict[str, Any] | None = None,
                    ) -> tuple[Any, SparseBertLossSaved]:
    """What open distances cost: ``strength`` times the sum of the gates, to be added to a loss.

    E.g. two of six distances open, ``strength=0.1``: 0.2.

    Parameters
    ----------
    alpha : array, shape (H, L, 2), any float dtype
        As `pyattn.sparsebert_attention` takes it.
    strength : float
    temperature, hard, rng
        As there.
    decisions : dict, optional
        ``noise`` and ``gates``; give those of the attention, so that its draw is what costs.

    Returns
    -------
    array of shape (), float64 for float64, else float32
        Gradient: alpha. ``saved.backward()`` alone takes the loss as it is.

    Raises
    ------
    ShapeError, OptionError
        As for `pyattn.sparsebert_attention`.

    References
    ----------
    .. [1] Shi et al., "SparseBERT: Rethinking the Importance Analysis in Self-attention", 2021,
       arXiv:2102.12871, section 4.1, equation 7.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.features import sparsebert_loss
    >>> alpha = np.zeros((1, 6, 2))
    >>> alpha[:, :2, 1] = 9
    >>> float(sparsebert_loss(alpha, strength=0.1, decisions={"noise": np.zeros((1, 6))}))
    0.2
    """
    strength = require_real("strength", strength)
    gates, sampled = sample_distances(alpha, temperature, hard, rng, decisions)
    xp = arrays.namespace(alpha)
    return strength * xp.sum(gates), SparseBertLossSaved(sampled, alpha, strength)


def sparsebert_mask(alpha: Array, *, drop_diagonal: bool = False) -> masks.Mask:
    """The distances that learned logits leave open, as a mask.

    E.g. distances {0, 2} are open where ``alpha[h, d, 1] > alpha[h, d, 0]`` for d 0 and 2 alone.

    Parameters
    ----------
    alpha : array, shape (H or 1, L, 2)
    drop_diagonal : bool
        Close distance 0.

    Returns
    -------
    Mask
        `pyattn.masks.distances`: attention with it is the search's without noise, computed
        sparsely where whole tiles are closed.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.features import sparsebert_mask
    >>> alpha = np.zeros((1, 4, 2))
    >>> alpha[:, :2, 1] = 9
    >>> print(sparsebert_mask(alpha).draw(4))
    ██··
    ███·
    ·███
    ··██
    """
    host = host_array(alpha)
    if host.ndim != 3 or host.shape[2] != 2:
        raise ShapeError(f"alpha must be (H, distances, 2); got {host.shape}")
    open_ = host[..., 1] > host[..., 0]
    if drop_diagonal:
        open_ = open_ & (np.arange(open_.shape[1]) > 0)
    return masks.distances(open_)
