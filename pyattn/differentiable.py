"""Forward and backward as a pair: ``forward`` returns ``(out, saved)``, and ``saved`` is data.

``saved`` is a frozen dataclass that names every array it keeps. It can be printed, sized, pickled,
moved to another array library and tested alone; ``saved.backward(dout)`` may be called again, and
writes to nothing that it holds.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import array_api_compat

from . import arrays
from .arrays import Array

P = ParamSpec("P")
Out = TypeVar("Out")
Out_co = TypeVar("Out_co", covariant=True)


class Operation(Protocol[P, Out_co]):
    """A function of arrays with a backward: ``op(...)`` or ``op.forward(...)``."""

    __name__: str

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Out_co:
        """Compute the output and keep nothing."""

    def forward(self, *args: P.args, **kwargs: P.kwargs) -> tuple[Out_co, Any]:
        """Compute the output and what its backward needs."""


def differentiable(forward: Callable[P, tuple[Out, Any]]) -> Operation[P, Out]:
    """Make a public operation from its forward: called plainly, it keeps nothing.

    Examples
    --------
    >>> import numpy as np, pyattn
    >>> q = k = v = np.eye(4, dtype=np.float32)[None]
    >>> out, saved = pyattn.attention.forward(q, k, v)
    >>> saved.backward(out)._fields
    ('q', 'k', 'v')
    """

    @functools.wraps(forward)
    def on_taken(*args: P.args, **kwargs: P.kwargs) -> tuple[Out, Any]:
        return forward(*arrays.taken(args), **arrays.taken(kwargs))

    @functools.wraps(forward)
    def operation(*args: P.args, **kwargs: P.kwargs) -> Out:
        return on_taken(*args, **kwargs)[0]

    operation.forward = on_taken  # type: ignore[attr-defined]  # a function may bear it
    return cast("Operation[P, Out]", operation)


@functools.cache
def gradients(names: tuple[str, ...]) -> type:
    """A NamedTuple type for the gradients of the arguments `names`, in that order."""
    return collections.namedtuple("Gradients", names)


ON_HOST = {"on_host": True}
"""Metadata of a field with decisions, which `Saved.to` leaves on the host."""


class Saved:
    """What a forward keeps for its backward. Subclasses are frozen dataclasses."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        own = cls.__dict__.get("backward")
        if own is not None:
            @functools.wraps(own)
            def backward(self: Any, *args: Any, **kwargs: Any) -> Any:
                return own(self, *arrays.taken(args), **arrays.taken(kwargs))

            cls.backward = backward  # type: ignore[attr-defined]  # subclasses declare it

    @property
    def decisions(self) -> dict[str, Array]:
        """Discrete choices of the forward, which may be passed back as ``decisions=``."""
        return {}

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays that are kept, those that the caller passed in included."""
        return sum(arrays.nbytes(x) for x in _arrays(self))

    def to(self, xp: Any) -> Any:
        """Return the same record with every array in namespace `xp` (a copy, asked for).

        Decisions stay on the host. `xp` is a module such as ``numpy``, ``torch`` or ``cupy``.
        """
        return _converted(self, xp)


def _fields(record: Any) -> list[tuple[str, Any]]:
    return [(field.name, getattr(record, field.name)) for field in dataclasses.fields(record)]


def _arrays(value: Any) -> list[Array]:
    if array_api_compat.is_array_api_obj(value):
        return [value]
    if isinstance(value, Saved):
        return [x for _, field in _fields(value) for x in _arrays(field)]
    if isinstance(value, dict):
        return [x for item in value.values() for x in _arrays(item)]
    if isinstance(value, tuple | list):
        return [x for item in value for x in _arrays(item)]
    return []


def _converted(value: Any, xp: Any) -> Any:
    if array_api_compat.is_array_api_obj(value):
        return arrays.from_host(xp, arrays.to_host(value))
    if isinstance(value, Saved):
        moved = {field.name: _converted(getattr(value, field.name), xp)
                 for field in dataclasses.fields(cast("Any", value))
                 if not field.metadata.get("on_host")}
        return dataclasses.replace(cast("Any", value), **moved)
    if isinstance(value, dict):
        return {name: _converted(item, xp) for name, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_converted(item, xp) for item in value)
    return value
