"""Squeeze-and-excitation and CBAM together."""

from __future__ import annotations

import dataclasses
from typing import Any

from .. import arrays
from ..arrays import Array
from ..checks import OptionError, require_choice
from ..differentiable import Saved, differentiable, gradients
from ..features.channel_pooling import (
    SpatialGateSaved,
    flat_images,
    require_images,
    require_network,
    spatial_gate,
)
from ..features.precision import cast_like, require_same_shape, widened
from .cbam import CbamSaved, cbam, indices, require_spatial
from .squeeze_excite import SqueezeExciteSaved, squeeze_excite

MODES = ("serial", "full", "parallel")
SECOND = ("w1_cbam", "b1_cbam", "w2_cbam", "b2_cbam")


@dataclasses.dataclass(frozen=True)
class SeCbamSaved(Saved):
    """What the two parts of `se_cbam` keep."""

    excited: SqueezeExciteSaved
    gated: CbamSaved | None
    """CBAM's, where it is whole."""
    middle: Array
    """What the first part gives."""
    pixels: SpatialGateSaved | None
    """CBAM's gate of the pixels, where that is all of it."""
    weights: dict[str, Array]
    mode: str

    @property
    def decisions(self) -> dict[str, Array]:
        """As for `pyattn.cbam`; in serial mode ``spatial_argmax`` alone."""
        if self.gated is not None:
            return self.gated.decisions
        assert self.pixels is not None
        shape = self.middle.shape
        return {"spatial_argmax": self.pixels.index.reshape(*shape[:-3], *shape[-2:])}

    @property
    def statistics(self) -> tuple[float, float] | None:
        """As for `pyattn.cbam`."""
        part = self.gated or self.pixels
        return None if part is None else part.statistics

    @property
    def stats(self) -> dict[str, int]:
        """Counters: flops of the forward, bytes in and out."""
        found = self.excited.stats
        if self.gated is not None:
            return {name: count + self.gated.stats[name] for name, count in found.items()}
        c, height, width = self.middle.shape[-3:]
        images, taps = self.excited.gated.gate.shape[0], self.weights["w_spatial"].shape[-1] ** 2
        found["flops"] += images * height * width * (3 * c + 4 * taps)
        return found | {"bytes": 2 * found["bytes"]}

    def backward(self, dout: Array) -> Any:
        """Gradients of x and of the weights given."""
        require_same_shape("dout", dout, self.middle.shape)
        found: dict[str, Array] = {}
        if self.gated is None:
            xp, dmiddle, found = self._spatial(dout)
        else:
            xp = arrays.namespace(dout)
            if self.mode == "parallel":
                # forward: out = (squeeze_excite(x) + cbam(x)) / 2
                dout = dout / 2
            grads = self.gated.backward(dout)._asdict()
            dmiddle = grads.pop("x")
            found = {f"{name}_cbam" if f"{name}_cbam" in SECOND else name: grad
                     for name, grad in grads.items()}
        excited = self.excited.backward(dout if self.mode == "parallel" else dmiddle)._asdict()
        dx = excited.pop("x")
        if self.mode == "parallel":
            dx = dx + dmiddle
        found |= excited
        return gradients(("x", *self.weights))(
            dx, *(cast_like(xp, found[name], w) for name, w in self.weights.items()))

    def _spatial(self, dout: Array) -> tuple[Any, Array, dict[str, Array]]:
        """Undo the gate of the pixels alone."""
        assert self.pixels is not None
        xp, dy, middle = widened(dout=dout, middle=self.middle)
        dy, flat = flat_images(xp, dy), flat_images(xp, middle)
        gate = xp.reshape(self.pixels.gate, (flat.shape[0], 1, flat.shape[2]))
        # forward: out = middle gate
        more, found = self.pixels.backward(xp.sum(dy * flat, axis=1), flat)
        dmiddle = cast_like(xp, xp.reshape(dy * gate + more, self.middle.shape), self.middle)
        return xp, dmiddle, {name: xp.reshape(grad, self.weights[name].shape)
                             for name, grad in found.items()}


@differentiable
def se_cbam(x: Array, w1: Array, b1: Array | None, w2: Array, b2: Array | None, w_spatial: Array,
            w1_cbam: Array | None = None, b1_cbam: Array | None = None,
            w2_cbam: Array | None = None, b2_cbam: Array | None = None,
            gamma: Array | None = None, beta: Array | None = None, *, mode: str = "serial",
            order: str = "max_mean", statistics: tuple[float, float] | None = None,
            eps: float = 1e-5,
            decisions: dict[str, Any] | None = None) -> tuple[Array, SeCbamSaved]:
    """Squeeze-and-excitation, and CBAM or its half that SE has not.

    - ``"serial"``: `squeeze_excite`, then CBAM's gate of the pixels;
    - ``"full"``: ``cbam(squeeze_excite(x))``;
    - ``"parallel"``: ``(squeeze_excite(x) + cbam(x)) / 2``.

    E.g. with weights and biases 0 all gates are 1/2: ``out = x / 4``, ``x / 8`` and ``3 x / 8``.

    Parameters
    ----------
    x : array, shape (..., C, H, W), float16, bfloat16, float32 or float64
        Images.
    w1, b1, w2, b2 : arrays, shapes (C, R), (R,), (R, C) and (C,)
        The network of squeeze-and-excitation; biases may be None.
    w_spatial : array, shape (2, k, k), k odd
        CBAM's, from its two maps to the gate of the pixels.
    w1_cbam, b1_cbam, w2_cbam, b2_cbam : arrays, shapes (C, R'), (R',), (R', C) and (C,)
        CBAM's own network of the channels, for ``"full"`` and ``"parallel"``; biases may be None.
    gamma, beta : arrays with one number each, optional
        As for `pyattn.cbam`.
    mode : {"serial", "full", "parallel"}
    order, statistics, eps, decisions
        As for `pyattn.cbam`.

    Returns
    -------
    array, shape (..., C, H, W), dtype of `x`
        Gradients: x, and the weights given.

    Raises
    ------
    ShapeError, DtypeError, OptionError
        Arguments that do not fit, or that the mode does not take.

    Notes
    -----
    O(H W (C + k^2) + C R). Kept for backward: what the parts keep. CBAM has a gate of the channels
    already, so ``"serial"`` puts SE in its place; no paper proposes the combination.

    References
    ----------
    .. [1] Hu et al., "Squeeze-and-Excitation Networks", 2018, arXiv:1709.01507, section 3.
    .. [2] Woo et al., "CBAM: Convolutional Block Attention Module", 2018, arXiv:1807.06521,
       section 3.

    Examples
    --------
    >>> import numpy as np, pyattn
    >>> x = np.ones((2, 3, 3))
    >>> nothing = np.zeros((2, 1)), None, np.zeros((1, 2)), None, np.zeros((2, 7, 7))
    >>> pyattn.se_cbam(x, *nothing)[0, 0]
    array([0.25, 0.25, 0.25])
    """
    require_choice("mode", mode, MODES)
    second = dict(zip(SECOND, (w1_cbam, b1_cbam, w2_cbam, b2_cbam), strict=True))
    if mode == "serial":
        given = [name for name, w in second.items() if w is not None]
        if given:
            raise OptionError(f"mode 'serial' has no second network; got {', '.join(given)}")
        if "channel_argmax" in (decisions or {}):
            raise OptionError("decisions may hold spatial_argmax in mode 'serial'; got "
                              "channel_argmax")
    elif w1_cbam is None or w2_cbam is None:
        raise OptionError(f"mode {mode!r} needs w1_cbam and w2_cbam")
    require_images(x)
    if w1_cbam is not None and w2_cbam is not None:
        require_network(x, w1_cbam, b1_cbam, w2_cbam, b2_cbam, "_cbam")
    options = require_spatial(w_spatial, gamma, beta, order, statistics, eps)
    named = {"w1": w1, "b1": b1, "w2": w2, "b2": b2, "w_spatial": w_spatial, **second,
             "gamma": gamma, "beta": beta}
    weights = {name: w for name, w in named.items() if w is not None}
    middle, excited = squeeze_excite.forward(x, w1, b1, w2, b2)
    if mode == "serial":
        _, index = indices(x, decisions)
        xp, wide, w_map, wide_gamma, wide_beta = widened(
            middle=middle, w_spatial=w_spatial, gamma=gamma, beta=beta)
        flat = flat_images(xp, wide)
        gate, pixels = spatial_gate(xp, flat, tuple(x.shape[-2:]), w_map, wide_gamma, wide_beta,
                                    **options, index=index)
        y = cast_like(xp, xp.reshape(flat * gate[:, None, :], x.shape), x)
        return y, SeCbamSaved(excited, None, middle, pixels, weights, mode)
    out, gated = cbam.forward(
        middle if mode == "full" else x, w1_cbam, b1_cbam, w2_cbam, b2_cbam, w_spatial, gamma,
        beta, order=order, statistics=statistics, eps=eps, decisions=decisions)
    if mode == "parallel":
        out = (out + middle) / 2
    return out, SeCbamSaved(excited, gated, middle, None, weights, mode)
