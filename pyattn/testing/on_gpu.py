"""Checks of the backends that run on a GPU: attention by its cases, all else beside the host."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

import pyattn
from pyattn import arrays, dispatch
from pyattn.kernels.cuda.device import unavailable
from pyattn.variants.attention import attention

from .check import check
from .compare import plain_dtype
from .examples import HARD, LAYERS, PATTERNS, VARIANTS
from .report import FAILED, OK, SKIPPED, CaseResult
from .tasks import Task

To = Callable[[np.ndarray], Any]

TOLERANCE = {"float64": 1e-9, "float32": 5e-4, "bfloat16": 6e-2}
"""How far results may be from those of the host in float64, relative to the largest."""


def tasks(thorough: bool = False) -> list[Task]:
    """List what there is to check on this machine's GPU; where there is none, say so."""
    reason = unavailable()
    if reason is not None:
        return [Task("attention", backend, "cupy", functools.partial(_skipped, reason))
                for backend in dispatch.ON_GPU]
    import cupy

    return [task for backend in dispatch.PREFERENCE["cupy"]
            for task in tasks_of(backend, "cupy", cupy.asarray, thorough)]


def tasks_of(backend: str, library: str, to: To, thorough: bool = False) -> list[Task]:
    """List what there is to check on arrays that `to` makes of NumPy's."""
    found = [Task("attention", backend, library,
                  functools.partial(_attention, backend, to, thorough))]
    for name in pyattn.VARIANTS:
        if name in VARIANTS or name in PATTERNS:
            found.append(Task(name, backend, library, functools.partial(_like_the_host, name, to)))
    if backend == "array_api":
        found += [Task(f"layers.{name}", backend, library,
                       functools.partial(_like_the_host, name, to)) for name in LAYERS]
    return found


def _skipped(reason: str) -> list[CaseResult]:
    return [CaseResult("all", "", SKIPPED, message=reason)]


def _attention(backend: str, to: To, thorough: bool) -> list[CaseResult]:
    """Every dtype that the backend has, by the table of cases."""
    cases = None if thorough else "quick" if backend == "cuda" else HARD
    # Numba has no bfloat16
    dtypes = [name for name in arrays.FLOATS if (backend, name) != ("numba_cuda", "bfloat16")]
    return list(check(attention, cases=cases, dtypes=dtypes, to=to).results)


def _like_the_host(name: str, to: To) -> list[CaseResult]:
    """Compare output and gradients with those of NumPy arrays in float64."""
    operation: Any = getattr(pyattn if name in pyattn.VARIANTS else pyattn.layers, name)
    results = []
    # layers are array operations around attention, which is looked at in every dtype by itself
    dtypes = TOLERANCE if name in pyattn.VARIANTS else {"float64": TOLERANCE["float64"]}
    for dtype, tolerance in dtypes.items():
        args, options = _arguments(name)
        args, options = _cast(args, dtype), _cast(options, dtype)
        with dispatch.use_backend("array_api"):
            want, decisions = _both_ways(operation, _cast(args, "float64"),
                                         _cast(options, "float64"), dtype, np.asarray)
        if decisions and "decisions" in inspect.signature(operation).parameters:
            options["decisions"] = decisions
        got, _ = _both_ways(operation, _moved(args, to), _moved(options, to), dtype, to)
        error = _difference([arrays.to_host(x) for x in _leaves(got)], _leaves(want))
        results.append(CaseResult("output and gradients", dtype, OK if error <= tolerance else
                                  FAILED, message="" if error <= tolerance else
                                  f"off by {error:.1e} of the largest, {tolerance:.0e} is allowed"))
    return results


def _arguments(name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    rng = np.random.default_rng(0)
    if name in PATTERNS:
        options, allowed = PATTERNS[name]
        n = allowed.shape[-1]
        return tuple(rng.standard_normal((2, heads, n, 32)) for heads in (4, 2, 2)), dict(options)
    calls = VARIANTS if name in VARIANTS else LAYERS
    return calls[name](lambda *shape: rng.standard_normal(shape))


def _both_ways(operation: Any, args: tuple[Any, ...], options: dict[str, Any], dtype: str,
               to: To) -> tuple[list[Any], dict[str, Any]]:
    """Output and gradients for drawn gradients of the output, and what was decided."""
    out, saved = operation.forward(*args, **options)
    rng = np.random.default_rng(1)
    pulls = []
    for x in out if isinstance(out, tuple) else (out,):
        pull = rng.standard_normal(x.shape).astype(plain_dtype(dtype))
        pulls.append(to(pull.astype(plain_dtype(arrays.dtype_name(x)))))
    given = len(inspect.signature(saved.backward).parameters)
    return [out, saved.backward(*pulls[:given])], dict(getattr(saved, "decisions", {}))


def _leaves(x: Any) -> list[Any]:
    if isinstance(x, dict):
        return [leaf for value in x.values() for leaf in _leaves(value)]
    if isinstance(x, tuple | list):
        return [leaf for value in x for leaf in _leaves(value)]
    return [] if x is None else [x]


def _mapped(x: Any, change: Callable[[np.ndarray], Any]) -> Any:
    """Change the arrays of floats, in any containers."""
    if isinstance(x, np.ndarray):
        return change(x) if arrays.dtype_name(x) in arrays.FLOATS else x
    if isinstance(x, dict):
        return {name: _mapped(value, change) for name, value in x.items()}
    if type(x) in (tuple, list):
        return type(x)(_mapped(value, change) for value in x)
    return x


def _cast(x: Any, dtype: str) -> Any:
    return _mapped(x, lambda array: array.astype(plain_dtype(dtype)))


def _moved(x: Any, to: To) -> Any:
    def device(array: Any) -> Any:
        return to(array)

    # tokens and labels are arguments too, decisions and what describes graphs are not
    if isinstance(x, tuple):
        return tuple(to(item) if isinstance(item, np.ndarray) else _mapped(item, device)
                     for item in x)
    return {name: value if name == "decisions" else _mapped(value, device)
            for name, value in x.items()}


def _difference(got: list[np.ndarray], want: list[np.ndarray]) -> float:
    """The largest difference, relative to the largest value of its array.

    An array that is next to nothing beside the others (as a gradient that cancels) counts as a
    thousandth of them.
    """
    largest = [float(abs(x[np.isfinite(x)]).max(initial=0.0)) for x in want]
    least = max(1e-3 * max(largest, default=0.0), 1e-300)
    worst = 0.0
    for a, b, scale in zip(got, want, largest, strict=True):
        a, b = a.astype(np.float64), b.astype(np.float64)
        with np.errstate(invalid="ignore"):     # inf - inf, which is right
            apart = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, abs(a - b))
        worst = max(worst, float(np.nan_to_num(apart, nan=np.inf).max(initial=0.0))
                    / max(scale, least))
    return worst
