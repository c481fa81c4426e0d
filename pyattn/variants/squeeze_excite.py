"""Each channel of an image is scaled by what all channels are on average."""

from __future__ import annotations

import dataclasses
from typing import Any

from .. import arrays
from ..arrays import Array
from ..differentiable import Saved, differentiable, gradients
from ..features.channel_pooling import (
    ChannelGateSaved,
    channel_gate,
    flat_images,
    require_images,
    require_network,
)
from ..features.precision import cast_like, require_same_shape, widened


@dataclasses.dataclass(frozen=True)
class SqueezeExciteSaved(Saved):
    """The arguments of `squeeze_excite`, and what its gate keeps."""

    x: Array
    weights: dict[str, Array]
    gated: ChannelGateSaved

    @property
    def stats(self) -> dict[str, int]:
        """Counters: flops of the forward, bytes in and out."""
        size = self.gated.w1.shape[0] * self.gated.w1.shape[1]
        pixels = self.x.shape[-2] * self.x.shape[-1]
        images = self.gated.gate.shape[0]
        return {"flops": images * (2 * self.x.shape[-3] * pixels + 4 * size),
                "bytes": 2 * arrays.nbytes(self.x)}

    def backward(self, dout: Array) -> Any:
        """Gradients of x and of the weights given."""
        require_same_shape("dout", dout, self.x.shape)
        xp, dy, x = widened(dout=dout, x=self.x)
        dy, x = flat_images(xp, dy), flat_images(xp, x)
        # forward: out = x gate
        more, found = self.gated.backward(xp.sum(dy * x, axis=2), x)
        dx = xp.reshape(dy * self.gated.gate[:, :, None] + more, self.x.shape)
        return gradients(("x", *self.weights))(
            cast_like(xp, dx, self.x),
            *(cast_like(xp, found[name], w) for name, w in self.weights.items()))


@differentiable
def squeeze_excite(x: Array, w1: Array, b1: Array | None, w2: Array,
                   b2: Array | None) -> tuple[Array, SqueezeExciteSaved]:
    """Scale each channel by a gate that a small network makes from the means of all channels.

    ``gate = sigmoid(relu(mean(x) @ w1 + b1) @ w2 + b2)``, the mean over an image's pixels, and
    ``out[c] = gate[c] * x[c]``. E.g. with weights and biases 0 all gates are 1/2.

    Parameters
    ----------
    x : array, shape (..., C, H, W), float16, bfloat16, float32 or float64
        Images.
    w1, b1 : arrays, shapes (C, R) and (R,)
        Into the hidden layer, R usually C / 16; b1 may be None.
    w2, b2 : arrays, shapes (R, C) and (C,)
        Out of it; b2 may be None.

    Returns
    -------
    array, shape (..., C, H, W), dtype of `x`
        Gradients: x, and the weights given.

    Raises
    ------
    ShapeError, DtypeError
        Arguments that do not fit.

    Notes
    -----
    O(C H W + C R). Kept for backward: the arguments and O(C) numbers an image. Computes in float32
    (float64 if any argument is). An image without pixels has means 0.

    References
    ----------
    .. [1] Hu et al., "Squeeze-and-Excitation Networks", 2018, arXiv:1709.01507, section 3.

    Examples
    --------
    >>> import numpy as np, pyattn
    >>> x = np.arange(8.0).reshape(2, 2, 2)
    >>> pyattn.squeeze_excite(x, np.zeros((2, 1)), None, np.zeros((1, 2)), None)[1]
    array([[2. , 2.5],
           [3. , 3.5]])
    """
    require_images(x)
    require_network(x, w1, b1, w2, b2)
    xp, wide, *weights = widened(x=x, w1=w1, b1=b1, w2=w2, b2=b2)
    flat = flat_images(xp, wide)
    gate, gated = channel_gate(xp, flat, *weights, maximum=False)
    y = xp.reshape(flat * gate[:, :, None], x.shape)
    named = {name: w for name, w in (("w1", w1), ("b1", b1), ("w2", w2), ("b2", b2))
             if w is not None}
    return cast_like(xp, y, x), SqueezeExciteSaved(x, named, gated)
