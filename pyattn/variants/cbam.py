"""Gates for the channels of an image, then gates for its pixels."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..checks import OptionError, ShapeError, require_choice, require_real
from ..differentiable import Saved, differentiable, gradients
from ..features.channel_pooling import (
    ChannelGateSaved,
    SpatialGateSaved,
    channel_gate,
    flat_images,
    given_index,
    require_images,
    require_network,
    spatial_gate,
)
from ..features.precision import cast_like, require_same_shape, widened

DECISIONS = ("channel_argmax", "spatial_argmax")


@dataclasses.dataclass(frozen=True)
class CbamSaved(Saved):
    """The arguments of `cbam`, and what its two gates keep."""

    x: Array
    weights: dict[str, Array]
    channels: ChannelGateSaved
    pixels: SpatialGateSaved

    @property
    def decisions(self) -> dict[str, Array]:
        """``channel_argmax``, int32 (..., C), and ``spatial_argmax`` (..., H, W).

        Which pixel is a channel's largest, counted by rows, and which channel, gated, a pixel's.
        """
        lead = self.x.shape[:-3]
        assert self.channels.index is not None
        return {"channel_argmax": self.channels.index.reshape(*lead, self.x.shape[-3]),
                "spatial_argmax": self.pixels.index.reshape(*lead, *self.x.shape[-2:])}

    @property
    def statistics(self) -> tuple[float, float] | None:
        """Mean and biased variance of the map, where it was normalised by its own."""
        return self.pixels.statistics

    @property
    def stats(self) -> dict[str, int]:
        """Counters: flops of the forward, bytes in and out."""
        c, height, width = self.x.shape[-3:]
        images, taps = self.channels.gate.shape[0], self.weights["w_spatial"].shape[-1] ** 2
        hidden = self.channels.w1.shape[1]
        return {"flops": images * (height * width * (4 * c + 4 * taps) + 8 * c * hidden),
                "bytes": 2 * arrays.nbytes(self.x)}

    def backward(self, dout: Array) -> Any:
        """Gradients of x and of the weights given."""
        require_same_shape("dout", dout, self.x.shape)
        xp, dy, x = widened(dout=dout, x=self.x)
        dy, x = flat_images(xp, dy), flat_images(xp, x)
        gate = self.channels.gate[:, :, None]
        middle = x * gate
        # forward: out = middle pixels
        spatial = xp.reshape(self.pixels.gate, (x.shape[0], 1, x.shape[2]))
        more, found = self.pixels.backward(xp.sum(dy * middle, axis=1), middle)
        dmiddle = dy * spatial + more
        # forward: middle = x gate
        more, own = self.channels.backward(xp.sum(dmiddle * x, axis=2), x)
        dx = xp.reshape(dmiddle * gate + more, self.x.shape)
        found |= own
        return gradients(("x", *self.weights))(
            cast_like(xp, dx, self.x),
            *(cast_like(xp, xp.reshape(found[name], w.shape), w)
              for name, w in self.weights.items()))


@differentiable
def cbam(x: Array, w1: Array, b1: Array | None, w2: Array, b2: Array | None, w_spatial: Array,
         gamma: Array | None = None, beta: Array | None = None, *, order: str = "max_mean",
         statistics: tuple[float, float] | None = None, eps: float = 1e-5,
         decisions: dict[str, Any] | None = None) -> tuple[Array, CbamSaved]:
    """Scale each channel by what its pixels are like, then each pixel by what its channels are.

    The gate of the channels is ``sigmoid(net(mean) + net(max))`` over an image's pixels, with
    ``net(p) = relu(p @ w1 + b1) @ w2 + b2``. The gate of the pixels is the sigmoid of a convolution
    of two maps, the maximum and the mean over the gated channels, by `w_spatial`. E.g. with weights
    and biases 0 all gates are 1/2, and ``out = x / 4``.

    Parameters
    ----------
    x : array, shape (..., C, H, W), float16, bfloat16, float32 or float64
        Images.
    w1, b1, w2, b2 : arrays, shapes (C, R), (R,), (R, C) and (C,)
        The network of the channels; biases may be None.
    w_spatial : array, shape (2, k, k), k odd
        From the two maps to the gate of the pixels, usually k = 7: the one row of torch's weight
        (1, 2, k, k).
    gamma, beta : arrays with one number each, optional
        Batch normalisation of what the convolution gives, before the sigmoid, over all pixels of
        all images.
    order : {"max_mean", "mean_max"}
        Which map the first channel of `w_spatial` is for.
    statistics : pair of floats, optional
        Mean and variance for the batch normalisation, as kept from training. Default: those of the
        batch itself, which have a gradient; ``saved.statistics`` tells them.
    eps : float
        Added to the variance.
    decisions : dict, optional
        What an earlier call found: ``channel_argmax`` and ``spatial_argmax``.

    Returns
    -------
    array, shape (..., C, H, W), dtype of `x`
        Gradients: x, and the weights given. A maximum has its gradient at the first of equals.

    Raises
    ------
    ShapeError, DtypeError, OptionError
        Arguments that do not fit.

    Notes
    -----
    O(H W (C + k^2) + C R). Kept for backward: the arguments, O(C + H W) numbers an image, and the
    places of the maxima. Computes in float32 (float64 if any argument is). The paper's own code has
    the order maximum, mean, biases, and batch normalisation; timm the order mean, maximum, and no
    biases.

    References
    ----------
    .. [1] Woo et al., "CBAM: Convolutional Block Attention Module", 2018, arXiv:1807.06521,
       equations 1 to 3.

    Examples
    --------
    >>> import numpy as np, pyattn
    >>> x = np.arange(8.0).reshape(2, 2, 2)
    >>> nothing = np.zeros((2, 1)), None, np.zeros((1, 2)), None, np.zeros((2, 7, 7))
    >>> out, saved = pyattn.cbam.forward(x, *nothing)
    >>> out[1], saved.decisions["channel_argmax"]
    (array([[1.  , 1.25],
           [1.5 , 1.75]]), array([3, 3], dtype=int32))
    """
    require_images(x)
    require_network(x, w1, b1, w2, b2)
    options = require_spatial(w_spatial, gamma, beta, order, statistics, eps)
    channel_index, pixel_index = indices(x, decisions)
    xp, wide, *weights, w_map, wide_gamma, wide_beta = widened(
        x=x, w1=w1, b1=b1, w2=w2, b2=b2, w_spatial=w_spatial, gamma=gamma, beta=beta)
    flat = flat_images(xp, wide)
    gate, channels = channel_gate(xp, flat, *weights, maximum=True, index=channel_index)
    middle = flat * gate[:, :, None]
    gate, pixels = spatial_gate(xp, middle, tuple(x.shape[-2:]), w_map, wide_gamma, wide_beta,
                                **options, index=pixel_index)
    y = xp.reshape(middle * gate[:, None, :], x.shape)
    named = {"w1": w1, "b1": b1, "w2": w2, "b2": b2, "w_spatial": w_spatial, "gamma": gamma,
             "beta": beta}
    return cast_like(xp, y, x), CbamSaved(
        x, {name: w for name, w in named.items() if w is not None}, channels, pixels)


def require_spatial(w_spatial: Array, gamma: Array | None, beta: Array | None, order: str,
                    statistics: Any, eps: float) -> dict[str, Any]:
    """Return the options of `spatial_gate`, or raise if something does not fit."""
    require_choice("order", order, ("max_mean", "mean_max"))
    k = w_spatial.shape[-1] if w_spatial.ndim == 3 else 0
    if k % 2 == 0 or tuple(w_spatial.shape) != (2, k, k):
        raise ShapeError(f"w_spatial must be (2, k, k), k odd; got {tuple(w_spatial.shape)}")
    if (gamma is None) != (beta is None):
        raise OptionError("gamma and beta must be given both or neither")
    for name, number in (("gamma", gamma), ("beta", beta)):
        if number is not None and tuple(number.shape) not in ((), (1,)):
            raise ShapeError(f"{name} must have one number; got shape {tuple(number.shape)}")
    if statistics is not None:
        if gamma is None:
            raise OptionError("statistics are of the batch normalisation; give gamma and beta with "
                              "them")
        mean, variance = statistics
        statistics = require_real("statistics", mean), require_real("statistics", variance)
    return {"statistics": statistics, "eps": require_real("eps", eps),
            "reverse": order == "mean_max"}


def indices(x: Array,
            decisions: dict[str, Any] | None) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return where `decisions` say that the maxima are, (B, C) and (B, P)."""
    unknown = sorted(set(decisions or {}) - set(DECISIONS))
    if unknown:
        raise OptionError(f"decisions may hold {', '.join(DECISIONS)}; got {', '.join(unknown)}")
    lead, (c, height, width) = tuple(x.shape[:-3]), x.shape[-3:]
    first = given_index(decisions, "channel_argmax", (*lead, c), height * width)
    second = given_index(decisions, "spatial_argmax", (*lead, height, width), c)
    return (None if first is None else first.reshape(-1, c),
            None if second is None else second.reshape(-1, height * width))
