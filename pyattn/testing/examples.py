"""What operations are checked with: a call of each, and the pairs that patterns stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import pyattn

HARD = ("two batch axes", "causal, more keys", "sinks and rows without keys", "packed sequences",
         "NaN that later queries see", "everything at once")
"""The cases of the quick set for dtypes and libraries that are not looked at in full."""

Calls = dict[str, Callable[[Callable[..., np.ndarray]], tuple[tuple[Any, ...], dict[str, Any]]]]
"""Arguments to check an operation with, by its name, from a function that draws an array."""

_I, _J = np.arange(130)[:, None], np.arange(130)[None, :]
_DRAWN = np.stack([np.arange(9), (np.arange(9) * 2 + 1) % 9], axis=1)
"""For blocks of 16: every block's own number, and one other."""

PATTERNS: dict[str, tuple[dict[str, Any], np.ndarray]] = {
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

VARIANTS: Calls = {
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

LAYERS: Calls = {
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
