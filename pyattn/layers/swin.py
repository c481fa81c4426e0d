"""Swin Transformer: blocks of windowed attention on images, and a hierarchy of resolutions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..checks import DtypeError, OptionError, ShapeError, require_integer, require_rng
from ..differentiable import Saved, differentiable, gradients
from ..features.precision import cast_like, widened
from ..features.windows import (
    Windows,
    collect_table,
    expand_table,
    merge,
    partition,
    region_mask,
    windows,
)
from .feed_forward import feed_forward
from .linear import linear
from .multi_head import multi_head
from .norm import layer_norm
from .transformer import BIASES, WEIGHTS, init_transformer_block
from .vit import patchify


def require_params(params: Mapping[str, Any], needed: Sequence[str],
                   optional: Sequence[str] = ()) -> None:
    """Raise unless `params` is a dict that has the names `needed`, and else only `optional`."""
    if not isinstance(params, Mapping):
        raise DtypeError(f"params must be a dict of arrays; got {type(params).__name__}")
    missing = [name for name in needed if name not in params]
    unknown = [name for name in params if name not in (*needed, *optional)]
    if missing or unknown:
        raise OptionError(f"params must have {', '.join(needed)}"
                          + (f" and may have {', '.join(optional)}" if optional else "")
                          + f"; missing {missing}, unknown {unknown}")


def init_swin_block(rng: Any, width: int, *, num_heads: int, window: int, depth: int = 1,
                    hidden: int | None = None, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Fresh parameters for `swin_block`, as NumPy arrays.

    Parameters
    ----------
    rng : int or numpy.random.Generator
        Where the weights are drawn from.
    width : int
        C, a multiple of `num_heads`.
    num_heads, window, depth, hidden : int
        Heads; side of the windows; blocks in the whole model; width of the hidden layer, 4 C by
        default.
    dtype : dtype
        Of every array.

    Returns
    -------
    dict of arrays
        As `init_transformer_block` makes it, and ``bias_table ((2 window - 1) ** 2, H)``, normal
        with deviation 0.02, cut off at two deviations.

    Examples
    --------
    >>> from pyattn.layers import init_swin_block
    >>> init_swin_block(0, 8, num_heads=2, window=4)["bias_table"].shape
    (49, 2)
    """
    rng = require_rng(rng)
    window = require_integer("window", window, minimum=1)
    params = init_transformer_block(rng, width, num_heads=num_heads, depth=depth, hidden=hidden,
                                    dtype=dtype)
    table = rng.standard_normal(((2 * window - 1) ** 2, num_heads))
    while (far := abs(table) > 2).any():
        table[far] = rng.standard_normal(np.count_nonzero(far))
    return {**params, "bias_table": (0.02 * table).astype(dtype)}


def _cells(x: Array) -> Array:
    """(..., R, S, C) as (..., 1, R S, C): one head of tokens."""
    return arrays.reshape(arrays.namespace(x), x,
                          (*x.shape[:-3], 1, x.shape[-3] * x.shape[-2], x.shape[-1]))


def _cut(x: Array, layout: Windows) -> Array:
    """(..., R, S, C) as (..., W, P, C), padded with zeros."""
    found = partition(_cells(x), layout)
    return arrays.reshape(arrays.namespace(x), found, (*found.shape[:-3], *found.shape[-2:]))


def _paste(x: Array, layout: Windows) -> Array:
    """Undo `_cut`."""
    xp = arrays.namespace(x)
    found = merge(arrays.reshape(xp, x, (*x.shape[:-2], 1, *x.shape[-2:])), layout)
    return arrays.reshape(xp, found, (*found.shape[:-3], *layout.shape, found.shape[-1]))


@dataclasses.dataclass(frozen=True)
class SwinBlockSaved(Saved):
    """What the four layers of a block keep, and where the windows were."""

    norm1: Any
    attended: Any
    norm2: Any
    fed: Any
    bias_table: Array
    layout: Windows
    window: tuple[int, int]

    @property
    def decisions(self) -> dict[str, Array]:
        """The attention's."""
        return self.attended.decisions

    def backward(self, dout: Array) -> Any:
        """Gradients of x, of params (a dict with the same keys), of attention's array options."""
        # forward: middle = x + paste(multi_head(cut(norm1(x)))), y = middle + fed(norm2(middle))
        fed = self.fed.backward(dout)
        norm2 = self.norm2.backward(fed.x)
        dmiddle = dout + norm2.x
        options = self.attended.backward(_cut(dmiddle, self.layout))._asdict()
        norm1 = self.norm1.backward(_paste(options.pop("x"), self.layout))
        table = collect_table(options.pop("bias"), self.window, self.layout.size)
        grads = {"norm1_gamma": norm1.gamma, "norm1_beta": norm1.beta,
                 "norm2_gamma": norm2.gamma, "norm2_beta": norm2.beta,
                 "w1": fed.w1, "b1": fed.b1, "w2": fed.w2, "b2": fed.b2,
                 "bias_table": cast_like(arrays.namespace(table), table, self.bias_table)}
        grads |= {name: options.pop(name) for name in (*WEIGHTS, *BIASES) if name in options}
        return gradients(("x", "params", *options))(dmiddle + norm1.x, grads, *options.values())


@differentiable
def swin_block(x: Array, params: Mapping[str, Array], *, num_heads: int, window: int,
               shift: int = 0, reference: bool = False, activation: str = "gelu",
               eps: float = 1e-5, **options: Any) -> tuple[Array, SwinBlockSaved]:
    """Attention inside the windows of an image, then a feed-forward network on each cell.

    ``m = x + windowed(norm1(x))``, ``y = m + feed_forward(norm2(m))``, where windowed is multi-head
    attention by the rule of `pyattn.swin_attention`.

    Parameters
    ----------
    x : array, shape (..., R, S, C), float16 / bfloat16 / float32 / float64
        Images of R x S cells, channels last.
    params : dict of arrays
        As for `transformer_block`, and ``bias_table ((2 window - 1) ** 2, H)``.
        `init_swin_block` makes one.
    num_heads : int
        H.
    window, shift : int, cells
        Side of the windows; by how much they are shifted. For an image whose shorter side is not
        longer than `window`, they are that side (the table has the rows of that) and 0.
    reference : bool
        Whether padding takes part in the attention, as in the authors' code: cells of zeros, after
        the norm and before the projections. By default it is masked.
    activation : {"gelu", "relu", "gelu_tanh", "silu"}
        Of the feed-forward network.
    eps : float
        Of both norms.
    **options
        Of the attention: ``dropout``, ``rng``, ``decisions``, ``scale``, ``softcap``, ``sinks``.

    Returns
    -------
    array, shape (..., R, S, C), dtype of `x`
        Gradients: x, params (a dict with the keys of `params`), then the attention's array options.
        ``saved.decisions`` are the attention's.

    Raises
    ------
    ShapeError
        The widths do not fit, or `x` is no image.
    OptionError
        A parameter is missing or unknown, or `shift` is not less than `window`.

    Notes
    -----
    Cells are gathered into windows before the projections, a copy of x rather than of q, k and v.
    Kept for backward: what the four layers keep. Dropping whole paths, as the paper does in
    training, is left to the caller.

    References
    ----------
    .. [1] Liu et al., "Swin Transformer", 2021, arXiv:2103.14030, section 3.2, equation 3.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.layers import init_swin_block, swin_block
    >>> params = init_swin_block(0, 8, num_heads=2, window=4)
    >>> x = np.ones((3, 6, 10, 8), np.float32)
    >>> y, saved = swin_block.forward(x, params, num_heads=2, window=4, shift=2)
    >>> y.shape, saved.backward(y).params["bias_table"].shape
    ((3, 6, 10, 8), (49, 2))
    """
    require_params(params, (*WEIGHTS, "bias_table"), BIASES)
    if x.ndim < 3 or 0 in x.shape[-3:-1]:
        raise ShapeError(f"x must be (..., R, S, C) with at least one cell; got {tuple(x.shape)}")
    num_heads = require_integer("num_heads", num_heads, minimum=1)
    window = require_integer("window", window, minimum=1)
    shift = require_integer("shift", shift, minimum=0)
    if shift >= window:
        raise OptionError(f"shift must be less than window; got {shift} and {window}")
    image = tuple(x.shape[-3:-1])
    reach = min(window, *image)
    table = params["bias_table"]
    if tuple(table.shape) != ((2 * reach - 1) ** 2, num_heads):
        raise ShapeError(f"bias_table must have shape ({(2 * reach - 1) ** 2}, {num_heads}), for "
                         f"windows of side {reach} and {num_heads} heads; got {tuple(table.shape)}")
    layout = windows(image, (reach, reach), (shift, shift))
    _, wide = widened(bias_table=table)

    normal, norm1 = layer_norm.forward(x, params["norm1_gamma"], params["norm1_beta"], eps=eps)
    found, attended = multi_head.forward(
        _cut(normal, layout), params["w_qkv"], params["w_o"],
        **{name: params[name] for name in BIASES if name in params}, num_heads=num_heads,
        mask=region_mask(layout, reference), bias=expand_table(wide, (reach, reach), layout.size),
        **options)
    middle = x + _paste(found, layout)
    normal, norm2 = layer_norm.forward(middle, params["norm2_gamma"], params["norm2_beta"], eps=eps)
    found, fed = feed_forward.forward(normal, *(params[name] for name in ("w1", "b1", "w2", "b2")),
                                      activation=activation)
    return middle + found, SwinBlockSaved(norm1, attended, norm2, fed, table, layout,
                                          (reach, reach))


@dataclasses.dataclass(frozen=True)
class PatchMergingSaved(Saved):
    """What the norm and the projection keep."""

    image: tuple[int, int]
    normed: Any
    projected: Any

    def backward(self, dout: Array) -> Any:
        """Gradients of x, gamma, beta and w."""
        projected = self.projected.backward(dout)
        normed = self.normed.backward(projected.x)
        xp = arrays.namespace(normed.x)
        *lead, rows, columns, width = normed.x.shape
        # forward: channels (column, row, C) of a cell were the corners of a square
        grid = arrays.reshape(xp, normed.x, (*lead, rows, columns, 2, 2, width // 4))
        n = len(lead)
        grid = xp.permute_dims(grid, (*range(n), n, n + 3, n + 1, n + 2, n + 4))
        grid = arrays.reshape(xp, grid, (*lead, 2 * rows, 2 * columns, width // 4))
        return gradients(("x", "gamma", "beta", "w"))(
            grid[..., :self.image[0], :self.image[1], :], normed.gamma, normed.beta, projected.w)


@differentiable
def patch_merging(x: Array, gamma: Array, beta: Array, w: Array, *,
                  eps: float = 1e-5) -> tuple[Array, PatchMergingSaved]:
    """Halve an image's sides: four neighbours become one cell, normalised and projected.

    The channels of a 2 x 2 square are laid side by side, top left, bottom left, top right, bottom
    right; an odd side is padded by zeros.

    Parameters
    ----------
    x : array, shape (..., R, S, C), float16 / bfloat16 / float32 / float64
        Images of R x S cells, channels last.
    gamma, beta : arrays, shape (4 C,)
        Scale and shift of the norm.
    w : array, shape (4 C, O)
        Projection; O is 2 C in the paper.
    eps : float
        Of the norm.

    Returns
    -------
    array, shape (..., ceil(R / 2), ceil(S / 2), O), dtype of `x`

    Raises
    ------
    ShapeError
        The widths do not fit, or `x` is no image.

    Notes
    -----
    Kept for backward: the squares, and what comes out of the norm.

    References
    ----------
    .. [1] Liu et al., "Swin Transformer", 2021, arXiv:2103.14030, section 3.1; the order of the
       four and the norm are those of the authors' code.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.layers import patch_merging
    >>> patch_merging(np.ones((2, 7, 8, 3)), np.ones(12), np.zeros(12), np.eye(12, 6)).shape
    (2, 4, 4, 6)
    """
    if x.ndim < 3:
        raise ShapeError(f"x must be (..., R, S, C); got {tuple(x.shape)}")
    xp = arrays.namespace(x)
    rows, columns = x.shape[-3:-1]
    for axis, side in ((-3, rows), (-2, columns)):
        if side % 2:
            edge = [*x.shape]
            edge[axis] = 1
            x = xp.concat([x, xp.zeros(tuple(edge), dtype=x.dtype, device=arrays.device(x))],
                          axis=axis)
    squares = xp.concat([x[..., row::2, column::2, :] for column in (0, 1) for row in (0, 1)],
                        axis=-1)
    normal, normed = layer_norm.forward(squares, gamma, beta, eps=eps)
    out, projected = linear.forward(normal, w)
    return out, PatchMergingSaved((rows, columns), normed, projected)


def init_swin(rng: Any, *, image: tuple[int, int], channels: int = 3, patch: int, width: int,
              depths: Sequence[int], num_heads: Sequence[int], window: int,
              dtype: Any = np.float32) -> dict[str, Any]:
    """Fresh parameters for `swin`, as NumPy arrays.

    Parameters
    ----------
    rng : int or numpy.random.Generator
        Where the weights are drawn from.
    image : (int, int)
        Height and width of the images; where a stage's image is smaller than a window, its bias
        tables depend on them.
    channels, patch, width : int
        C of the images, side of the patches, width of the first stage; each stage doubles it.
    depths, num_heads : sequences of int
        Blocks and heads of each stage.
    window : int
        Side of the windows.
    dtype : dtype
        Of every array.

    Returns
    -------
    dict, by the names that `swin` documents

    Examples
    --------
    >>> from pyattn.layers import init_swin
    >>> params = init_swin(0, image=(32, 32), patch=4, width=8, depths=(2, 2), num_heads=(2, 4),
    ...                    window=4)
    >>> params["stages"][1]["blocks"][0]["w_qkv"].shape
    (16, 48)
    """
    rng = require_rng(rng)
    patch = require_integer("patch", patch, minimum=1)
    if len(depths) != len(num_heads):
        raise OptionError("depths and num_heads must have an entry for each stage; got "
                          f"{len(depths)} and {len(num_heads)}")
    sides = [side // patch for side in image]

    def normal(rows: int, columns: int) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) / np.sqrt(rows)).astype(dtype)

    params: dict[str, Any] = {
        "w_patch": normal(patch * patch * channels, width), "b_patch": np.zeros(width, dtype),
        "patch_norm_gamma": np.ones(width, dtype), "patch_norm_beta": np.zeros(width, dtype),
        "stages": []}
    for number, (blocks, heads) in enumerate(zip(depths, num_heads, strict=True)):
        stage: dict[str, Any] = {}
        if number:
            stage["merge_gamma"] = np.ones(4 * width, dtype)
            stage["merge_beta"] = np.zeros(4 * width, dtype)
            stage["w_merge"] = normal(4 * width, 2 * width)
            width, sides = 2 * width, [-(-side // 2) for side in sides]
        stage["blocks"] = [
            init_swin_block(rng, width, num_heads=heads, window=min(window, *sides),
                            depth=sum(depths), dtype=dtype) for _ in range(blocks)]
        params["stages"].append(stage)
    return {**params, "norm_gamma": np.ones(width, dtype), "norm_beta": np.zeros(width, dtype)}


@dataclasses.dataclass(frozen=True)
class SwinEncoderSaved(Saved):
    """What the layers of the encoder keep, in their order."""

    patches: Any
    projected: Any
    patch_normed: Any
    merged: tuple[Any, ...]
    """The merging before each stage; None before the first."""
    stages: tuple[tuple[SwinBlockSaved, ...], ...]
    normed: Any

    @property
    def decisions(self) -> dict[str, Array]:
        """Those of each block's attention, their names preceded by the block's number and a dot."""
        blocks = [block for stage in self.stages for block in stage]
        return {f"{i}.{name}": value for i, block in enumerate(blocks)
                for name, value in block.decisions.items()}

    def backward(self, dout: Array) -> Any:
        """Gradients of images and of params, a dict nested as `params`."""
        last = self.normed.backward(dout)
        dx, stages = last.x, []
        for merged, stage in zip(reversed(self.merged), reversed(self.stages), strict=True):
            blocks = []
            for block in reversed(stage):
                found = block.backward(dx)
                dx = found.x
                blocks.append(found.params)
            grads: dict[str, Any] = {"blocks": blocks[::-1]}
            if merged is not None:
                found = merged.backward(dx)
                dx = found.x
                grads |= {"merge_gamma": found.gamma, "merge_beta": found.beta, "w_merge": found.w}
            stages.append(grads)
        first = self.patch_normed.backward(dx)
        xp = arrays.namespace(dx)
        tokens = (*dx.shape[:-3], dx.shape[-3] * dx.shape[-2], dx.shape[-1])
        projected = self.projected.backward(arrays.reshape(xp, first.x, tokens))
        return gradients(("images", "params"))(
            self.patches.backward(projected.x).images,
            {"w_patch": projected.w, "b_patch": projected.b, "patch_norm_gamma": first.gamma,
             "patch_norm_beta": first.beta, "stages": stages[::-1], "norm_gamma": last.gamma,
             "norm_beta": last.beta})


@differentiable
def swin(images: Array, params: Mapping[str, Any], *, patch: int, num_heads: Sequence[int],
         window: int, shift: int | None = None, eps: float = 1e-5, rng: Any = None,
         decisions: Mapping[str, Array] | None = None,
         **options: Any) -> tuple[Array, SwinEncoderSaved]:
    """Encode images: patches, then stages of blocks, each at half the resolution of the one before.

    Every other block of a stage is shifted. An image of 224 x 224 pixels with patches of 4 has
    56 x 56 cells in the first stage, 28 x 28 in the second, 14 x 14 in the third.

    Parameters
    ----------
    images : array, shape (..., R, S, C), float16 / bfloat16 / float32 / float64
        Channels last; the patches fill them.
    params : dict
        ``w_patch (patch area * C, width)``, ``b_patch``, ``patch_norm_gamma`` and
        ``patch_norm_beta (width,)``; ``stages``, a list of dicts with ``blocks``, a list of
        parameters for `swin_block`, and in all but the first ``merge_gamma``, ``merge_beta`` and
        ``w_merge`` for `patch_merging`; ``norm_gamma`` and ``norm_beta`` of the last width.
        `init_swin` makes it.
    patch : int
        Side of the patches.
    num_heads : sequence of int
        Heads of each stage.
    window : int
        Side of the windows, in cells.
    shift : int, optional
        Of every other block; ``window // 2`` by default.
    eps : float
        Of all norms.
    rng : int or numpy.random.Generator, optional
        One stream for all blocks, which draw from it in turn.
    decisions : dict, optional
        As ``saved.decisions`` has them: names preceded by the block's number and a dot.
    **options
        As for `swin_block`: ``reference``, ``activation``, ``dropout``.

    Returns
    -------
    array, shape (..., R', S', width'), dtype of `images`
        The last stage's cells, normalised; a classifier takes their mean. Gradients: images and
        params, a dict nested as `params`.

    Raises
    ------
    ShapeError
        The patches do not fill the images, or widths do not fit.
    OptionError
        A parameter is missing or unknown, or the stages are not as many as `num_heads`.

    Notes
    -----
    Cost linear in the pixels. Kept for backward: what the layers keep.

    References
    ----------
    .. [1] Liu et al., "Swin Transformer", 2021, arXiv:2103.14030, section 3.1, figure 3.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.layers import init_swin, swin
    >>> params = init_swin(0, image=(32, 32), patch=4, width=8, depths=(2, 2), num_heads=(2, 4),
    ...                    window=4)
    >>> out, saved = swin.forward(np.ones((5, 32, 32, 3), np.float32), params, patch=4,
    ...                           num_heads=(2, 4), window=4)
    >>> out.shape, saved.backward(out).images.shape
    ((5, 4, 4, 16), (5, 32, 32, 3))
    """
    require_params(params, ("w_patch", "b_patch", "patch_norm_gamma", "patch_norm_beta", "stages",
                            "norm_gamma", "norm_beta"))
    if len(num_heads) != len(params["stages"]):
        raise OptionError(f"num_heads must have an entry for each of {len(params['stages'])} "
                          f"stages; got {num_heads}")
    shift = window // 2 if shift is None else shift
    if rng is not None:
        rng = require_rng(rng)
    tokens, patches = patchify.forward(images, patch=patch)
    x, projected = linear.forward(tokens, params["w_patch"], params["b_patch"])
    x = arrays.reshape(arrays.namespace(x), x, (
        *images.shape[:-3], images.shape[-3] // patch, images.shape[-2] // patch, x.shape[-1]))
    x, patch_normed = layer_norm.forward(x, params["patch_norm_gamma"], params["patch_norm_beta"],
                                         eps=eps)
    merged: list[Any] = []
    stages, number = [], 0
    for stage, heads in zip(params["stages"], num_heads, strict=True):
        merging = None
        if merged:
            require_params(stage, ("merge_gamma", "merge_beta", "w_merge", "blocks"))
            x, merging = patch_merging.forward(x, stage["merge_gamma"], stage["merge_beta"],
                                               stage["w_merge"], eps=eps)
        else:
            require_params(stage, ("blocks",))
        merged.append(merging)
        kept = []
        for i, block in enumerate(stage["blocks"]):
            own = None if decisions is None else {
                name.partition(".")[2]: value for name, value in decisions.items()
                if name.partition(".")[0] == str(number)}
            x, saved = swin_block.forward(x, block, num_heads=heads, window=window,
                                          shift=shift if i % 2 else 0, eps=eps, rng=rng,
                                          decisions=own, **options)
            kept.append(saved)
            number += 1
        stages.append(tuple(kept))
    out, normed = layer_norm.forward(x, params["norm_gamma"], params["norm_beta"], eps=eps)
    return out, SwinEncoderSaved(patches, projected, patch_normed, tuple(merged), tuple(stages),
                                 normed)
