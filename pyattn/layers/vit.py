"""The Vision Transformer: an image as a sequence of patches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..checks import OptionError, ShapeError, require_choice, require_integer, require_rng
from ..differentiable import Saved, differentiable, gradients
from ..features.positions import add_positions, sinusoidal
from ..features.precision import cast_like, require_same_shape, widened
from .linear import linear, rows
from .norm import layer_norm
from .transformer import init_transformer_block, transformer


def _patch(patch: int | tuple[int, int]) -> tuple[int, int]:
    sides = patch if isinstance(patch, tuple | list) else (patch, patch)
    if len(sides) != 2:
        raise OptionError(f"patch must be one side or (height, width); got {patch!r}")
    height, width = (require_integer("patch", side, minimum=1) for side in sides)
    return height, width


def _swap_middle(xp: Any, x: Array) -> Array:
    """(..., a, b, c, d, C) to (..., a, c, b, d, C), and back."""
    n = x.ndim
    return xp.permute_dims(x, (*range(n - 5), n - 5, n - 3, n - 4, n - 2, n - 1))


@dataclasses.dataclass(frozen=True)
class PatchifySaved(Saved):
    """The argument of `patchify`, whose shape and dtype its gradient takes."""

    images: Array
    patch: tuple[int, int]

    def backward(self, dout: Array) -> Any:
        """Gradient of images: every pixel is in one patch."""
        *lead, rows, columns, channels = self.images.shape
        height, width = self.patch
        tokens = (rows // height) * (columns // width)
        require_same_shape("dout", dout, (*lead, tokens, height * width * channels))
        xp = arrays.namespace(dout)
        grid = xp.reshape(dout, (*lead, rows // height, columns // width, height, width, channels))
        return gradients(("images",))(cast_like(
            xp, xp.reshape(_swap_middle(xp, grid), self.images.shape), self.images))


@differentiable
def patchify(images: Array, *, patch: int | tuple[int, int]) -> tuple[Array, PatchifySaved]:
    """Cut images into patches, row by row, each patch one token.

    Parameters
    ----------
    images : array, shape (..., H, W, C), float16 / bfloat16 / float32 / float64
        Channels last.
    patch : int or (int, int)
        Height and width of a patch; they divide H and W.

    Returns
    -------
    array, shape (..., H W / patch area, patch area * C), dtype of `images`
        A token has its patch's pixels row by row, channels innermost.

    Raises
    ------
    ShapeError
        The patches do not fill the image.

    Notes
    -----
    One copy. Kept for backward: the argument, for its shape.

    References
    ----------
    .. [1] Dosovitskiy et al., "An Image is Worth 16x16 Words", 2020, arXiv:2010.11929, section 3.1.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.layers import patchify
    >>> patchify(np.arange(16.0).reshape(4, 4, 1), patch=2)[1]
    array([2., 3., 6., 7.])
    """
    height, width = _patch(patch)
    if images.ndim < 3 or images.shape[-3] % height or images.shape[-2] % width:
        raise ShapeError(f"images must be (..., H, W, C) with H a multiple of {height} and W of "
                         f"{width}; got {tuple(images.shape)}")
    arrays.require_float("images", images)
    xp = arrays.namespace(images)
    *lead, rows, columns, channels = images.shape
    down, across = rows // height, columns // width
    grid = xp.reshape(images, (*lead, down, height, across, width, channels))
    tokens = xp.reshape(_swap_middle(xp, grid),
                        (*lead, down * across, height * width * channels))
    return tokens, PatchifySaved(images, (height, width))


def init_vit(rng: Any, *, image: tuple[int, int], channels: int = 3, patch: int | tuple[int, int],
             width: int, depth: int, num_heads: int = 1, positions: str = "learned",
             dtype: Any = np.float32) -> dict[str, Any]:
    """Fresh parameters for `vit`, as NumPy arrays.

    Parameters
    ----------
    rng : int or numpy.random.Generator
        Where the weights are drawn from.
    image : (int, int)
        Height and width of the images; only learned positions depend on them.
    channels, patch, width, depth, num_heads : int
        C of the images, the patches, the width of the tokens, how many blocks, heads of each.
    positions : {"learned", "sinusoidal", "none"}
        A table of positions is among the parameters only for ``"learned"``.
    dtype : dtype
        Of every array.

    Returns
    -------
    dict, by the names that `vit` documents

    Examples
    --------
    >>> from pyattn.layers import init_vit
    >>> init_vit(0, image=(8, 8), patch=4, width=16, depth=2)["positions"].shape
    (5, 16)
    """
    require_choice("positions", positions, ("learned", "sinusoidal", "none"))
    rng = require_rng(rng)
    height, breadth = _patch(patch)
    pixels = height * breadth * channels
    tokens = (image[0] // height) * (image[1] // breadth)
    params = {
        "w_patch": (rng.standard_normal((pixels, width)) / math.sqrt(pixels)).astype(dtype),
        "b_patch": np.zeros(width, dtype),
        "class_token": (0.02 * rng.standard_normal(width)).astype(dtype),
        "blocks": [init_transformer_block(rng, width, num_heads=num_heads, depth=depth, dtype=dtype)
                   for _ in range(depth)],
        "norm_gamma": np.ones(width, dtype),
        "norm_beta": np.zeros(width, dtype),
    }
    if positions == "learned":
        params["positions"] = (0.02 * rng.standard_normal((tokens + 1, width))).astype(dtype)
    return params


@dataclasses.dataclass(frozen=True)
class VitSaved(Saved):
    """What the layers of a Vision Transformer keep."""

    patches: Any
    projected: Any
    class_token: Array
    placed: Any
    """Of the learned positions, else None."""
    blocks: Any
    normed: Any

    @property
    def decisions(self) -> dict[str, Array]:
        """Those of block i's attention, their names preceded by ``i.``."""
        return self.blocks.decisions

    def backward(self, dout: Array) -> Any:
        """Gradients of images, params (nested as they are), and the attention's array options."""
        dx, dgamma, dbeta = self.normed.backward(dout)
        dx, dblocks, *more = grads = self.blocks.backward(dx)
        params = {"norm_gamma": dgamma, "norm_beta": dbeta, "blocks": dblocks}
        if self.placed is not None:
            dx, params["positions"] = self.placed.backward(dx)
        xp, dclass = widened(dx=dx[..., 0, :])
        dclass = xp.sum(rows(xp, dclass), axis=0)
        params["class_token"] = cast_like(xp, dclass, self.class_token)
        dtokens, params["w_patch"], params["b_patch"] = self.projected.backward(dx[..., 1:, :])
        dimages = self.patches.backward(dtokens).images
        return gradients(("images", "params", *grads._fields[2:]))(dimages, params, *more)


@differentiable
def vit(images: Array, params: Mapping[str, Any], *, patch: int | tuple[int, int],
        num_heads: int, positions: str = "learned", eps: float = 1e-5,
        **options: Any) -> tuple[Array, VitSaved]:
    """A Vision Transformer up to its final norm: patches, class token, positions, blocks.

    ``tokens = [class, patchify(images) @ w_patch + b_patch] + positions``; the blocks; layer norm.
    ``out[..., 0, :]`` is the class token's, for a classifier; the rest are the patches'.

    Parameters
    ----------
    images : array, shape (..., H, W, C), float16 / bfloat16 / float32 / float64
        Channels last.
    params : dict
        ``w_patch (patch area * C, width)``, ``b_patch``, ``class_token``, ``norm_gamma``,
        ``norm_beta (width,)``, ``blocks``: a list of dicts for `transformer_block`; for learned
        positions also ``positions (at least 1 + patches, width)``. `init_vit` makes one.
    patch : int or (int, int)
        Height and width of a patch.
    positions : {"learned", "sinusoidal", "none"}
        What is added to the tokens; the class token stands at position 0. With ``"none"`` the
        patches are a set: permuting them permutes the output.
    num_heads, eps, **options
        As for `transformer`: ``attention``, ``norm``, ``activation``, ``rng``, ``decisions``, ...

    Returns
    -------
    array, shape (..., 1 + patches, width), dtype of `images`
        Gradients: images, params (nested as they are given), then the attention's array options,
        summed over the blocks.

    Raises
    ------
    ShapeError
        The patches do not fill the image, or widths do not fit.
    OptionError
        A parameter is missing or unknown.

    Notes
    -----
    Kept for backward: what the layers keep.

    References
    ----------
    .. [1] Dosovitskiy et al., "An Image is Worth 16x16 Words", 2020, arXiv:2010.11929, section 3.1,
       equations 1-4.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.layers import init_vit, vit
    >>> params = init_vit(0, image=(8, 8), channels=1, patch=4, width=16, depth=2, num_heads=2)
    >>> out, saved = vit.forward(np.ones((3, 8, 8, 1), np.float32), params, patch=4, num_heads=2)
    >>> out.shape, len(saved.backward(out).params["blocks"])
    ((3, 5, 16), 2)
    """
    require_choice("positions", positions, ("learned", "sinusoidal", "none"))
    wanted = {"w_patch", "b_patch", "class_token", "blocks", "norm_gamma", "norm_beta"}
    wanted |= {"positions"} if positions == "learned" else set()
    if set(params) != wanted:
        raise OptionError(f"params must have {', '.join(sorted(wanted))} for {positions} "
                          f"positions; got {', '.join(sorted(params))}")
    tokens, patches = patchify.forward(images, patch=patch)
    x, projected = linear.forward(tokens, params["w_patch"], params["b_patch"])
    class_token = params["class_token"]
    if tuple(class_token.shape) != (x.shape[-1],):
        raise ShapeError(f"class_token must have shape ({x.shape[-1]},), the columns of w_patch; "
                         f"got {tuple(class_token.shape)}")
    xp = arrays.namespace(x, class_token)
    first = xp.broadcast_to(cast_like(xp, class_token, x), (*x.shape[:-2], 1, x.shape[-1]))
    x = xp.concat([first, x], axis=-2)
    placed = None
    if positions == "learned":
        x, placed = add_positions.forward(x, params["positions"])
    elif positions == "sinusoidal":
        x = add_positions(x, sinusoidal(*x.shape[-2:], dtype=x.dtype, xp=xp,
                                        device=arrays.device(x)))
    x, blocks = transformer.forward(x, params["blocks"], num_heads=num_heads, eps=eps, **options)
    out, normed = layer_norm.forward(x, params["norm_gamma"], params["norm_beta"], eps=eps)
    return out, VitSaved(patches, projected, class_token, placed, blocks, normed)
