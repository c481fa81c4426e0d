"""Talking-heads attention: heads share their scores before the softmax, their weights after it."""

from __future__ import annotations

from typing import Any

from ..arrays import Array
from ..checks import require_choice
from ..differentiable import differentiable
from ..engines import talking_heads
from ..engines.talking_heads import TalkingHeadsSaved
from .attention import CAUSAL, intersected


@differentiable
def talking_heads_attention(q: Array, k: Array, v: Array, w_pre: Array, w_post: Array,
                            b_pre: Array | None = None, b_post: Array | None = None, *,
                            scale: float | None = None, causal: bool | str = False,
                            mask: Any = None, kv_lengths: Any = None,
                            q_lengths: Any = None) -> tuple[Array, TalkingHeadsSaved]:
    """Attention whose heads are mixed by small matrices, before the softmax and after it.

    For each pair of query i and key j, ``J_h = scale q_h.k_h`` in the heads of q;
    ``L_s = sum_h J_h w_pre[h, s] + b_pre[s]`` in those of the softmax; ``P_s = softmax_j(L_s)``
    over the keys allowed; ``U_g = sum_s P_s w_post[s, g] + b_post[g]`` in those of the output, 0
    for a pair that is not allowed; and ``out_g = sum_j U_g v_g``. E.g. with two heads and ``w_pre``
    ``[[0, 1], [1, 0]]`` and ``w_post`` the identity, head 0 weighs its values by what head 1 of q
    and k found. With ``causal=True`` and four tokens: 0 sees {0}, 1 sees {0, 1}, 2 sees {0, 1, 2},
    3 sees all, in all heads.

    Parameters
    ----------
    q : array, shape (..., Hq, N, D), float16, bfloat16, float32 or float64
        Queries.
    k : array, shape (..., Gk, M, D), dtype of `q`
        Keys; Gk divides Hq, and head h of q reads head ``h // (Hq // Gk)``.
    v : array, shape (..., Gv, M, E), dtype of `q`
        Values; Gv divides Hv likewise, and is no matter of Gk.
    w_pre : array, shape (Hq, H), any float dtype
        Heads of q to heads of the softmax. It multiplies from the right, as weights do here: for a
        convolution's or ``nn.Linear``'s weight give the transpose.
    w_post : array, shape (H, Hv), any float dtype
        Heads of the softmax to heads of the output.
    b_pre : array, shape (H,), any float dtype, optional
        Added to the mixed scores. A softmax does not see what all its scores have in common, so it
        changes nothing and its gradient is 0; layers elsewhere have one.
    b_post : array, shape (Hv,), any float dtype, optional
        Added to the mixed weights of the pairs allowed.
    scale : float, optional
        Multiplies the products before all. Default ``D ** -0.5``.
    causal : bool or "top_left"
        A query sees keys up to its own position; positions as for `pyattn.attention`.
    mask : Mask, BlockMask or bool array that broadcasts to (..., 1, N, M), optional
        Which pairs are allowed, in all heads; intersected with `causal`.
    kv_lengths, q_lengths : int or array of int, broadcasting to the leading axes, optional
        Tokens from here on are padding.

    Returns
    -------
    array, shape (..., Hv, N, E), dtype of `q`
        Rows that see no key are 0, whatever `b_post`.

    Raises
    ------
    ShapeError, DtypeError, OptionError
        Arguments that do not fit; the message names the argument, the rule and what was given. So
        does a mask with a head axis: a pair that only some heads may see has no meaning here.

    Notes
    -----
    Time O(pairs (Hq (D + H) + Hv (E + H))), counted in 64 x 64 tiles, which are walked twice by
    the forward (once where a block's weights fit into 2 MB) and twice by the backward; those that
    the mask leaves empty are not visited. Beside the operands O(N) memory for each head: no (N, M)
    numbers. Kept for backward: the arguments, the output and the log-sum-exp of each row. A NaN or
    inf in a key or value reaches only queries that may see it.

    References
    ----------
    .. [1] Shazeer et al., "Talking-Heads Attention", 2020, arXiv:2003.02436, section 4: three
       numbers of heads, no biases.
    .. [2] Touvron et al., "Going deeper with Image Transformers", 2021, arXiv:2103.17239, section
       4.1 and its code: both mixes have a bias. There is no mask in either.

    Examples
    --------
    >>> import numpy as np, pyattn
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 4, 8))
    >>> same, swap = np.eye(2), np.eye(2)[::-1]
    >>> plain = pyattn.attention(q, k, v)
    >>> np.allclose(pyattn.talking_heads_attention(q, k, v, same, same), plain)
    True
    >>> out, saved = pyattn.talking_heads_attention.forward(q, k, v, swap, swap, b_post=np.ones(2))
    >>> np.allclose(out, plain + v.sum(-2, keepdims=True))
    True
    >>> saved.backward(out)._fields
    ('q', 'k', 'v', 'w_pre', 'w_post', 'b_post')
    """
    causal = require_choice("causal", causal, (False, True, "top_left"))
    if causal is not False:
        mask = intersected(mask, CAUSAL)
    return talking_heads.forward(
        q, k, v, w_pre, w_post, b_pre, b_post, scale=scale, mask=mask, q_lengths=q_lengths,
        kv_lengths=kv_lengths, alignment="top_left" if causal == "top_left" else "bottom_right")
