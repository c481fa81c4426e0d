"""Run a kernel over the table of cases and judge everything that it returns."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from pyattn import arrays, reference
from pyattn.checks import BackendError, OptionError, require_choice

from . import cases as table
from .cases import Case, Inputs
from .compare import BACKWARD, FORWARD, Comparison, compare, ulp
from .hints import hint
from .report import ERROR, FAILED, OK, SKIPPED, CaseResult, Report

GRADIENTS = ("q", "k", "v", "bias", "gate", "scale", "sinks", "alibi_slopes")
_PER_HEAD = ("scale", "sinks", "alibi_slopes")


def check(candidate: Any, kind: str = "attention", *, backward: Callable[..., Any] | None = None,
          cases: str | Case | Iterable[str | Case] | None = None,
          dtypes: Iterable[str] = ("float32",), to: Callable[[np.ndarray], Any] | None = None,
          seed: int = 0, name: str | None = None,
          advance: Callable[[str], None] | None = None) -> Report:
    """Check a kernel on small problems of the kinds that kernels get wrong.

    An error is at most twice that of a plain implementation in the same dtype (a gradient's three
    times), plus 2 ulp; see `compare`. Inputs must come back unchanged. Where a known mistake
    explains a wrong array, the report says which.

    Parameters
    ----------
    candidate : callable, or an object with ``forward``
        ``candidate(q, k, v, **options)`` returns ``out`` or ``(out, lse)``; ``candidate.forward``
        returns ``(out, saved)`` or ``((out, lse), saved)``, and ``saved.backward(dout[, dlse])``
        the gradients. A case whose options it does not take, or for which it raises
        NotImplementedError, is skipped. Options are those of `pyattn.attention`, masks are boolean
        arrays, and only what a case needs is passed.
    kind : {"attention"}
        What it is to compute.
    backward : callable, optional
        ``backward(q, k, v, out, lse, dout, **options)`` returns ``(dq, dk, dv)`` or a mapping;
        `lse` is what the forward gave, or None.
    cases : str, Case, or several, optional
        ``"quick"``, or names, patterns or families of `testing.cases`; all of them if None.
    dtypes : names of dtypes
        Of "float16", "bfloat16", "float32", "float64".
    to : callable, optional
        Makes the candidate's arrays from NumPy's, such as ``cupy.asarray``.
    seed : int
        For the arrays' values.
    name : str, optional
        The candidate's, for the report.
    advance : callable, optional
        Called with a case's name before it runs.

    Returns
    -------
    Report
        True if all passed; print it, or ``report.to_html(path)``.

    Examples
    --------
    >>> import numpy as np
    >>> from pyattn.testing import check
    >>> def attention(q, k, v):
    ...     s = q @ np.swapaxes(k, -1, -2)              # the scale was forgotten
    ...     p = np.exp(s - s.max(-1, keepdims=True))
    ...     return p @ v / p.sum(-1, keepdims=True)
    >>> report = check(attention, cases="65 x 65")
    >>> report.passed, report.failures[0].hint
    (False, 'the scale is missing')
    """
    require_choice("kind", kind, ("attention",))
    name = str(name or getattr(candidate, "__name__", type(candidate).__name__))
    results = []
    for dtype in dtypes:
        require_choice("dtypes", dtype, arrays.FLOATS)
        for case in table.select(cases):
            if advance is not None:
                advance(f"{case.name} ({dtype})")
            result = _run(_Kernel.of(candidate, backward, to), case, dtype, seed)
            results.append(dataclasses.replace(result, subject=name))
    return Report(f"{name} against pyattn.reference", tuple(results))


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """The candidate, whichever way it was written."""

    call: Callable[..., Any]
    backward: Callable[..., Any] | None
    to: Callable[[np.ndarray], Any]
    paired: bool
    """Whether `call` is a forward that returns what a backward needs."""
    takes: frozenset[str] | None
    """Names of keywords; None if it takes any."""

    @classmethod
    def of(cls, candidate: Any, backward: Any, to: Any) -> _Kernel:
        paired = callable(getattr(candidate, "forward", None)) and backward is None
        call = candidate.forward if paired else candidate
        if not callable(call):
            raise OptionError(f"candidate must be callable or have .forward; got {candidate!r}")
        takes = None
        try:
            parameters = list(inspect.signature(call).parameters.values())
        except (TypeError, ValueError):     # written in C, and does not tell
            parameters = []
        if parameters and all(p.kind is not p.VAR_KEYWORD for p in parameters):
            takes = frozenset(p.name for p in parameters)
        return cls(call, backward, to or (lambda x: x), paired, takes)

    def refuses(self, options: Mapping[str, Any]) -> str:
        missing = [] if self.takes is None else sorted(set(options) - self.takes)
        return f"it does not take {', '.join(missing)}" if missing else ""

    def run(self, inputs: Inputs) -> tuple[dict[str, Any], bool]:
        """All arrays that it returns by name, and whether lse was among its outputs."""
        options = {name: self.to(x) if isinstance(x, np.ndarray) and x.dtype.kind in "fb" else x
                   for name, x in inputs.options.items()}
        q, k, v, dout = (self.to(np.asarray(x)) for x in (inputs.q, inputs.k, inputs.v,
                                                          inputs.dout))
        keyword = {"return_lse": True} if self.takes and "return_lse" in self.takes else {}
        result = self.call(q, k, v, **options, **keyword)
        saved = None
        if self.paired:
            result, saved = result
        out, lse = result if isinstance(result, tuple) else (result, None)
        found = {"out": out} | ({} if lse is None else {"lse": lse})
        if saved is not None:
            given = [] if lse is None or inputs.dlse is None else [self.to(inputs.dlse)]
            found |= _gradients(saved.backward(dout, *given))
        elif self.backward is not None:
            found |= _gradients(self.backward(q, k, v, out, lse, dout, **options))
        return found, saved is not None and lse is not None


def _gradients(result: Any) -> dict[str, Any]:
    if hasattr(result, "_asdict"):
        result = result._asdict()
    if not isinstance(result, Mapping):
        result = dict(zip(("q", "k", "v"), result, strict=True))
    return {name if name.startswith("d") else f"d{name}": x for name, x in result.items()}


def _run(kernel: _Kernel, case: Case, dtype: str, seed: int) -> CaseResult:
    inputs = case.inputs(dtype, seed)
    refusal = kernel.refuses(inputs.options)
    if refusal:
        return CaseResult(case.name, dtype, SKIPPED, message=refusal)
    try:
        found, with_lse = kernel.run(inputs)
    except (NotImplementedError, BackendError) as error:
        return CaseResult(case.name, dtype, SKIPPED, message=str(error) or type(error).__name__)
    except Exception as error:      # whatever a kernel under test raises is its result
        return CaseResult(case.name, dtype, ERROR, message=f"{type(error).__name__}: {error}")
    changed = _changed(inputs, case.inputs(dtype, seed))
    comparisons, words = judge(found, inputs, _answers(case, dtype, seed, with_lse))
    status = OK if all(comparisons) and not changed else FAILED
    return CaseResult(case.name, dtype, status, comparisons, words, changed)


def _changed(inputs: Inputs, before: Inputs) -> str:
    names = [name for name in ("q", "k", "v", "dout")
             if getattr(inputs, name).tobytes() != getattr(before, name).tobytes()]
    names += [name for name, x in inputs.options.items() if isinstance(x, np.ndarray)
              and x.tobytes() != before.options[name].tobytes()]
    return f"it wrote to its input {', '.join(names)}" if names else ""


@dataclasses.dataclass(frozen=True)
class Answers:
    """What is right, and in what unit errors are measured; arrays by name."""

    exact: dict[str, np.ndarray]
    plain: dict[str, np.ndarray]
    unit: dict[str, float]
    """See `compare`."""
    floor: dict[str, float]


@functools.lru_cache(maxsize=512)
def _answers(case: Case, dtype: str, seed: int, with_lse: bool) -> Answers:
    inputs = case.inputs(dtype, seed)
    return answers(inputs if with_lse else dataclasses.replace(inputs, dlse=None))


def answers(inputs: Inputs, advance: Callable[[str], None] = lambda text: None) -> Answers:
    """Find what is right for `inputs`, and what a plain implementation in their dtype gives.

    The latter is evaluated in three orders of summation: one evaluation may be lucky.
    """
    dtype = inputs.q.dtype
    judge = reference.LONGDOUBLE if dtype == np.float64 else reference.FLOAT64
    exact, right = _evaluated(inputs, judge)
    advance("exact formulas")
    plain: dict[str, np.ndarray] = {}
    units = dict.fromkeys(exact, 0.0)
    for order in (2, 1, 0):
        plain, terms = _evaluated(inputs, reference.plain(dtype, order))
        for name, x in plain.items():
            units[name] = max(units[name], _most(_error(x, exact[name])))
        for name in set(terms) - {"pull", "push"}:
            shape = np.shape(inputs.options[name])
            if name in _PER_HEAD:       # (H,): its terms have the axes (..., H, N[, M])
                shape = (*shape, 1) if name == "sinks" else (*shape, 1, 1)
            units[f"d{name}"] = max(units[f"d{name}"], _rounding(right[name], terms[name], shape))
        advance("plain formulas")

    queries, keys, scale = _most(inputs.q), _most(inputs.k), _scale(inputs)
    sizes = {"lse": queries * keys * scale}
    if right:
        pull = _most(right["pull"])
        sizes |= {"dq": pull * keys * scale, "dk": pull * queries * scale,
                  "dv": _most(right["push"]), "dbias": pull}
    sums = reference.plain(dtype).sums
    return Answers(exact, plain, units, {name: 2 * ulp(size, sums) for name, size in sizes.items()})


def _evaluated(inputs: Inputs, precision: reference.Precision) -> tuple[dict[str, np.ndarray],
                                                                       dict[str, np.ndarray]]:
    """Everything that `inputs` lead to, and the terms of the gradients that are long sums."""
    given = {"q": inputs.q, "k": inputs.k, "v": inputs.v, **inputs.options}
    out, lse = reference.attention(**given, precision=precision)
    if inputs.dout is None:
        return {"out": out, "lse": lse}, {}
    grads, terms = reference.attention_backward(
        **given, dout=inputs.dout, dlse=inputs.dlse, precision=precision, return_terms=True)
    return {"out": out, "lse": lse} | {f"d{name}": x for name, x in grads.items()}, terms


def _rounding(right: np.ndarray, plain: np.ndarray, shape: tuple[int, ...]) -> float:
    """Error of the sums down to `shape` of plain terms, as if each were wrong by itself."""
    square = np.square(_error(plain, right))
    shape = (1,) * (right.ndim - len(shape)) + shape
    summed = square.sum(tuple(axis for axis, size in enumerate(shape) if size == 1))
    return float(np.sqrt(_most(summed)))


def _error(plain: np.ndarray, right: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        error = plain.astype(right.dtype) - right
    return np.where(np.isfinite(error), error, 0)


def _most(x: np.ndarray) -> float:
    """Return the largest absolute value that is finite."""
    x = x.astype(np.float64)
    return float(abs(x).max(initial=0, where=np.isfinite(x)))


def _scale(inputs: Inputs) -> float:
    scale = inputs.options.get("scale")
    return _most(np.asarray(inputs.q.shape[-1] ** -0.5 if scale is None else scale))


def judge(found: Mapping[str, Any], inputs: Inputs,
          right: Answers) -> tuple[tuple[Comparison, ...], str]:
    """Compare every array that was `found`; the hint is about the first that is wrong."""
    unknown = sorted(set(found) - set(right.exact))
    if unknown:
        raise OptionError(f"there is no right answer for {', '.join(unknown)}; there is one for "
                          f"{', '.join(right.exact)}")
    comparisons, words = [], ""
    for name in (x for x in right.exact if x in found):
        comparison = compare(
            found[name], right.exact[name], right.plain[name], name=name,
            factor=FORWARD if name in ("out", "lse") else BACKWARD,
            axes=1 if name.removeprefix("d") in ("lse", *_PER_HEAD) else 2,
            unit=right.unit.get(name, 0.0), floor=right.floor.get(name, 0.0))
        # an error of a few times the bound is rounding, and no mistake in a formula explains it
        gross = not comparison.parity or comparison.error > 4 * comparison.bound
        if not comparison and gross and not words:
            words = hint(name, found[name], inputs, right.exact)
        comparisons.append(comparison)
    return tuple(comparisons), words
