"""Attention between modalities whose tokens lie one after the other in a sequence."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any

from .. import masks
from ..arrays import Array
from ..checks import OptionError, ShapeError, require_integer
from ..differentiable import differentiable
from .attention import attention, intersected


@differentiable
def cross_modal_attention(q: Array, k: Array, v: Array, *, modality_lengths: Sequence[int],
                          interactive: bool = False, mask: Any = None,
                          **options: Any) -> tuple[Any, Any]:
    """Attention over the tokens of two or more modalities, laid end to end.

    Joint (the default): every token sees every token, one softmax over all modalities.
    Interactive (co-attention): a token sees the tokens of the other modalities only.
    E.g. ``modality_lengths=(2, 1)``, two words and one image patch, interactive:
    0->{2}  1->{2}  2->{0, 1}.

    Parameters
    ----------
    q : array, shape (..., H, N, D), float16, bfloat16, float32 or float64
        Queries of all modalities, concatenated along N.
    k : array, shape (..., G, N, D), dtype of `q`
        Keys, in the same order.
    v : array, shape (..., G, N, E), dtype of `q`
        Values.
    modality_lengths : sequence of int
        Tokens of each modality, in order; they add up to N. The same for the whole batch.
    interactive : bool
        Whether a modality sees the others only.
    mask : Mask or boolean array, optional
        Intersected with the rule above.
    **options
        As for `pyattn.attention`: ``bias``, ``causal``, ``scale``, ``dropout``, ``return_lse``, ...

    Returns
    -------
    array, shape (..., H, N, E), dtype of `q`
        Rows that see no key, such as those of a modality with no partner, are 0. With
        ``return_lse`` a tuple, as for `pyattn.attention`.

    Raises
    ------
    ShapeError
        The modalities do not add up to the queries and the keys.
    OptionError
        There are no modalities, or a negative number of tokens.

    Notes
    -----
    Gradients, cost and what is kept are those of `pyattn.attention`; interactive visits only the
    tiles between modalities. Differs from the papers: projections, and the embedding that tells
    modalities apart, belong to the caller (`pyattn.layers.add_positions`); ViLBERT's two streams
    have weights of their own, here made before q, k and v are concatenated; the default scale is
    ``D ** -0.5``, D the width of the keys.

    References
    ----------
    .. [1] Li et al., "VisualBERT", 2019, arXiv:1908.03557, section 3.2 (joint).
    .. [2] Lu et al., "ViLBERT", 2019, arXiv:1908.02265, section 3.1 (co-attention).

    Examples
    --------
    >>> import numpy as np, pyattn
    >>> x = np.random.default_rng(0).standard_normal((1, 3, 4))     # two words, one image patch
    >>> out = pyattn.cross_modal_attention(x, x, x, modality_lengths=(2, 1), interactive=True)
    >>> bool(np.allclose(out[0, :2], x[0, 2]))
    True
    """
    if not isinstance(modality_lengths, Sized) or len(modality_lengths) == 0:
        raise OptionError("modality_lengths must be a sequence of integers, one for each "
                          f"modality; got {modality_lengths!r}")
    lengths = [require_integer("modality_lengths", length, minimum=0)
               for length in modality_lengths]
    if not q.shape[-2:-1] == k.shape[-2:-1] == (sum(lengths),):
        raise ShapeError(f"modality_lengths must add up to the tokens of q and of k; {lengths} add "
                         f"up to {sum(lengths)}, q is {tuple(q.shape)}, k is {tuple(k.shape)}")
    if interactive:
        mask = intersected(mask, ~masks.segments(lengths))
    return attention.forward(q, k, v, mask=mask, **options)
