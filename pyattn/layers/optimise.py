"""One step of Adam, on parameters that are arrays in dicts and lists."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..checks import OptionError, require_integer, require_real
from ..features.precision import cast_like, widened


def _mapped(function: Callable[..., Any], *trees: Any) -> Any:
    """`function` of the leaves of `trees`, which are nested alike, in a tree of that form."""
    first = trees[0]
    if isinstance(first, dict):
        for other in trees[1:]:
            if not isinstance(other, dict) or other.keys() != first.keys():
                raise OptionError(f"params and grads must be nested alike; one has {list(first)}, "
                                  f"another {list(other) if isinstance(other, dict) else other!r}")
        return {name: _mapped(function, *(tree[name] for tree in trees)) for name in first}
    if isinstance(first, list | tuple):
        if any(not isinstance(other, list | tuple) or len(other) != len(first)
               for other in trees[1:]):
            raise OptionError("params and grads must be nested alike; one is a list of "
                              f"{len(first)}, another is not")
        return [_mapped(function, *items) for items in zip(*trees, strict=True)]
    return function(*trees)


def _leaves(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [leaf for item in tree.values() for leaf in _leaves(item)]
    if isinstance(tree, list | tuple):
        return [leaf for item in tree for leaf in _leaves(item)]
    return [tree]


def _wide(grad: Any) -> Any:
    return widened(grads=grad)[1]


def _zeros(param: Any) -> Any:
    xp, wide = widened(params=param)
    return xp.zeros_like(wide)


def clip_by_norm(grads: Any, limit: float) -> tuple[Any, float]:
    """Shrink all gradients by one factor so that their joint Euclidean norm is at most `limit`.

    Parameters
    ----------
    grads : array, or dict or list of such
        Left as it is.
    limit : float
        The greatest norm.

    Returns
    -------
    clipped : nested as `grads`
    norm : float
        What the norm was.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.layers import clip_by_norm
    >>> clip_by_norm({"w": np.array([3.0, 4.0])}, 1.0)
    ({'w': array([0.6, 0.8])}, 5.0)
    """
    limit = require_real("limit", limit)
    norm = 0.0
    for grad in _leaves(grads):
        xp, wide = widened(grads=grad)
        norm += float(xp.sum(wide * wide))
    norm = math.sqrt(norm)
    if norm <= limit:
        return grads, norm
    factor = limit / norm
    return _mapped(lambda grad: grad * factor, grads), norm


def adam(params: Any, grads: Any, state: dict[str, Any] | None = None, *,
         learning_rate: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
         eps: float = 1e-8, weight_decay: float = 0.0) -> tuple[Any, dict[str, Any]]:
    """One step of Adam; with `weight_decay`, of AdamW.

    Parameters
    ----------
    params, grads : array, or dict or list of such, nested alike
        Neither is written to.
    state : dict, optional
        What the previous step returned; None for the first.
    learning_rate, betas, eps : floats
        As in the paper: the step, the decay of the two averages, what keeps the root off 0.
    weight_decay : float
        Every step takes ``learning_rate * weight_decay * param`` off arrays of two axes or more,
        apart from the gradient's averages.

    Returns
    -------
    params : nested as `params`
        New arrays, in their dtypes.
    state : dict
        ``step``, and the averages ``mean`` and ``square``, in float32 (float64 for float64).

    Raises
    ------
    OptionError
        The two are not nested alike, or an option is outside its rule.

    References
    ----------
    .. [1] Kingma, Ba, "Adam", 2014, arXiv:1412.6980, algorithm 1.
    .. [2] Loshchilov, Hutter, "Decoupled Weight Decay Regularization", 2017, arXiv:1711.05101,
       algorithm 2.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.layers import adam
    >>> params, state = adam({"w": np.array([1.0])}, {"w": np.array([5.0])}, learning_rate=0.1)
    >>> params["w"].round(6), state["step"]
    (array([0.9]), 1)
    """
    learning_rate = require_real("learning_rate", learning_rate)
    first, second = (require_real("betas", beta) for beta in betas)
    if not (0 <= first < 1 and 0 <= second < 1):
        raise OptionError(f"betas must be at least 0 and less than 1; got {betas}")
    if state is None:
        zeros = _mapped(_zeros, params)
        state = {"step": 0, "mean": zeros, "square": zeros}
    step = require_integer("state['step']", state["step"], minimum=0) + 1
    rate = learning_rate / (1 - first ** step)
    unbias = 1 / math.sqrt(1 - second ** step)

    def moved(param: Any, mean: Any, square: Any) -> Any:
        xp, wide = widened(params=param)
        new = wide - rate * mean / (unbias * xp.sqrt(square) + eps)
        if weight_decay and param.ndim >= 2:
            new = new - learning_rate * weight_decay * wide
        return cast_like(xp, new, param)

    mean = _mapped(lambda average, grad: first * average + (1 - first) * _wide(grad),
                   state["mean"], grads)
    square = _mapped(lambda average, grad: second * average + (1 - second) * _wide(grad) ** 2,
                     state["square"], grads)
    return _mapped(moved, params, mean, square), {"step": step, "mean": mean, "square": square}
