"""Is a backward the derivative of its forward? Random projections against central differences."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from pyattn import arrays
from pyattn.checks import DtypeError, OptionError

from .report import table

_NOISE = 16 * np.finfo(np.float64).eps
"""Rounding of a loss, as a part of the sum of the absolute values of its terms."""


class GradientError(AssertionError):
    """A gradient is wrong; the message names the argument."""


@dataclasses.dataclass(frozen=True)
class ArgumentResult:
    """The gradient of one argument, along the worst of the directions tried."""

    name: str
    passed: bool
    analytic: float
    numeric: float
    error: float
    """Largest difference, relative to the length of the gradient."""
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class GradientResult:
    """The outcome of `gradcheck`. True if all arguments passed; prints as a table."""

    name: str
    arguments: tuple[ArgumentResult, ...]

    @property
    def passed(self) -> bool:
        """Whether there was a gradient and none was wrong."""
        return bool(self.arguments) and not self.wrong

    @property
    def wrong(self) -> tuple[str, ...]:
        """Names of the arguments whose gradients are wrong."""
        return tuple(a.name for a in self.arguments if not a.passed)

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        rows = [["argument", "result", "backward", "differences", "relative error", ""]]
        rows += [[a.name, "ok" if a.passed else "WRONG", f"{a.analytic:.9g}", f"{a.numeric:.9g}",
                  f"{a.error:.1e}", a.reason] for a in self.arguments]
        wrong = f"the gradient of {', '.join(self.wrong)} is wrong" if self.wrong else "all right"
        return "\n".join([f"gradients of {self.name}: {wrong}", *table(rows, right=(2, 3, 4))])


def gradcheck(op: Any, *arguments: Any, wrt: Iterable[str] | None = None, eps: float = 1e-5,
              tolerance: float = 1e-6, n_projections: int = 3, seed: int = 0,
              raise_on_failure: bool = True, **options: Any) -> GradientResult:
    """Compare ``saved.backward`` of an operation with central differences, argument by argument.

    A gradient is right if, along random directions u, ``<gradient, u>`` is the change of a random
    loss. That costs four forwards for each direction, whatever the size of the arguments.

    Parameters
    ----------
    op : operation
        ``op.forward(*arguments, **options)`` returns ``(out, saved)``; `out` may be a tuple, and
        ``saved.backward`` then takes a gradient for each. Random choices are kept by passing
        ``decisions=saved.decisions``, if it has any.
    *arguments, **options
        Of the call. Float arrays must be float64.
    wrt : names, optional
        Arguments to check, such as ``["q", "bias"]``; an array inside a mapping goes by
        ``"params.w"``. Default: every one that the backward returns a gradient for.
    eps : float
        Step of the differences.
    tolerance : float
        Allowed difference, relative to the length of the gradient.
    n_projections : int
        Directions for each argument.
    seed : int
        For loss and directions.
    raise_on_failure : bool
        Whether a wrong gradient raises, or is only told in the result.

    Raises
    ------
    GradientError
        Names the arguments whose gradients are wrong.

    Examples
    --------
    >>> import numpy as np, pyattn
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 5, 4))
    >>> bool(pyattn.testing.gradcheck(pyattn.attention, q, k, v, causal=True))
    True
    """
    name = getattr(op, "__name__", type(op).__name__)
    if not callable(getattr(op, "forward", None)):
        raise OptionError(f"op must have .forward, which returns (out, saved); got {name}")
    call, takes = _bound(op.forward, arguments, options)
    given = dict(_leaves(call))
    for argument, x in given.items():
        if arrays.dtype_name(x) in set(arrays.FLOATS) - {"float64"}:
            raise DtypeError(f"{argument} must be float64 for differences to be exact; "
                             f"got {arrays.dtype_name(x)}")

    rng = np.random.default_rng(seed)
    out, saved = op.forward(*arguments, **options)
    decisions = getattr(saved, "decisions", None)
    if decisions and "decisions" in takes and "decisions" not in options:
        options = {**options, "decisions": decisions}
    outs = [np.asarray(arrays.to_host(x)) for x in _tuple(out)]
    # where an output is not finite (lse of an empty row) it is a constant
    cotangents = [np.where(np.isfinite(x), rng.standard_normal(x.shape), 0) for x in outs]
    like = _tuple(out)
    result = saved.backward(*(arrays.from_host(arrays.namespace(x), c)
                              for x, c in zip(like, cotangents, strict=True)))
    if hasattr(result, "_asdict"):
        result = result._asdict()
    if not isinstance(result, Mapping):
        raise OptionError("the backward must return gradients by name, in a NamedTuple or a "
                          f"mapping; got {type(result).__name__}")
    gradients = dict(_leaves(result))

    def loss(argument: str, toward: np.ndarray, step: float) -> tuple[float, float]:
        moved = arrays.to_host(given[argument]) + step * toward
        changed = _replaced(call, argument, arrays.from_host(
            arrays.namespace(given[argument]), moved))
        outs = _tuple(_call(op.forward, changed, options)[0])
        terms = np.concatenate([(c * np.where(c == 0, 0, arrays.to_host(x))).ravel()
                                for c, x in zip(cotangents, outs, strict=True)])
        return float(terms.sum()), float(abs(terms).sum())

    found = []
    for argument in gradients if wrt is None else wrt:
        if argument not in given:
            raise OptionError(f"wrt must name arrays that are given, {', '.join(given)}; got "
                              f"{argument!r}")
        if argument not in gradients:
            found.append(ArgumentResult(argument, False, np.nan, np.nan, np.nan,
                                        "the backward returns no gradient for it"))
            continue
        found.append(_checked(argument, given[argument], gradients[argument], loss, rng, eps,
                              tolerance, n_projections))
    outcome = GradientResult(name, tuple(found))
    if raise_on_failure and not outcome:
        raise GradientError(str(outcome))
    return outcome


def _checked(name: str, x: Any, gradient: Any, loss: Callable[..., tuple[float, float]],
             rng: np.random.Generator, eps: float, tolerance: float,
             n_projections: int) -> ArgumentResult:
    if tuple(gradient.shape) != tuple(x.shape):
        return ArgumentResult(name, False, np.nan, np.nan, np.nan, f"its gradient has shape "
                              f"{tuple(gradient.shape)}, it has {tuple(x.shape)}")
    if arrays.dtype_name(gradient) != arrays.dtype_name(x):
        return ArgumentResult(name, False, np.nan, np.nan, np.nan, "its gradient is "
                              f"{arrays.dtype_name(gradient)}, it is {arrays.dtype_name(x)}")
    gradient = np.asarray(arrays.to_host(gradient))
    length = float(np.sqrt((gradient ** 2).sum()))
    worst = ArgumentResult(name, True, 0.0, 0.0, 0.0)
    for _ in range(n_projections):
        toward = rng.standard_normal(gradient.shape)
        analytic = float((gradient * toward).sum())
        # of fourth order: two steps each way, so that strong curvature does not look like an error
        near, far = ([loss(name, toward, sign * step) for sign in (1, -1)]
                     for step in (eps, 2 * eps))
        numeric = (8 * (near[0][0] - near[1][0]) - (far[0][0] - far[1][0])) / (12 * eps)
        scale = max(length, abs(analytic), abs(numeric))
        noise = _NOISE * max(terms for _, terms in near) / eps
        difference = abs(analytic - numeric)
        right = bool(difference <= tolerance * scale + noise)
        error = difference / scale if scale else 0.0
        if (worst.passed, -worst.error) > (right, -error) or np.isnan(error):
            worst = ArgumentResult(name, right, analytic, numeric, error)
    return worst


def _tuple(out: Any) -> tuple[Any, ...]:
    return tuple(out) if isinstance(out, tuple | list) else (out,)


Bound = dict[str, Any]


def _bound(forward: Callable[..., Any], arguments: tuple[Any, ...],
           options: Mapping[str, Any]) -> tuple[Bound, set[str]]:
    """Bind the call's arguments to their names; also all names that the operation takes."""
    signature = inspect.signature(forward)
    bound = signature.bind(*arguments, **options)
    named: Bound = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            named |= value
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            raise OptionError(f"op must name its arguments; it takes *{name}")
        else:
            named[name] = value
    return named, set(signature.parameters)


def _call(forward: Callable[..., Any], named: Bound, options: Mapping[str, Any]) -> Any:
    parameters = inspect.signature(forward).parameters
    first = [name for name in parameters if name in named
             and parameters[name].kind is inspect.Parameter.POSITIONAL_ONLY]
    rest = {name: x for name, x in named.items() if name not in first}
    return forward(*(named[name] for name in first), **{**options, **rest})


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Float arrays by name, those of nested mappings and sequences as ``outer.inner``."""
    for name, x in _items(tree):
        if isinstance(x, Mapping | list | tuple):
            yield from _leaves(x, f"{prefix}{name}.")
        elif (hasattr(x, "shape") and not isinstance(x, np.generic)
              and arrays.dtype_name(x) in arrays.FLOATS):
            yield f"{prefix}{name}", x


def _items(tree: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        return tree.items()
    return ((str(i), x) for i, x in enumerate(tree))


def _replaced(tree: Any, name: str, x: Any) -> Any:
    """Return a copy of `tree` with the leaf `name` replaced by `x`."""
    outer, _, inner = name.partition(".")
    changed = {key: _replaced(item, inner, x) if key == outer and inner else
               x if key == outer else item for key, item in _items(tree)}
    return changed if isinstance(tree, Mapping) else type(tree)(changed.values())
