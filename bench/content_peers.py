"""Other packages' layers that choose keys by what tokens hold.

They are given queries, keys and values as in `peers`. What they decide is replaced by what pyattn
decides after they have decided, so that their time has all that they do, and yet the same pairs
are attended to. Where a layer has rules of its own, it is timed and compared with nothing.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import types
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from .calls import Inputs, Rival, torch_call, torch_tensors, torch_to_host
from .content import ContentRow
from .peers import by_head, replace, tokens

ITSELF = -64.0
"""A token's score for itself, in place of -5e4 or -1e5: with these the float32 weights of one that
sees no other do not add up to 1."""

Host = Callable[[Any], tuple[np.ndarray, ...]]


def lucidrains_lsh(row: ContentRow, inputs: Inputs, backward: bool) -> Rival:
    """LSHAttention of reformer-pytorch, a head an item of its batch."""
    import torch

    module = load("reformer_pytorch.reformer_pytorch", own=True)
    module.TOKEN_SELF_ATTN_VALUE = ITSELF
    layer = module.LSHAttention(
        bucket_size=row.options["bucket_length"], n_hashes=row.options["num_rounds"],
        causal=row.options["causal"]).eval()
    qk, v, dout = (x.flatten(0, 1) for x in torch_tensors(row, inputs))
    # it divides scores by the root of the width
    root = row.width**0.5
    qk = qk * root
    buckets = torch.from_numpy(_numbered(row)).flatten(0, 1)
    layer.hash_vectors = _then(layer.hash_vectors, lambda: buckets)
    call = torch_call(lambda: layer(qk, v)[0], (qk, v), dout, backward)

    def host(result: tuple[Any, ...]) -> tuple[np.ndarray, ...]:
        out, *grads = (x.reshape(row.batch, row.heads, row.length, row.width)
                       for x in torch_to_host(result))
        return out, *(root * x for x in grads[:1]), *grads[1:]

    return call, _if_reference(row, host)


def transformers_lsh(row: ContentRow, inputs: Inputs, backward: bool) -> Rival:
    """LSHSelfAttention of transformers, Reformer's."""
    import torch

    module = load("transformers.models.reformer.modeling_reformer")
    rounds = row.options["num_rounds"]
    layer = module.LSHSelfAttention(module.ReformerConfig(
        hidden_size=row.heads * row.width, num_attention_heads=row.heads,
        attention_head_size=row.width, lsh_attn_chunk_length=row.options["bucket_length"],
        num_hashes=rounds, num_buckets=row.length // row.options["bucket_length"],
        is_decoder=row.options["causal"], lsh_attention_probs_dropout_prob=0.0),
        layer_idx=0).eval()
    *leaves, dout = qk, v, _ = tokens(row, inputs)
    layer.self_mask_value_float32.fill_(ITSELF)
    replace(layer, query_key=lambda x: x, value=lambda x: v)
    buckets = torch.from_numpy(_numbered(row))
    layer._hash_vectors = _then(layer._hash_vectors, lambda: buckets)
    return torch_call(lambda: layer(qk).hidden_states, leaves, dout, backward), _if_reference(
        row, by_head(row))


def lucidrains_routing(row: ContentRow, inputs: Inputs, backward: bool) -> Rival:
    """KmeansAttention of routing-transformer, whose centroids stay as they are."""
    import torch

    module = load("routing_transformer.routing_transformer", own=True)
    # it divides by 1e-5 more than it has added up
    module.scatter_mean = functools.partial(module.scatter_mean, eps=1e-30)
    # causal, it gives the mean of all values where it shows no key
    same = row.options.get("mode") == "top" and not row.options.get("causal")
    if same:
        lists = (torch.from_numpy(row.decisions[name].astype(np.int64)).flatten(2)
                 for name in ("clusters", "key_clusters"))
        by_turns = itertools.cycle(lists)
        module.distribution = _then(module.distribution, lambda: next(by_turns))
    centroids = row.arguments()["centroids"]
    layer = module.KmeansAttention(centroids.shape[1], row.options["cluster_size"], row.heads,
                                   row.width, causal=row.options.get("causal", False)).eval()
    layer.num_mem_kv = 0        # a key of its own for each cluster
    for name in ("mem_key", "mem_value"):
        none = torch.zeros(row.heads, centroids.shape[1], 0, row.width)
        setattr(layer, name, torch.nn.Parameter(none))
    layer.kmeans.means.copy_(torch.from_numpy(centroids))
    layer.kmeans.initted.fill_(True)
    q, k, v, dout = torch_tensors(row, inputs)

    def attend() -> Any:
        normal = (torch.nn.functional.layer_norm(x, (row.width,)) for x in (q, k))
        return layer(*normal, v)[0]

    return torch_call(attend, (q, k, v), dout, backward), (
        torch_to_host if same else None)


def lucidrains_nsa(row: ContentRow, inputs: Inputs, backward: bool) -> Rival:
    """SparseAttention of native-sparse-attention-pytorch, compressed by means.

    It has a learned compressed key besides, shows a block one token later, and lists neither the
    first block nor the last but one by rule.
    """
    import torch

    package = load("native_sparse_attention_pytorch")
    options = row.options

    class Mean(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x.mean(dim=-2)

    layer = package.SparseAttention(
        dim=row.heads * row.width, dim_head=row.width, heads=row.heads, kv_heads=row.groups,
        sliding_window_size=options["window"], compress_block_size=options["block_size"],
        compress_block_sliding_stride=options["stride"],
        selection_block_size=options["select_block"],
        num_selected_blocks=options["num_selected"] - 1, causal=True, norm=False,
        compress_mlp=Mean())
    *leaves, dout = torch_tensors(row, inputs)
    q, k, v, gates = leaves
    flat = torch.cat([x.transpose(1, 2).flatten(2) for x in (q, k, v)], dim=-1)
    replace(layer, to_qkv=lambda x: x, to_strategy_combine=lambda x: gates,
            combine_heads=lambda x: x)
    layer.rotary_emb.rotate_queries_with_cached_keys = lambda q, k: (q, k)
    return torch_call(lambda: layer(flat), (flat, gates), dout.transpose(1, 2).flatten(2),
                      backward), None


def load(name: str, *, own: bool = False) -> types.ModuleType:
    """A package's module without what its import warns of; `own` is a copy, to be changed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module(name)
        spec = module.__spec__
        if not own or spec is None or spec.loader is None:
            return module
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


def _if_reference(row: ContentRow, host: Host) -> Host | None:
    """`host` where the row is to have the original's pairs."""
    return host if row.options.get("reference") else None


def _numbered(row: ContentRow) -> np.ndarray:
    """The buckets that pyattn finds, (B, H, rounds * N), those of each round with own numbers."""
    buckets = row.decisions["buckets"].astype(np.int64)
    count = row.length // row.options["bucket_length"]
    return (buckets + count * np.arange(buckets.shape[-2])[:, None]).reshape(
        *buckets.shape[:2], -1)


def _then(decide: Callable[..., Any], given: Callable[[], Any]) -> Callable[..., Any]:
    """Decide, and return what is given instead."""

    def decided(*arguments: Any, **options: Any) -> Any:
        decide(*arguments, **options)
        return given()

    return decided


CONTENT_PEERS: dict[str, dict[str, Callable[..., Rival]]] = {
    "lsh_attention": {"lucidrains": lucidrains_lsh, "transformers": transformers_lsh},
    "routing_attention": {"lucidrains": lucidrains_routing},
    "nsa_attention": {"lucidrains": lucidrains_nsa},
}
"""By variant, and by the package or its author."""
