"""Checks of this installation: every public function on every backend that can run here."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

import pyattn
from pyattn import arrays, dispatch, reference
from pyattn.engines.merge import merge
from pyattn.variants.attention import attention
from pyattn.variants.cross_modal import cross_modal_attention

from . import on_gpu
from .cases import Case
from .check import check
from .compare import BACKWARD, FORWARD, compare, plain_dtype
from .examples import HARD, LAYERS, PATTERNS, VARIANTS, Calls
from .gradcheck import gradcheck
from .report import FAILED, OK, SKIPPED, CaseResult
from .tasks import Task

LIBRARIES = ("array_api_strict", "torch", "jax")
"""Array libraries besides NumPy on which the array_api backend is checked, where installed."""


def tasks(thorough: bool = False) -> list[Task]:
    """List what there is to check; `thorough` takes every case in every dtype."""
    found = []
    for backend in dispatch.PREFERENCE["numpy"]:
        for name in (*pyattn.VARIANTS, "merge"):
            found.append(Task(name, backend, "numpy", _checker(name, thorough)))
        for name in pyattn.layers.__all__:
            if hasattr(getattr(pyattn.layers, name), "forward"):
                found.append(Task(f"layers.{name}", backend, "numpy",
                                  functools.partial(_gradients_of, LAYERS, name)))
    for library in LIBRARIES:
        found.append(Task("attention", "array_api", library,
                          functools.partial(_other_library, library, thorough)))
    return found + on_gpu.tasks(thorough)


def _checker(name: str, thorough: bool) -> Callable[[], list[CaseResult]]:
    known: dict[str, Callable[[], list[CaseResult]]] = {
        "attention": functools.partial(_attention, thorough),
        "cross_modal_attention": functools.partial(_cross_modal, thorough), "merge": _merge}
    if name in PATTERNS:
        return functools.partial(_pattern, thorough, name)
    return known.get(name, functools.partial(_gradients_of, VARIANTS, name))


def _attention(thorough: bool) -> list[CaseResult]:
    if thorough:
        return list(check(attention, dtypes=arrays.FLOATS).results)
    return [*check(attention, cases="quick").results,
            *check(attention, cases=HARD,
                   dtypes=("bfloat16", "float16", "float64")).results]


def _other_library(library: str, thorough: bool) -> list[CaseResult]:
    if importlib.util.find_spec(library) is None:
        return [CaseResult("all", "", SKIPPED, message="not installed")]
    xp: Any = importlib.import_module("jax.numpy" if library == "jax" else library)

    def to(x: np.ndarray) -> Any:
        # contiguous, because torch takes no negative strides
        return arrays.from_host(xp, np.ascontiguousarray(x).reshape(x.shape).copy())

    # JAX's default has no float64, the strict namespace no half precision
    dtypes = {"array_api_strict": ("float64", "float32"), "torch": ("bfloat16", "float32"),
              "jax": ("float32",)}[library]
    # JAX compiles every operation for every shape
    cases: Any = None if thorough else HARD
    if library == "jax":
        cases = HARD if thorough else ("two batch axes", "causal, more keys")
    return list(check(attention, cases=cases, to=to, dtypes=dtypes).results)


def _cross_modal(thorough: bool) -> list[CaseResult]:
    words, patches = 30, 40
    modality = np.arange(words + patches) >= words
    results: list[CaseResult] = []
    for interactive in (False, True):
        allowed = (modality[:, None] != modality) | (not interactive)
        options = {"modality_lengths": (words, patches), "interactive": interactive}
        results += _masked("interactive" if interactive else "joint", cross_modal_attention,
                           allowed, options, thorough)
    return results


def _masked(case: str, variant: Any, allowed: np.ndarray, options: dict[str, Any],
            thorough: bool) -> list[CaseResult]:
    """Compare a variant with attention over the pairs that it stands for."""
    def forward(q: Any, k: Any, v: Any, *, mask: Any, return_lse: bool = False) -> Any:
        return variant.forward(q, k, v, return_lse=return_lse, **options)

    problem = Case(case, variant.__name__, n=allowed.shape[-1], m=allowed.shape[-1], heads=4,
                   kv_heads=2, options={"mask": allowed}, dlse=True)
    report = check(SimpleNamespace(forward=forward), cases=problem, name=variant.__name__,
                   dtypes=arrays.FLOATS if thorough else ("float32",))
    return list(report.results)


def _pattern(thorough: bool, name: str) -> list[CaseResult]:
    options, allowed = PATTERNS[name]
    return _masked("130 tokens", getattr(pyattn, name), allowed, options, thorough)


def _merge() -> list[CaseResult]:
    results = []
    for dtype in arrays.FLOATS:
        rng = np.random.default_rng(0)
        wide = np.dtype("float64" if dtype == "float64" else "float32")
        out_a, out_b, dout = (rng.standard_normal((2, 3, 70, 16)).astype(plain_dtype(dtype))
                              for _ in range(3))
        lse_a, lse_b, dlse = (rng.standard_normal((2, 3, 70)).astype(wide) for _ in range(3))
        out_a[0, 0, 5], lse_a[0, 0, 5] = np.nan, -np.inf
        given = (out_a, lse_a, out_b, lse_b)
        out, saved = merge.forward(*given)
        found = {"out": out[0], "lse": out[1], **saved.backward(dout, dlse)._asdict()}
        judge = reference.LONGDOUBLE if dtype == "float64" else reference.FLOAT64
        right = []
        for precision in (judge, reference.plain(dtype)):
            merged = reference.merge(*given, precision=precision)
            right.append(dict(zip(("out", "lse"), merged, strict=True))
                         | reference.merge_backward(*given, dout, dlse, precision=precision))
        comparisons = tuple(
            compare(found[name], exact, right[1][name], name=name,
                    factor=FORWARD if name in ("out", "lse") else BACKWARD,
                    axes=1 if "lse" in name else 2) for name, exact in right[0].items())
        results.append(CaseResult("two parts, one of them empty in a row", dtype,
                                  OK if all(comparisons) else FAILED, comparisons))
    return results


def _gradients_of(calls: Calls, name: str) -> list[CaseResult]:
    if name not in calls:
        return [CaseResult("gradients", "float64", SKIPPED, message="no check is known for it")]
    rng = np.random.default_rng(0)
    arguments, options = calls[name](lambda *shape: rng.standard_normal(shape))
    operation = getattr(pyattn if name in pyattn.VARIANTS else pyattn.layers, name)
    result = gradcheck(operation, *arguments, raise_on_failure=False, **options)
    return [CaseResult("gradients", "float64", OK if result else FAILED,
                       message="" if result else str(result))]
