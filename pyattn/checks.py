"""The error classes, and the wording of argument checks: the argument, the rule, what was given."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np


class ShapeError(ValueError):
    """Shapes do not fit together."""


class DtypeError(TypeError):
    """An argument has a dtype, or is a kind of object, that the operation does not take."""


class OptionError(ValueError):
    """An option has a value outside its rule, or options contradict each other."""


class BackendError(RuntimeError):
    """No backend can run the request, or arrays live where they cannot be used together."""


def require_integer(name: str, value: Any, *, minimum: int | None = None) -> int:
    """Return `value` as an int (True is not 1 here), or raise OptionError."""
    try:
        if isinstance(value, bool):
            raise TypeError
        integer = operator.index(value)
    except TypeError:
        raise OptionError(f"{name} must be an integer; got {value!r}") from None
    if minimum is not None and integer < minimum:
        raise OptionError(f"{name} must be at least {minimum}; got {integer}")
    return integer


def require_real(name: str, value: Any) -> float:
    """Return `value` as a finite float (True and "1" are none), or raise OptionError."""
    try:
        if isinstance(value, bool | np.bool_ | str | bytes) or getattr(value, "ndim", 0) > 0:
            raise TypeError
        real = float(value)
    except OverflowError:
        raise OptionError(f"{name} must be finite in float64; got a larger integer") from None
    except (TypeError, ValueError):
        raise OptionError(f"{name} must be a real number; got {value!r}") from None
    if not math.isfinite(real):
        raise OptionError(f"{name} must be finite; got {real}")
    return real


def require_choice(name: str, value: Any, choices: tuple[Any, ...]) -> Any:
    """Return `value` if it is one of `choices` (True is not 1 here), or raise OptionError."""
    for choice in choices:
        if value is choice:
            return value
    if type(value).__module__ == "numpy" and not getattr(value, "ndim", 1):
        value = value.item()
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        wanted = ", ".join(map(repr, choices))
        raise OptionError(f"{name} must be one of {wanted}; got {value!r}")
    return value


def require_flag(name: str, value: Any) -> bool:
    """Return `value` if it is True or False, or raise OptionError."""
    return bool(require_choice(name, value, (False, True)))


def require_rng(rng: Any, name: str = "rng") -> np.random.Generator:
    """Return ``numpy.random.default_rng(rng)``, or raise OptionError."""
    try:
        if isinstance(rng, bool | np.bool_):
            raise TypeError
        return np.random.default_rng(rng)
    except (TypeError, ValueError):
        raise OptionError(f"{name} must be an int of at least 0, a numpy.random.Generator or None; "
                          f"got {rng!r}") from None


def require_decisions(decisions: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """Return a copy of `decisions`, {} for None; OptionError unless a dict of some of `names`."""
    if decisions is None:
        return {}
    if not isinstance(decisions, Mapping):
        raise OptionError(f"decisions must be a dict that may hold {', '.join(names)}; got "
                          f"{type(decisions).__name__}")
    unknown = sorted(str(name) for name in decisions if name not in names)
    if unknown:
        raise OptionError(f"decisions may hold {', '.join(names)}; got {', '.join(unknown)}")
    return dict(decisions)


def require_broadcast(name: str, shape: tuple[int, ...], target: tuple[int, ...],
                      axes: str) -> None:
    """Raise ShapeError unless `shape` broadcasts to exactly `target`, whose axes are `axes`."""
    if shape == target:
        return
    own = tuple(shape)[::-1]
    pairs = zip(own, tuple(target)[::-1], strict=False)
    if len(own) > len(target) or any(size not in (1, wanted) for size, wanted in pairs):
        raise ShapeError(f"{name} must broadcast to {axes} = {tuple(target)}; got {tuple(shape)}")
