"""Gates that are learned: how a logit becomes a factor in [0, 1], and what its gradient is.

``a`` is a logit, ``s = sigmoid(a)``. A gate that is 0 or 1 has no slope of its own; each sampler
says what it takes instead. Noise and draws are decisions: constants of the backward, which may be
passed back in.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from .. import arrays
from ..arrays import Array
from ..checks import OptionError, require_broadcast, require_choice, require_real
from ..differentiable import ON_HOST, Saved, differentiable, gradients
from ..masks.algebra import host_array
from .precision import cast_like, require_same_shape, widened

KINDS = ("straight_through", "concrete", "hard_concrete", "policy")

STRETCH = (-0.1, 1.1)
"""Where hard concrete gates reach to before they are clipped."""


@dataclasses.dataclass(frozen=True)
class GatesSaved(Saved):
    """The logits that gates came from, and what their gradients take."""

    logits: Array
    slope: Array | None
    """What the gradient of a gate is multiplied by; None where drawing is all that there is."""
    score: Array | None
    """gates - s, for gates of a policy."""
    drawn: dict[str, np.ndarray] = dataclasses.field(metadata=ON_HOST)

    @property
    def decisions(self) -> dict[str, Array]:
        """``noise`` or ``gates``, whatever was drawn or cut off."""
        return self.drawn

    def backward(self, dout: Array, *, reward: Any = None, baseline: Any = 0.0) -> Any:
        """Gradient of logits.

        Parameters
        ----------
        dout : array
            Gradient of the gates.
        reward, baseline : float, or array that broadcasts to the gates
            For gates of a policy: the gradient of ``-reward`` as `policy_gradient` estimates it, as
            a loss is to fall and a reward to rise. Without a reward it is 0.
        """
        require_same_shape("dout", dout, self.logits.shape)
        xp, dgates = widened(dout=dout)
        if self.score is None:
            if reward is not None:
                raise OptionError("only gates of a policy learn from a reward")
            return gradients(("logits",))(cast_like(xp, dgates * self.slope, self.logits))
        found = xp.zeros_like(self.score)
        if reward is not None:
            found = -_pulled(xp, self.score, reward, baseline)
        return gradients(("logits",))(cast_like(xp, found, self.logits))


def sigmoid(xp: Any, x: Array) -> Array:
    """The logistic function by tanh, which cannot overflow."""
    return 0.5 * (1 + xp.tanh(0.5 * x))


def _temperature(value: Any) -> float:
    temperature = require_real("temperature", value)
    if temperature <= 0:
        raise OptionError(f"temperature must be positive; got {temperature}")
    return temperature


def _noise(decisions: dict[str, Any] | None, known: tuple[str, ...], shape: tuple[int, ...],
           rng: Any) -> dict[str, np.ndarray]:
    """Return the decisions that were given, and logistic noise if a sampler needs it."""
    unknown = sorted(set(decisions or {}) - set(known))
    if unknown:
        raise OptionError(f"decisions may hold {', '.join(known)}; got {', '.join(unknown)}")
    found = {name: host_array(x) for name, x in (decisions or {}).items()}
    for name, x in found.items():
        require_broadcast(name, x.shape, shape, "the gates' shape")
    if "noise" in known and "noise" not in found:
        # of an even draw u in (0, 1): log u - log(1 - u)
        found["noise"] = np.random.default_rng(rng).logistic(size=shape)
    return found


def _placed(xp: Any, x: np.ndarray, like: Array) -> Array:
    return xp.astype(arrays.from_host(xp, np.broadcast_to(x, like.shape), arrays.device(like)),
                     like.dtype)


@differentiable
def straight_through(logits: Array, *, temperature: float = 1.0,
                     decisions: dict[str, Any] | None = None) -> tuple[Array, GatesSaved]:
    """Open gates with a positive logit; the gradient is that of ``sigmoid(logit / temperature)``.

    E.g. logits -1 and 2: gates 0 and 1, slopes 0.197 and 0.105.

    Parameters
    ----------
    logits : array, any shape, floating point
    temperature : float, > 0
        Divides the logits in the gradient.
    decisions : dict, optional
        ``gates``: which are open, from an earlier call.

    Returns
    -------
    array, shape and dtype of `logits`
        0 or 1. Gradient: logits.

    Raises
    ------
    OptionError, ShapeError
        A temperature that is not positive; decisions that do not fit.

    References
    ----------
    .. [1] Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons for
       Conditional Computation", 2013, arXiv:1308.3432, section 4 (there of a drawn gate).

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.features import straight_through
    >>> gates, saved = straight_through.forward(np.array([-1.0, 2.0]))
    >>> gates, saved.backward(np.ones(2)).logits.round(3)
    (array([0., 1.]), array([0.197, 0.105]))
    """
    temperature = _temperature(temperature)
    xp, a = widened(logits=logits)
    drawn = _noise(decisions, ("gates",), tuple(logits.shape), None)
    if "gates" not in drawn:
        drawn["gates"] = arrays.to_host(a) > 0
    s = sigmoid(xp, a / temperature)
    gates = _placed(xp, drawn["gates"], a)
    return (cast_like(xp, gates, logits),
            GatesSaved(logits, s * (1 - s) / temperature, None, drawn))


@differentiable
def binary_concrete(logits: Array, *, temperature: float = 1.0, hard: bool = False,
                    rng: Any = None, decisions: dict[str, Any] | None = None,
                    ) -> tuple[Array, GatesSaved]:
    """Draw gates between 0 and 1: ``sigmoid((logit + noise) / temperature)``, noise logistic.

    This is the Gumbel-softmax of two classes, by the difference of their logits. E.g. with noise
    0 and 1, ``temperature=0.5``, logits 0: gates 0.5 and 0.881.

    Parameters
    ----------
    logits : array, any shape, floating point
    temperature : float, > 0
        Near 0 gates are near 0 or 1, open with probability ``sigmoid(logit)``.
    hard : bool
        Gates above one half become 1 and the others 0, with the gradient as it was.
    rng : int, numpy.random.Generator or None
    decisions : dict, optional
        ``noise``, and ``gates`` where they are hard. Noise 0 gives the gates without chance.

    Returns
    -------
    array, shape and dtype of `logits`
        Gradient: logits.

    Raises
    ------
    OptionError, ShapeError
        A temperature that is not positive; decisions that do not fit.

    References
    ----------
    .. [1] Maddison et al., "The Concrete Distribution", 2017, arXiv:1611.00712, appendix C.3.
    .. [2] Jang et al., "Categorical Reparameterization with Gumbel-Softmax", 2017,
       arXiv:1611.01144, section 2.2 (straight through).

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.features import binary_concrete
    >>> gates, saved = binary_concrete.forward(np.zeros(2), temperature=0.5,
    ...                                        decisions={"noise": np.array([0.0, 1.0])})
    >>> gates.round(3), saved.backward(np.ones(2)).logits.round(3)
    (array([0.5  , 0.881]), array([0.5 , 0.21]))
    """
    temperature = _temperature(temperature)
    xp, a = widened(logits=logits)
    drawn = _noise(decisions, ("noise", "gates") if hard else ("noise",), tuple(logits.shape), rng)
    s = sigmoid(xp, (a + _placed(xp, drawn["noise"], a)) / temperature)
    slope, gates = s * (1 - s) / temperature, s
    if hard:
        if "gates" not in drawn:
            drawn["gates"] = arrays.to_host(s) > 0.5
        gates = _placed(xp, drawn["gates"], a)
    return cast_like(xp, gates, logits), GatesSaved(logits, slope, None, drawn)


@differentiable
def hard_concrete(logits: Array, *, temperature: float = 2 / 3, rng: Any = None,
                  decisions: dict[str, Any] | None = None) -> tuple[Array, GatesSaved]:
    """Draw gates that are often exactly 0 or 1: binary concrete, stretched and clipped.

    ``clip(1.2 sigmoid((logit + noise) / temperature) - 0.1, 0, 1)``; the gradient is 0 where that
    is clipped. E.g. with noise 0 and 3 and logits 0: gates 0.5 and 1.

    Parameters
    ----------
    logits : array, any shape, floating point
    temperature : float, > 0
    rng : int, numpy.random.Generator or None
    decisions : dict, optional
        ``noise``.

    Returns
    -------
    array, shape and dtype of `logits`
        Gradient: logits. `l0_penalty` is the expected number of gates that are not 0.

    Raises
    ------
    OptionError, ShapeError
        A temperature that is not positive; decisions that do not fit.

    References
    ----------
    .. [1] Louizos et al., "Learning Sparse Neural Networks through L0 Regularization", 2018,
       arXiv:1712.01312, section 2.2, equations 10 and 11.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.features import hard_concrete
    >>> gates, saved = hard_concrete.forward(np.zeros(2), decisions={"noise": np.array([0.0, 3])})
    >>> gates, saved.backward(np.ones(2)).logits.round(3)
    (array([0.5, 1. ]), array([0.45, 0.  ]))
    """
    temperature = _temperature(temperature)
    xp, a = widened(logits=logits)
    drawn = _noise(decisions, ("noise",), tuple(logits.shape), rng)
    low, high = STRETCH
    s = sigmoid(xp, (a + _placed(xp, drawn["noise"], a)) / temperature)
    wide = s * (high - low) + low
    slope = xp.where((wide > 0) & (wide < 1), (high - low) * s * (1 - s) / temperature, 0.0)
    return cast_like(xp, xp.clip(wide, 0.0, 1.0), logits), GatesSaved(logits, slope, None, drawn)


@differentiable
def bernoulli_gates(logits: Array, *, rng: Any = None, decisions: dict[str, Any] | None = None,
                    ) -> tuple[Array, GatesSaved]:
    """Draw gates that are open with probability ``sigmoid(logit)``: a policy, taught by rewards.

    E.g. logits 0: every gate is 0 or 1 by a fair coin.

    Parameters
    ----------
    logits : array, any shape, floating point
    rng : int, numpy.random.Generator or None
    decisions : dict, optional
        ``gates``.

    Returns
    -------
    array, shape and dtype of `logits`
        Gradient: logits, by ``saved.backward(dgates, reward=..., baseline=...)``; what reaches the
        gates themselves has no say.

    Raises
    ------
    OptionError, ShapeError
        Decisions that do not fit.

    References
    ----------
    .. [1] Williams, "Simple Statistical Gradient-Following Algorithms for Connectionist
       Reinforcement Learning", 1992, section 4 (REINFORCE).

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.features import bernoulli_gates
    >>> gates, saved = bernoulli_gates.forward(np.zeros(3), decisions={"gates": [1, 0, 1]})
    >>> saved.backward(np.zeros(3), reward=2.0, baseline=1.0).logits
    array([-0.5,  0.5, -0.5])
    """
    xp, a = widened(logits=logits)
    drawn = _noise(decisions, ("gates",), tuple(logits.shape), None)
    s = sigmoid(xp, a)
    if "gates" not in drawn:
        chance = np.random.default_rng(rng).random(tuple(logits.shape))
        drawn["gates"] = chance < arrays.to_host(s)
    gates = _placed(xp, drawn["gates"], a)
    return cast_like(xp, gates, logits), GatesSaved(logits, None, gates - s, drawn)


def policy_gradient(logits: Array, gates: Any, reward: Any, *, baseline: Any = 0.0) -> Array:
    """Estimate the gradient of the expected reward: ``(reward - baseline) * (gates - s)``.

    E.g. a logit 0 whose gate is open, with a reward of 2: 1. The estimate is right on average, for
    any baseline that does not depend on the draw; one near the mean reward makes it less noisy.

    Parameters
    ----------
    logits : array, any shape, floating point
    gates : array of that shape
        What was drawn, from ``saved.decisions["gates"]``.
    reward, baseline : float, or array that broadcasts to the gates

    Returns
    -------
    array, shape and dtype of `logits`
        To be climbed: subtract it from the gradient of a loss.

    Raises
    ------
    ShapeError
        Gates or rewards that do not fit.

    References
    ----------
    .. [1] Williams, "Simple Statistical Gradient-Following Algorithms for Connectionist
       Reinforcement Learning", 1992, section 4.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.features import policy_gradient
    >>> policy_gradient(np.zeros(2), np.array([1, 0]), 2.0)
    array([ 1., -1.])
    """
    xp, a = widened(logits=logits)
    gates = host_array(gates)
    require_same_shape("gates", gates, logits.shape)
    score = _placed(xp, gates, a) - sigmoid(xp, a)
    return cast_like(xp, _pulled(xp, score, reward, baseline), logits)


def _pulled(xp: Any, score: Array, reward: Any, baseline: Any) -> Array:
    gain = host_array(reward) - host_array(baseline)
    require_broadcast("reward", gain.shape, tuple(score.shape), "the gates' shape")
    return score * _placed(xp, gain, score)


def update_baseline(baseline: Any, reward: Any, *, decay: float = 0.99) -> Any:
    """Move a baseline towards the rewards of a step: ``decay * baseline + (1 - decay) * mean``.

    E.g. baseline 1, rewards 2 and 4, ``decay=0.5``: 2.

    Parameters
    ----------
    baseline : float
    reward : float or array
    decay : float in [0, 1]

    Returns
    -------
    float
        The new baseline; it changes only here.

    Examples
    --------
    >>> from pyattn.features import update_baseline
    >>> update_baseline(1.0, [2.0, 4.0], decay=0.5)
    2.0
    """
    decay = require_real("decay", decay)
    if not 0 <= decay <= 1:
        raise OptionError(f"decay must lie in 0..1; got {decay}")
    return decay * float(baseline) + (1 - decay) * float(np.mean(host_array(reward)))


@dataclasses.dataclass(frozen=True)
class PenaltySaved(Saved):
    """The logits of a penalty, and how it grows with each."""

    logits: Array
    slope: Array

    def backward(self, dout: Any = 1.0) -> Any:
        """Gradient of logits."""
        xp = arrays.namespace(self.logits)
        return gradients(("logits",))(cast_like(xp, dout * self.slope, self.logits))


@differentiable
def l0_penalty(logits: Array, *, temperature: float = 2 / 3) -> tuple[Any, PenaltySaved]:
    """How many hard concrete gates are expected not to be 0, to be added to a loss.

    The sum of ``sigmoid(logit - temperature log(0.1 / 1.1))``. E.g. two logits of 0: 1.664.

    Parameters
    ----------
    logits : array, any shape, floating point
    temperature : float, > 0
        As `hard_concrete` is called with.

    Returns
    -------
    array of shape (), float64 for float64, else float32
        Gradient: logits. ``saved.backward()`` alone takes the penalty as it is.

    Raises
    ------
    OptionError
        A temperature that is not positive.

    References
    ----------
    .. [1] Louizos et al., "Learning Sparse Neural Networks through L0 Regularization", 2018,
       arXiv:1712.01312, section 2.2, equation 12.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.features import l0_penalty
    >>> penalty, saved = l0_penalty.forward(np.zeros(2))
    >>> float(round(penalty, 3)), saved.backward().logits.round(3)
    (1.664, array([0.14, 0.14]))
    """
    xp, a = widened(logits=logits)
    low, high = STRETCH
    s = sigmoid(xp, a - _temperature(temperature) * math.log(-low / high))
    return xp.sum(s), PenaltySaved(logits, s * (1 - s))


def sample(kind: str, logits: Array, *, temperature: float | None, rng: Any,
           decisions: dict[str, Any] | None) -> tuple[Array, GatesSaved]:
    """Draw gates of one of `KINDS`; the temperature by default is that sampler's own."""
    require_choice("kind", kind, KINDS)
    given: dict[str, Any] = {"decisions": decisions}
    if temperature is not None:
        given["temperature"] = temperature
    if kind == "straight_through":
        return straight_through.forward(logits, **given)
    if kind == "concrete":
        return binary_concrete.forward(logits, rng=rng, **given)
    if kind == "hard_concrete":
        return hard_concrete.forward(logits, rng=rng, **given)
    if temperature is not None:
        raise OptionError("gates of a policy have no temperature")
    return bernoulli_gates.forward(logits, rng=rng, **given)
