"""From an engine's request to the kernel module that runs it, and why the others were passed over.

Backends are tried in the order written for the array library; the first whose kernel module does
not refuse the request is taken. Nothing is copied between host and device to make a backend fit.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

from . import arrays
from .checks import BackendError, OptionError

BACKENDS = ("cpu", "cuda", "numba_cuda", "array_api")
"""All backends, each a folder of `pyattn.kernels`."""

PREFERENCE = {"numpy": ("cpu", "array_api"), "cupy": ("cuda", "numba_cuda", "array_api")}
"""Backends by array library; a library that is not listed has `array_api` alone."""

ON_GPU = ("cuda", "numba_cuda")
"""Those that take arrays on a GPU, as CuPy's."""

_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("backend", default=None)
_recorders: contextvars.ContextVar[tuple[list[Choice], ...]] = contextvars.ContextVar(
    "recorders", default=())


@dataclasses.dataclass(frozen=True)
class Choice:
    """What dispatch decided for one engine."""

    engine: str
    library: str
    backend: str | None
    passed_over: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.engine} on {self.library} arrays: {self.backend or 'no backend'}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.passed_over.items()]
        return "\n".join(lines)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend inside a ``with`` block; a request that it refuses is a BackendError.

    Parameters
    ----------
    name : {"cpu", "cuda", "numba_cuda", "array_api"}

    Examples
    --------
    >>> import numpy as np, pyattn
    >>> x = np.ones((1, 4, 8), np.float32)
    >>> with pyattn.use_backend("array_api"):
    ...     pyattn.attention(x, x, x).shape
    (1, 4, 8)
    """
    if name not in BACKENDS:
        raise OptionError(f"backend must be one of {', '.join(BACKENDS)}; got {name!r}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def kernel(engine: str, problem: Any, array: Any) -> Any:
    """The kernel module that runs `problem` of `engine` for arrays like `array`."""
    found = arrays.library(array)
    arrays.require_current_device(array)
    candidates = PREFERENCE.get(found, ("array_api",))
    passed_over = {}
    forced = _forced.get()
    if forced is not None:
        if forced not in candidates:
            raise BackendError(_not_for(forced, found, candidates))
        passed_over = {name: f"{forced} is forced" for name in candidates if name != forced}
        candidates = (forced,)
    for name in candidates:
        reason = _requirements(name)(array)
        if reason is None:
            module, reason = _load(engine, name)
            if module is not None:
                reason = module.refuses(problem)
                if reason is None:
                    _record(engine, found, name, passed_over)
                    return module
        passed_over[name] = reason
    _record(engine, found, None, passed_over)
    reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over.items())
    raise BackendError(f"no backend can run {engine} on {found} arrays: {reasons}")


def _not_for(backend: str, library: str, candidates: tuple[str, ...]) -> str:
    """Say that a forced backend does not take arrays of `library`, and what would help."""
    if backend not in ON_GPU:
        return (f"backend {backend} does not take {library} arrays; "
                f"for these there is {', '.join(candidates)}")
    from .kernels.cuda.device import unavailable

    reason = unavailable()
    return (f"backend {backend} takes CuPy arrays; got {library} arrays, and for these there is "
            f"{', '.join(candidates)}" + (f". For CuPy arrays: {reason}" if reason else ""))


@functools.cache
def _load(engine: str, backend: str) -> tuple[Any, str]:
    name = f"pyattn.kernels.{backend}.{engine}"
    if importlib.util.find_spec(name) is None:
        return None, f"it has no kernel for {engine} yet"
    return importlib.import_module(name), ""


@functools.cache
def _requirements(backend: str) -> Callable[[Any], str | None]:
    """What tells which requirements a backend misses, a function that its package may have."""
    package = importlib.import_module(f"pyattn.kernels.{backend}")
    return getattr(package, "missing", lambda array: None)


def _record(engine: str, library: str, backend: str | None, passed_over: dict[str, str]) -> None:
    for recorder in _recorders.get():
        recorder.append(Choice(engine, library, backend, passed_over))


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Which backend ran each engine of a call, and why others did not; prints as text."""

    choices: tuple[Choice, ...]
    error: str | None = None

    def __str__(self) -> str:
        lines = [str(choice) for choice in self.choices]
        return "\n".join(lines + ([f"failed: {self.error}"] if self.error else []))

    __repr__ = __str__


def explain(operation: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Run ``operation(*args, **kwargs)`` and tell which backend took each part, and why.

    Parameters
    ----------
    operation : function
        Any of pyattn's, or one's own that calls them.
    *args, **kwargs
        Its arguments. The call is computed for real: what it returns is dropped.

    Returns
    -------
    Explanation
        Prints as a line for each engine that the call ran, and one for each backend passed over.
        A `BackendError` of the call is told, not raised.

    Examples
    --------
    >>> import numpy as np, pyattn
    >>> x = np.ones((1, 4, 8), np.float32)
    >>> pyattn.explain(pyattn.attention, x, x, x)
    softmax on numpy arrays: cpu
    """
    choices: list[Choice] = []
    token = _recorders.set((*_recorders.get(), choices))
    try:
        operation(*args, **kwargs)
    except BackendError as error:
        return Explanation(tuple(choices), str(error))
    finally:
        _recorders.reset(token)
    return Explanation(tuple(choices))
