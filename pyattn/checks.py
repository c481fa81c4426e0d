"""The error classes, and the wording of argument checks: the argument, the rule, what was given."""

from __future__ import annotations

import math
import operator
from typing import Any


class ShapeError(ValueError):
    """Shapes do not fit together."""


class DtypeError(TypeError):
    """An argument has a dtype, or is a kind of object, that the operation does not take."""


class OptionError(ValueError):
    """An option has a value outside its rule, or options contradict each other."""


class BackendError(RuntimeError):
    """No backend can run the request, or arrays live where they cannot be used together."""


def require_integer(name: str, value: Any, *, minimum: int | None = None) -> int:
    """Return `value` as an int, or raise OptionError."""
    try:
        integer = operator.index(value)
    except TypeError:
        raise OptionError(f"{name} must be an integer; got {value!r}") from None
    if minimum is not None and integer < minimum:
        raise OptionError(f"{name} must be at least {minimum}; got {integer}")
    return integer


def require_real(name: str, value: Any) -> float:
    """Return `value` as a finite float, or raise OptionError."""
    try:
        real = float(value)
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


def require_broadcast(name: str, shape: tuple[int, ...], target: tuple[int, ...],
                      axes: str) -> None:
    """Raise ShapeError unless `shape` broadcasts to exactly `target`, whose axes are `axes`."""
    if shape == target:
        return
    own = tuple(shape)[::-1]
    pairs = zip(own, tuple(target)[::-1], strict=False)
    if len(own) > len(target) or any(size not in (1, wanted) for size, wanted in pairs):
        raise ShapeError(f"{name} must broadcast to {axes} = {tuple(target)}; got {tuple(shape)}")
