"""Temporal attention: each place of a video over its frames."""

from __future__ import annotations

from typing import Any

from .. import masks
from ..arrays import Array
from ..checks import ShapeError, require_integer
from ..differentiable import differentiable
from ..features.windows import line_order, refuse
from .attention import attend
from .axial import lined

REFUSED = ("bias", "gate", "q_lengths", "kv_lengths", "segments", "return_weights")


@differentiable
def temporal_attention(q: Array, k: Array, v: Array, *, frames: int, window: Any = None,
                       mask: Any = None, **options: Any) -> tuple[Any, Any]:
    """Attention of each place of a video to the same place in other frames.

    Tokens lie frame by frame: place p of frame t is token ``t * places + p``. A query sees the keys
    of its place in all frames, or within ``|t - t'| <= window`` frames.
    E.g. ``frames=2``, two places: 0->{0, 2}  1->{1, 3}  2->{0, 2}  3->{1, 3}.

    Parameters
    ----------
    q : array, shape (..., H, N, D), float16, bfloat16, float32 or float64
        Queries, N a multiple of `frames`.
    k : array, shape (..., G, N, D), dtype of `q`
        Keys; G divides H.
    v : array, shape (..., G, N, E), dtype of `q`
        Values.
    frames : int
        How many frames there are.
    window : int or (left, right), frames, optional
        Reach on each side; the frames at the ends have fewer neighbours. All frames by default.
    mask : Mask, or boolean array broadcasting to (..., H, N, N), optional
        Intersected with the rule above; evaluated on the pairs of a place alone.
    **options
        As for `pyattn.attention`, speaking of frames: ``causal``, ``alibi_slopes``, ``scale``,
        ``softcap``, ``sinks``, ``dropout``, ``rng``, ``decisions``, ``return_lse``.

    Returns
    -------
    array, shape (..., H, N, E), dtype of `q`
        With ``return_lse`` a pair, as for `pyattn.attention`.

    Raises
    ------
    ShapeError
        The tokens are not a multiple of `frames`.
    OptionError
        `frames` is not positive, or an option cannot be honoured.

    Notes
    -----
    Time O(N frames (D + E)), counted in tiles of 64 x 64 frames. Kept for backward: the
    arguments, the output and the lse.
    Differs from the paper: `window`, which it does not have; the class token is left to
    `pyattn.layers.timesformer_block`.

    References
    ----------
    .. [1] Bertasius et al., "Is Space-Time Attention All You Need for Video Understanding?", 2021,
       arXiv:2102.05095, section 3 (divided attention, equation 11).

    Examples
    --------
    >>> import numpy as np, pyattn
    >>> x = np.random.default_rng(0).standard_normal((1, 6, 4))           # three frames, two places
    >>> out = pyattn.temporal_attention(x, x, x, frames=3, window=0)
    >>> bool(np.allclose(out, x))
    True
    """
    frames = require_integer("frames", frames, minimum=1)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim < 3 or x.shape[-2] % frames or x.shape[-2] != q.shape[-2]:
            raise ShapeError(f"{name} must be (..., heads, tokens, width), with equally many "
                             f"tokens for q, k and v and a multiple of frames = {frames}; got "
                             f"{tuple(x.shape)}")
    refuse(options, REFUSED, "every place has a sequence of its own")
    shape = frames, q.shape[-2] // frames
    if mask is not None:
        mask = lined(masks.restrict(masks.full(), mask), shape, 0)
    return attend(q, k, v, order=line_order(shape, 0), mask=mask, window=window, **options)
