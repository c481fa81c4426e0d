"""Attention for plain arrays: every variant, forward and hand-written backward.

>>> import numpy as np, pyattn
>>> rng = np.random.default_rng(0)
>>> q, k, v = rng.standard_normal((3, 2, 8, 100, 64), dtype=np.float32)   # (B, H, N, D)
>>> out, saved = pyattn.attention.forward(q, k, v, causal=True)
>>> dq, dk, dv = saved.backward(np.ones_like(out))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from . import layers, masks, reference, testing
    from .checks import BackendError, DtypeError, OptionError, ShapeError
    from .config import show_config
    from .dispatch import explain, use_backend
    from .engines.merge import merge
    from .threads import get_num_threads, set_num_threads
    from .variants.adaptive_span import adaptive_span_attention
    from .variants.attention import attention
    from .variants.axial import axial_attention
    from .variants.bigbird import bigbird_attention
    from .variants.binary_partition import bp_attention
    from .variants.block_diagonal import block_diagonal_attention
    from .variants.blockbert import blockbert_attention
    from .variants.coarse_fine import coarse_fine_attention
    from .variants.cross_modal import cross_modal_attention
    from .variants.dynamic_span import dynamic_span_attention
    from .variants.gated import gated_attention
    from .variants.global_local import global_local_attention
    from .variants.graph import gat_attention, graph_attention
    from .variants.local_2d import local_attention_2d
    from .variants.longformer import longformer_attention
    from .variants.lsh import lsh_attention
    from .variants.nsa import nsa_attention
    from .variants.random_attention import random_attention
    from .variants.routing import routing_attention
    from .variants.sliding_window import sliding_window_attention
    from .variants.sparse_transformer import sparse_transformer_attention
    from .variants.sparsebert import sparsebert_attention
    from .variants.swin import swin_attention
    from .variants.temporal import temporal_attention
    from .variants.top_k import top_k_attention

VARIANTS = {
    "adaptive_span_attention": "variants.adaptive_span",
    "attention": "variants.attention",
    "axial_attention": "variants.axial",
    "bigbird_attention": "variants.bigbird",
    "block_diagonal_attention": "variants.block_diagonal",
    "blockbert_attention": "variants.blockbert",
    "bp_attention": "variants.binary_partition",
    "coarse_fine_attention": "variants.coarse_fine",
    "cross_modal_attention": "variants.cross_modal",
    "dynamic_span_attention": "variants.dynamic_span",
    "gat_attention": "variants.graph",
    "gated_attention": "variants.gated",
    "global_local_attention": "variants.global_local",
    "graph_attention": "variants.graph",
    "local_attention_2d": "variants.local_2d",
    "longformer_attention": "variants.longformer",
    "lsh_attention": "variants.lsh",
    "nsa_attention": "variants.nsa",
    "random_attention": "variants.random_attention",
    "routing_attention": "variants.routing",
    "sliding_window_attention": "variants.sliding_window",
    "sparse_transformer_attention": "variants.sparse_transformer",
    "sparsebert_attention": "variants.sparsebert",
    "swin_attention": "variants.swin",
    "temporal_attention": "variants.temporal",
    "top_k_attention": "variants.top_k",
}
"""The catalogue: every attention function and the module it is written in."""

_NAMES = {
    **VARIANTS,
    "merge": "engines.merge",
    "explain": "dispatch",
    "use_backend": "dispatch",
    "show_config": "config",
    "get_num_threads": "threads",
    "set_num_threads": "threads",
    "BackendError": "checks",
    "DtypeError": "checks",
    "OptionError": "checks",
    "ShapeError": "checks",
}
_MODULES = ("features", "layers", "masks", "reference", "testing")

__all__ = ["VARIANTS", "__version__", *_MODULES, *_NAMES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _NAMES:
        value = getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


def _find_kernels() -> None:
    """In a source checkout kernels/ is our sibling; installed, it is our subpackage."""
    import sys
    from importlib.util import module_from_spec, spec_from_file_location
    from pathlib import Path

    here = Path(__file__).resolve().parent
    sibling = here.parent / "kernels"
    name = f"{__name__}.kernels"
    if (here / "kernels").is_dir() or not (sibling / "__init__.py").is_file():
        return
    spec = spec_from_file_location(
        name, sibling / "__init__.py", submodule_search_locations=[str(sibling)])
    if spec is None or spec.loader is None:
        return
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    globals()["kernels"] = module


_find_kernels()
