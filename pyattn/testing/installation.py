"""Checks of this installation: every public function on every backend that can run here."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

import pyattn
from pyattn import arrays, dispatch, reference
from pyattn.checks import BackendError
from pyattn.engines.merge import merge
from pyattn.variants.attention import attention
from pyattn.variants.cross_modal import cross_modal_attention

from .cases import Case
from .check import check
from .compare import BACKWARD, FORWARD, compare, plain_dtype
from .gradcheck import gradcheck
from .report import ERROR, FAILED, OK, SKIPPED, CaseResult

LIBRARIES = ("array_api_strict", "torch", "jax")
"""Array libraries besides NumPy on which the array_api backend is checked, where installed."""

_HARD = ("two batch axes", "causal, more keys", "sinks and rows without keys", "packed sequences",
         "NaN that later queries see", "everything at once")
"""The cases of the quick set for dtypes and libraries that are not looked at in full."""


@dataclasses.dataclass(frozen=True)
class Task:
    """One function on one backend and array library."""

    function: str
    backend: str
    library: str
    run: Callable[[], list[CaseResult]]

    @property
    def subject(self) -> str:
        """What is checked, in words."""
        return f"{self.function} on {self.backend}, {self.library} arrays"

    def results(self) -> list[CaseResult]:
        """Run it; what goes wrong is a result too."""
        try:
            with dispatch.use_backend(self.backend):
                found = self.run()
        except (NotImplementedError, BackendError) as error:
            found = [CaseResult("all", "", SKIPPED, message=str(error))]
        except Exception as error:      # one broken function must not hide the others
            found = [CaseResult("all", "", ERROR, message=f"{type(error).__name__}: {error}")]
        return [dataclasses.replace(result, subject=self.subject) for result in found]


def tasks(thorough: bool = False) -> list[Task]:
    """List what there is to check; `thorough` takes every case in every dtype."""
    from . import on_gpu

    found = []
    for backend in dispatch.PREFERENCE["numpy"]:
        for name in (*pyattn.VARIANTS, "merge"):
            found.append(Task(name, backend, "numpy", _checker(name, thorough)))
        for name in pyattn.layers.__all__:
            if hasattr(getattr(pyattn.layers, name), "forward"):
                found.append(Task(f"layers.{name}", backend, "numpy",
                                  functools.partial(_gradients_of, _LAYERS, name)))
    for library in LIBRARIES:
        found.append(Task("attention", "array_api", library,
                          functools.partial(_other_library, library, thorough)))
    return found + on_gpu.tasks(thorough)


def _checker(name: str, thorough: bool) -> Callable[[], list[CaseResult]]:
    known: dict[str, Callable[[], list[CaseResult]]] = {
        "attention": functools.partial(_attention, thorough),
        "cross_modal_attention": functools.partial(_cross_modal, thorough), "merge": _merge}
    if name in _PATTERNS:
        return functools.partial(_pattern, thorough, name)
    return known.get(name, functools.partial(_gradients_of, _VARIANTS, name))


def _attention(thorough: bool) -> list[CaseResult]:
    if thorough:
        return list(check(attention, dtypes=arrays.FLOATS).results)
    return [*check(attention, cases="quick").results,
            *check(attention, cases=_HARD,
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
    cases: Any = None if thorough else _HARD
    if library == "jax":
        cases = _HARD if thorough else ("two batch axes", "causal, more keys")
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


_I, _J = np.arange(130)[:, None], np.arange(130)[None, :]
_DRAWN = np.stack([np.arange(9), (np.arange(9) * 2 + 1) % 9], axis=1)
"""For blocks of 16: every block's own number, and one other."""

_PATTERNS: dict[str, tuple[dict[str, Any], np.ndarray]] = {
    "sliding_window_attention": (
        {"window": 5, "dilation": 3}, (abs(_I - _J) <= 15) & ((_I - _J) % 3 == 0)),
    "local_attention_2d": (
        {"shape": (10, 13), "window": 2},
        (abs(_I // 13 - _J // 13) <= 2) & (abs(_I % 13 - _J % 13) <= 2)),
    "block_diagonal_attention": ({"block_size": 16}, _I // 16 == _J // 16),
    "blockbert_attention": (
        {"num_blocks": 2, "shifts": (0, 1, 0, 1)},
        (_I // 65 + np.array([0, 1, 0, 1])[:, None, None]) % 2 == _J // 65),
    "random_attention": (
        {"num_random": 1, "block_size": 16, "decisions": {"blocks": np.stack([_DRAWN] * 4)}},
        (_DRAWN[_I // 16] == (_J // 16)[..., None]).any(-1)),
    "bigbird_attention": (
        {"block_size": 16, "num_random": 0},
        (abs(_I // 16 - _J // 16) <= 1) | np.isin(_I // 16, (0, 8)) | np.isin(_J // 16, (0, 8))),
    "global_local_attention": (
        {"window": 4, "global_index": (0, 77)},
        (abs(_I - _J) <= 4) | np.isin(_I, (0, 77)) | np.isin(_J, (0, 77))),
    "sparse_transformer_attention": (
        {"stride": 8}, (_J <= _I) & ((_I - _J < 8) | ((_I - _J) % 8 == 0))),
    "temporal_attention": (
        {"frames": 10, "window": 3},
        (_I % 13 == _J % 13) & (abs(_I // 13 - _J // 13) <= 3)),
}
"""Options of variants, and the pairs that they then stand for."""


def _pattern(thorough: bool, name: str) -> list[CaseResult]:
    options, allowed = _PATTERNS[name]
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


Calls = dict[str, Callable[[Callable[..., np.ndarray]], tuple[tuple[Any, ...], dict[str, Any]]]]
"""Arguments to check an operation with, by its name, from a function that draws an array."""


def _gradients_of(calls: Calls, name: str) -> list[CaseResult]:
    if name not in calls:
        return [CaseResult("gradients", "float64", SKIPPED, message="no check is known for it")]
    rng = np.random.default_rng(0)
    arguments, options = calls[name](lambda *shape: rng.standard_normal(shape))
    operation = getattr(pyattn if name in pyattn.VARIANTS else pyattn.layers, name)
    result = gradcheck(operation, *arguments, raise_on_failure=False, **options)
    return [CaseResult("gradients", "float64", OK if result else FAILED,
                       message="" if result else str(result))]


def _block(draw: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    params = pyattn.layers.init_transformer_block(0, 8, num_heads=2, dtype=np.float64)
    return (draw(2, 5, 8), params), {"num_heads": 2, "norm": "post", "causal": True}


def _blocks(draw: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    blocks = [pyattn.layers.init_transformer_block(seed, 8, num_heads=2, dtype=np.float64)
              for seed in range(2)]
    return (draw(2, 5, 8), blocks), {"num_heads": 2, "causal": True}


def _vit(draw: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    params = pyattn.layers.init_vit(0, image=(4, 6), channels=2, patch=2, width=8, depth=1,
                                    num_heads=2, dtype=np.float64)
    return (draw(2, 4, 6, 2), params), {"patch": 2, "num_heads": 2}


def _language_model(draw: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    params = pyattn.layers.init_language_model(0, vocabulary=7, width=8, depth=1, num_heads=2,
                                               positions=6, dtype=np.float64)
    return (np.arange(10).reshape(2, 5) % 7, params), {"num_heads": 2}


def _swin_block(draw: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    params = pyattn.layers.init_swin_block(0, 4, num_heads=2, window=2, dtype=np.float64)
    return (draw(2, 3, 5, 4), params), {"num_heads": 2, "window": 2, "shift": 1}


def _swin(draw: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    params = pyattn.layers.init_swin(0, image=(8, 8), channels=1, patch=2, width=4, depths=(1, 1),
                                     num_heads=(1, 2), window=2, dtype=np.float64)
    return (draw(1, 8, 8, 1), params), {"patch": 2, "num_heads": (1, 2), "window": 2}


def _timesformer_block(draw: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    params = pyattn.layers.init_timesformer_block(0, 4, num_heads=2, dtype=np.float64)
    return (draw(2, 13, 4), params), {"frames": 3, "num_heads": 2}


def _ring(n: int) -> Any:
    import scipy.sparse

    return scipy.sparse.diags_array(np.ones((4, n)), offsets=[-1, 1, 1 - n, n - 1], shape=(n, n))


def _nsa(draw: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    gates = 1 / (1 + np.exp(-draw(2, 4, 26, 3)))
    return ((draw(2, 4, 26, 4), *(draw(2, 2, 26, 4) for _ in range(2)), gates,
             *(draw(2, 2, 26, 4) for _ in range(4))), _FEW_BLOCKS)


def _nsa_layer(draw: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    params = pyattn.layers.init_nsa_layer(0, 8, num_heads=4, num_kv_heads=2, block_size=4,
                                          compression="conv", dtype=np.float64)
    return (draw(2, 26, 8), params), {"num_heads": 4, "num_kv_heads": 2, "compression": "conv",
                                      **_FEW_BLOCKS}


def _gates(draw: Any) -> tuple[Any, ...]:
    return draw(2, 4, 3, 5), draw(4, 2), draw(2), draw(2, 4), draw(4)


def _dynamic_conv_layer(draw: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    params = pyattn.layers.init_dynamic_conv_layer(0, 8, num_heads=2, kernel_size=3,
                                                   dtype=np.float64)
    return (draw(2, 7, 8), params), {"num_heads": 2, "causal": True}


def _span_convolution(draw: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    params = pyattn.layers.init_span_convolution(0, 8, num_heads=2, head_width=3, kernel_size=3,
                                                 dtype=np.float64)
    return (draw(2, 7, 8), params), {"num_heads": 2}


def _hybrid_block(draw: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    params = pyattn.layers.init_hybrid_block(0, 8, kind="gru", num_heads=2, dtype=np.float64)
    return (draw(2, 7, 8), params), {"num_heads": 2, "kind": "gru"}


def _mixed_heads(draw: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    params = pyattn.layers.init_hybrid_block(0, 8, kind="parallel", num_heads=2, kernel_size=3,
                                             dtype=np.float64)["attention"]
    return (draw(2, 7, 8), params), {"num_heads": 2, "causal": True}


_FEW_BLOCKS = {"window": 3, "block_size": 4, "stride": 2, "select_block": 8, "num_selected": 3,
               "num_local": 1}

_VARIANTS: Calls = {
    "additive_attention": lambda draw: (
        (draw(2, 4, 13, 5), draw(2, 2, 15, 4), draw(2, 2, 15, 3), draw(5, 6), draw(2, 4, 6),
         draw(4, 6), draw(6)), {"causal": True}),
    "adaptive_span_attention": lambda draw: (
        (*(draw(2, 2, 13, 4) for _ in range(3)), abs(draw(2)) * 5), {"ramp": 3.0}),
    "axial_attention": lambda draw: (
        tuple(draw(2, 2, 15, 4) for _ in range(3)), {"shape": (3, 5)}),
    "bp_attention": lambda draw: (
        (*(draw(2, 2, 13, 4) for _ in range(3)), draw(10, 4)), {"step": 2, "causal": True}),
    "cbam": lambda draw: ((*_gates(draw), draw(2, 3, 3), draw(1), draw(1)), {}),
    "coarse_fine_attention": lambda draw: (
        tuple(draw(2, 2, 14, 4) for _ in range(3)), {"block_size": 4, "causal": True}),
    "efficient_attention": lambda draw: (
        (draw(2, 4, 13, 4), draw(2, 2, 17, 4), draw(2, 2, 17, 3)), {}),
    "dynamic_convolution": lambda draw: (
        (draw(2, 70, 4), draw(2, 70, 2, 5)), {"causal": True, "span": abs(draw(2)), "ramp": 2.0}),
    "dynamic_span_attention": lambda draw: (
        (*(draw(2, 2, 13, 4) for _ in range(3)), abs(draw(2, 2, 13)) * 5), {"ramp": 3.0}),
    "gat_attention": lambda draw: (
        (draw(2, 2, 12, 4), draw(2, 4), draw(2, 4), _ring(12)), {}),
    "gated_attention": lambda draw: (
        (*(draw(2, 2, 13, 4) for _ in range(3)), draw(2, 4, 4)),
        {"block_size": 4, "kind": "concrete", "rng": 0, "causal": True}),
    "graph_attention": lambda draw: (
        (*(draw(2, 2, 12, 4) for _ in range(3)), _ring(12), draw(3, 2)),
        {"edge_type": np.arange(24) % 3}),
    "linear_attention": lambda draw: (
        (draw(2, 4, 13, 4), draw(2, 2, 17, 4), draw(2, 2, 17, 3)), {"causal": True, "chunk": 4}),
    "linformer_attention": lambda draw: (
        (draw(2, 4, 13, 4), draw(2, 2, 17, 4), draw(2, 2, 17, 3), draw(4, 5, 20), draw(5, 20)), {}),
    "lightweight_convolution": lambda draw: ((draw(2, 70, 4), draw(2, 5)), {"causal": True}),
    "longformer_attention": lambda draw: (
        tuple(draw(2, 2, 12, 4) for _ in range(6)), {"window": 2, "global_index": (0, 7)}),
    "lsh_attention": lambda draw: (
        (draw(2, 2, 13, 4), draw(2, 2, 13, 4)),
        {"num_rounds": 2, "bucket_length": 3, "num_buckets": 4, "rng": 0, "causal": True}),
    "nsa_attention": _nsa,
    "performer_attention": lambda draw: (
        (draw(2, 4, 13, 4), draw(2, 2, 17, 4), draw(2, 2, 17, 3)), {"causal": True, "rng": 0}),
    "routing_attention": lambda draw: (
        (*(draw(2, 2, 13, 4) for _ in range(3)), draw(2, 3, 4)),
        {"cluster_size": 4, "causal": True}),
    "se_cbam": lambda draw: ((*_gates(draw), draw(2, 3, 3)), {}),
    "squeeze_excite": lambda draw: (_gates(draw), {}),
    "sparsebert_attention": lambda draw: (
        (*(draw(2, 2, 13, 4) for _ in range(3)), draw(2, 13, 2)),
        {"hard": False, "rng": 0, "causal": True}),
    "swin_attention": lambda draw: (
        (*(draw(2, 2, 30, 4) for _ in range(3)), draw(25, 2)),
        {"shape": (5, 6), "window": 3, "shift": 1}),
    "talking_heads_attention": lambda draw: (
        (draw(2, 4, 13, 4), draw(2, 2, 15, 4), draw(2, 1, 15, 3), draw(4, 3), draw(3, 2), draw(3),
         draw(2)), {"causal": True}),
    "top_k_attention": lambda draw: (
        tuple(draw(2, 2, 13, 4) for _ in range(3)), {"top": 3, "causal": True}),
}

_LAYERS: Calls = {
    "linear": lambda draw: ((draw(2, 3, 5), draw(5, 4), draw(4)), {}),
    "layer_norm": lambda draw: ((draw(2, 3, 8), draw(8), draw(8)), {}),
    "feed_forward": lambda draw: ((draw(2, 3, 5), draw(5, 9), draw(9), draw(9, 5), draw(5)), {}),
    "rotary": lambda draw: ((draw(2, 3, 7, 8),), {}),
    "add_positions": lambda draw: ((draw(2, 5, 8), draw(5, 8)), {}),
    "embedding": lambda draw: ((np.arange(10).reshape(2, 5) % 7, draw(7, 8)), {}),
    "cross_entropy": lambda draw: ((draw(2, 5, 7), np.arange(10).reshape(2, 5) % 7), {}),
    "patchify": lambda draw: ((draw(2, 4, 6, 3),), {"patch": 2}),
    "multi_head": lambda draw: (
        (draw(2, 5, 8), draw(8, 24), draw(8, 8), draw(24), draw(8)),
        {"num_heads": 2, "causal": True}),
    "cross_attention": lambda draw: (
        (draw(2, 5, 8), draw(2, 7, 6), draw(8, 8), draw(6, 16), draw(8, 8)), {"num_heads": 2}),
    "projected_attention": lambda draw: (
        (draw(2, 5, 8), draw(8, 8), draw(8, 8), draw(8, 8), draw(8, 8)), {"num_heads": 2}),
    "transformer_block": _block,
    "transformer": _blocks,
    "vit": _vit,
    "patch_merging": lambda draw: ((draw(2, 3, 4, 3), draw(12), draw(12), draw(12, 5)), {}),
    "swin_block": _swin_block,
    "swin": _swin,
    "timesformer_block": _timesformer_block,
    "language_model": _language_model,
    "nsa_layer": _nsa_layer,
    "conv1d": lambda draw: ((draw(2, 9, 4), draw(3, 4), draw(4)), {"causal": True}),
    "conv2d": lambda draw: ((draw(2, 3, 7, 6), draw(3, 3, 3, 4), draw(4)), {"stride": 2}),
    "dynamic_conv_layer": _dynamic_conv_layer,
    "span_convolution": _span_convolution,
    "gru": lambda draw: (
        (draw(2, 9, 4), draw(4, 9), draw(3, 9), draw(9), draw(9), draw(2, 3)), {}),
    "hybrid_block": _hybrid_block,
    "mixed_heads": _mixed_heads,
}
