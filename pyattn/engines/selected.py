"""Softmax attention in which each token of each key/value head lists the key blocks it reads.

The heads that share a key/value head share its lists. Work is what was listed: forward and backward
walk, for each block of keys, the tokens that list it.

A kernel module for this engine, ``pyattn.kernels.<backend>.selected``, has four functions, all of
which take a `Selection`:

``refuses(problem)``
    Why it cannot run this problem, or None.
``forward(problem)``
    ``(out, lse)``, (B, H, N, E) and (B, H, N). A row that sees no key: out 0, lse -inf.
``delta(dout, out, lse, dlse)``
    As that of the softmax engine (problem.py).
``backward(problem, dout, lse, delta)``
    Gradients by name: "q", "k", "v".
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np

from .. import arrays, dispatch
from ..arrays import Array
from ..checks import (
    OptionError,
    ShapeError,
    require_broadcast,
    require_choice,
    require_flag,
    require_integer,
    require_real,
)
from ..differentiable import ON_HOST, Saved, gradients
from .placement import Placement, place
from .softmax import flat, per_head, require_cotangents, require_operands, unbroadcast

TILE = 64
"""Keys of a block that every backend takes."""

FEW = 2**15
"""Numbers below this are sorted fastest, as 16 bits."""


@dataclasses.dataclass(frozen=True, eq=False)
class Lists:
    """Who lists which block, clipped to what exists and may be seen.

    A *line* is a batch item and a key/value head. Example, blocks of two keys, causal, one line:
    tokens 0..3 that list (0,), (0,), (1, 0), (0, 0) give ``blocks = [[0, -], [0, -], [0, 1],
    [0, -]]``, and the transpose says that block 0 is listed by 0, 1, 2, 3 and block 1 by 2.
    """

    blocks: np.ndarray
    """int32 (B, G, N, count): ascending and distinct; -1 where nothing is left, anywhere."""
    seen: np.ndarray
    """int64 (B, N): keys below this may be seen by a token; 0 for padding."""
    total: int
    """How many blocks of keys there are."""

    @classmethod
    def of(cls, blocks: np.ndarray, block_size: int, m: int, placement: Placement, *,
           causal: bool) -> Lists:
        """Sort the lists (B, G, N, count), and drop what counts once, is hidden, or is padding."""
        i = np.arange(placement.n)
        seen = np.broadcast_to(placement.kv_lengths[:, None].astype(np.int64),
                               (len(placement.kv_lengths), placement.n))
        if causal:
            seen = np.clip(i + placement.offset[:, None] + 1, 0, seen)
        seen = np.where(i < placement.q_lengths[:, None], seen, 0)
        total = -(-m // block_size)
        blocks = np.sort(blocks.astype(np.int16 if total < FEW else np.int32), axis=-1)
        # -1 lies below every block, so that what is dropped is told by one comparison
        first_hidden = -(-seen // block_size)
        keep = (blocks >= 0) & (blocks < first_hidden[:, None, :, None])
        keep[..., 1:] &= blocks[..., 1:] != blocks[..., :-1]
        return cls(np.where(keep, blocks, blocks.dtype.type(-1)), seen, total)

    @functools.cached_property
    def start(self) -> np.ndarray:
        """int64 (lines, total + 1): block c of a line is listed by token[start[c]:start[c + 1]]."""
        return self._transpose[0]

    @functools.cached_property
    def token(self) -> np.ndarray:
        """int32: the tokens, line by line, block by block, ascending."""
        return self._transpose[1]

    @functools.cached_property
    def _transpose(self) -> tuple[np.ndarray, np.ndarray]:
        b, g, n, count = self.blocks.shape
        start = np.zeros((b * g, self.total + 1), np.int64)
        tokens, entries = [np.zeros(0, np.int32)], 0
        for line, blocks in enumerate(self.blocks.reshape(b * g, n * count)):
            order = np.argsort(blocks, kind="stable")
            sizes = np.bincount(blocks + np.int64(1), minlength=self.total + 1)
            tokens.append((order[sizes[0]:] // count).astype(np.int32))
            start[line] = entries + np.cumsum(sizes) - sizes[0]
            entries = start[line, -1]
        return start, np.concatenate(tokens)

    def pairs(self, block_size: int) -> int:
        """Count the pairs of a token and a key that it sees."""
        inside = self.seen[:, None, :, None] - self.blocks * np.int64(block_size)
        return int(np.minimum(inside, block_size)[self.blocks >= 0].sum())


@dataclasses.dataclass(frozen=True)
class Selection:
    """Attention over listed blocks of keys, ready for a kernel; letters as in problem.py.

    ``scores = scale * q.k -> softcap -> softmax`` over the keys of the listed blocks.
    """

    q: Array
    """(B, H, N, D)."""
    k: Array
    """(B, G, M, D)."""
    v: Array
    """(B, G, M, E)."""
    scale: Array
    """(H,), acc."""
    lists: Lists
    block_size: int
    """Block c holds keys ``c * block_size`` to ``(c + 1) * block_size - 1``."""
    causal: bool
    """Whether a token sees no key behind its position."""
    offset: np.ndarray
    """int32 (B,): the position of query 0."""
    q_lengths: np.ndarray
    """int32 (B,)."""
    kv_lengths: np.ndarray
    """int32 (B,)."""
    softcap: float | None


@dataclasses.dataclass(frozen=True)
class Call(Saved):
    """The arguments of one call, as the caller gave them."""

    q: Array
    k: Array
    v: Array
    blocks: np.ndarray = dataclasses.field(metadata=ON_HOST)
    """int32 (B, G, N, count)."""
    block_size: int
    causal: bool
    placement: Placement
    scale: float
    softcap: float | None


@dataclasses.dataclass(frozen=True)
class SelectedSaved(Call):
    """What the backward needs: the arguments, the output and each row's log-sum-exp."""

    out: Array
    lse: Array

    @property
    def decisions(self) -> dict[str, Array]:
        """``blocks``, (..., G, N, count), as they were given."""
        return {"blocks": self.blocks.reshape(*self.placement.batch, *self.blocks.shape[1:])}

    @property
    def stats(self) -> dict[str, int]:
        """Counters: pairs seen, tiles (64 rows, 64 keys) of blocks listed, flops, bytes."""
        lists, shared = _lists(self), self.q.shape[-3] // max(1, self.k.shape[-3])
        rows = int(np.count_nonzero(lists.blocks >= 0)) * shared
        widths = self.q.shape[-1] + self.v.shape[-1]
        moved = (self.q, self.k, self.v, self.out, self.lse)
        return {"pairs": lists.pairs(self.block_size) * shared,
                "tiles": -(-rows * -(-self.block_size // 64) // 64),
                "flops": 2 * rows * self.block_size * widths,
                "bytes": sum(arrays.nbytes(x) for x in moved)}

    def backward(self, dout: Array, dlse: Array | None = None) -> Any:
        """Return the gradients of q, k and v, each in its own dtype and shape.

        Parameters
        ----------
        dout : array, shape and dtype of the output
        dlse : array, shape (..., H, N), optional
            Gradient of the log-sum-exp, where the loss uses it.
        """
        require_cotangents(self, dout, dlse)
        problem, xp = _problem(self), arrays.namespace(self.q)
        rows = problem.q.shape[:3]
        wide = (*rows, self.v.shape[-1])
        dout, out = arrays.reshape(xp, dout, wide), arrays.reshape(xp, self.out, wide)
        lse = arrays.reshape(xp, self.lse, rows)
        if dlse is not None:
            dlse = arrays.cast(xp, arrays.reshape(xp, dlse, rows), arrays.accumulator(xp, self.q))
        kernel = dispatch.kernel("selected", problem, self.q)
        delta = kernel.delta(dout, out, lse, dlse)
        grads = kernel.backward(problem, dout, lse, delta)
        return gradients(("q", "k", "v"))(
            *(unbroadcast(xp, grads[name], getattr(self, name), self.placement.batch)
              for name in "qkv"))


def forward(q: Array, k: Array, v: Array, blocks: Any, *, block_size: int,
            causal: bool | str = False, q_lengths: Any = None, kv_lengths: Any = None,
            scale: float | None = None, softcap: float | None = None,
            return_lse: bool = False) -> tuple[Any, SelectedSaved]:
    """Attention of each token to the keys of the blocks that it lists.

    With ``block_size=2``, causal, and four tokens that list (0,), (0,), (1, 0), (0, -1): 0 sees
    {0}, 1 sees {0, 1}, 2 sees {0, 1, 2}, 3 sees {0, 1}.

    Parameters
    ----------
    q : array, shape (..., H, N, D), float16, bfloat16, float32 or float64
    k : array, shape (..., G, M, D), dtype of `q`
        G divides H; query head h reads key head, and lists, ``h // (H // G)``.
    v : array, shape (..., G, M, E), dtype of `q`
    blocks : int array broadcasting to (..., G, N, count)
        Numbers of key blocks, in any order; block c holds keys ``c * block_size`` to
        ``(c + 1) * block_size - 1``. -1 stands for none, and a number that is given twice counts
        once. Read on the host; a decision, so without gradient.
    block_size : int, keys
    causal : bool or "top_left", default False
        Also hides keys behind a token's position, as `pyattn.attention` has it.
    q_lengths, kv_lengths : int or array of int, broadcasting to the leading axes, optional
        Tokens from here on are padding.
    scale : float, default D ** -0.5
    softcap : float, optional
        Scores become ``softcap * tanh(scores / softcap)``.
    return_lse : bool
        Also return the log-sum-exp of each row, (..., H, N).

    Returns
    -------
    out : array, shape (..., H, N, E), dtype of `q`
        Rows that see no key are 0, with an lse of -inf. With `return_lse`, (out, lse).
    saved : SelectedSaved
        ``saved.backward(dout, dlse)`` gives the gradients of q, k and v. It keeps the arguments,
        the output, the lse and the lists.

    Raises
    ------
    ShapeError, DtypeError, OptionError, BackendError
        Arguments that do not fit; the message names the argument, the rule and what was given.

    Notes
    -----
    Time O(H N count block_size (D + E)), whatever M is. No N x M array is ever made.

    References
    ----------
    .. [1] Yuan et al., "Native Sparse Attention", 2025, arXiv:2502.11089, section 3.4, whose kernel
       gathers keys for each token; here tokens are gathered for each block of keys, which fills
       tiles with however few heads.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.engines import selected
    >>> x = np.ones((1, 4, 8))
    >>> blocks = np.array([[0, -1], [0, -1], [1, 0], [0, -1]])
    >>> out, saved = selected.forward(x, x, x, blocks, block_size=2, causal=True)
    >>> saved.stats["pairs"]        # 1 + 2 + 3 + 2
    8
    """
    xp = arrays.namespace(q, k, v)
    batch = require_operands(q, k, v)
    arrays.require_same_device({"q": q, "k": k, "v": v})
    (heads, n), (groups, m) = q.shape[-3:-1], k.shape[-3:-1]
    # a larger block holds no more than all
    block_size = min(require_integer("block_size", block_size, minimum=1), max(TILE, m))
    causal = require_choice("causal", causal, (False, True, "top_left"))
    return_lse = require_flag("return_lse", return_lse)
    scale = q.shape[-1] ** -0.5 if scale is None else require_real("scale", scale)
    if softcap is not None and require_real("softcap", softcap) <= 0:
        raise OptionError(f"softcap must be positive; got {softcap}")
    placement = place(batch, n, m, "top_left" if causal == "top_left" else "bottom_right",
                      q_lengths, kv_lengths, None)
    call = Call(q, k, v, _check_blocks(blocks, (*batch, groups, n), -(-m // block_size)),
                block_size, causal is not False, placement, scale,
                None if softcap is None else float(softcap))
    problem = _problem(call)
    out, lse = dispatch.kernel("selected", problem, q).forward(problem)
    rows = (*batch, heads, n)
    out = arrays.cast(xp, arrays.reshape(xp, out, (*rows, v.shape[-1])), q.dtype)
    saved = SelectedSaved(**vars(call), out=out, lse=arrays.reshape(xp, lse, rows))
    return ((out, saved.lse) if return_lse else out), saved


def _check_blocks(blocks: Any, lead: tuple[int, ...], total: int) -> np.ndarray:
    """Check lists of blocks; return them as int32 (B, G, N, count)."""
    found = arrays.to_host(blocks) if hasattr(blocks, "__array__") else np.asarray(blocks)
    if found.ndim < 2:
        raise ShapeError(f"blocks must have at least 2 axes (..., N, count); got {found.shape}")
    if found.size and found.dtype.kind not in "iu":
        raise OptionError(f"blocks must be integers; got {found.dtype}")
    count = found.shape[-1]
    require_broadcast("blocks", found.shape, (*lead, count), "(..., G, N, count)")
    if found.size and not (found.min() >= -1 and found.max() < total):
        raise OptionError(f"blocks must lie in -1..{total - 1}, where -1 is none; got "
                          f"{found.min()}..{found.max()}")
    found = np.broadcast_to(found.astype(np.int32), (*lead, count))
    return np.ascontiguousarray(found).reshape(math.prod(lead[:-2]), *lead[-2:], count)


def _lists(call: Call) -> Lists:
    return Lists.of(call.blocks, call.block_size, call.k.shape[-2], call.placement,
                    causal=call.causal)


def _problem(call: Call) -> Selection:
    """The kernel's view of a call: leading axes in one."""
    q, placement = call.q, call.placement
    xp = arrays.namespace(q)
    scale = per_head(xp, call.scale, q.shape[-3], arrays.accumulator(xp, q), q)
    k, v = (flat(xp, x, placement.batch) for x in (call.k, call.v))
    return Selection(flat(xp, q, placement.batch), k, v, scale, _lists(call), call.block_size,
                     call.causal, placement.offset, placement.q_lengths, placement.kv_lengths,
                     call.softcap)
