"""Other packages' layers with a fixed pattern, made to attend to given queries, keys and values.

Their projections are replaced by functions that hand over what is given, so that nothing but
attention is timed: with what it does to arrange tokens, and without dropout. Inputs lie in the
layout that the projections would have left, and masks of padding are made before.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from .calls import Inputs, Rival, Unsupported, torch_call, torch_tensors, torch_to_host
from .rows import PatternRow, Row


def sliding_window(row: PatternRow, inputs: Inputs, backward: bool) -> Rival:
    """LocalAttention of lucidrains, with windows by tokens."""
    if "dilation" in row.options:
        raise Unsupported("it has no dilation")
    from local_attention import LocalAttention

    *leaves, dout = torch_tensors(row, inputs)
    causal = row.options.get("causal", False)
    attention = LocalAttention(
        window_size=row.options["window"], causal=causal, look_backward=1,
        look_forward=0 if causal else 1, exact_windowsize=True, use_rotary_pos_emb=False)
    return torch_call(lambda: attention(*leaves), leaves, dout, backward), torch_to_host


def longformer(row: PatternRow, inputs: Inputs, backward: bool) -> Rival:
    """LongformerSelfAttention of transformers."""
    import torch

    module = _model("longformer")
    layer = module.LongformerSelfAttention(
        module.LongformerConfig(
            hidden_size=row.heads * row.width, num_attention_heads=row.heads,
            attention_window=[2 * row.options["window"]], attention_probs_dropout_prob=0.0),
        layer_id=0)
    *leaves, dout = q, k, v, _ = tokens(row, inputs)
    # it lays tokens before the batch, and divides its projected queries in place
    replace(layer, query=torch.clone, query_global=torch.clone,
             **dict.fromkeys(("key", "key_global"), lambda x: k.transpose(0, 1)),
             **dict.fromkeys(("value", "value_global"), lambda x: v.transpose(0, 1)))
    held = torch.zeros(row.batch, row.length, dtype=torch.bool)
    held[:, row.options["global_index"]] = True
    marks = {"attention_mask": 10000.0 * held, "is_index_masked": torch.zeros_like(held),
             "is_index_global_attn": held, "is_global_attn": True}
    return torch_call(lambda: layer(q, **marks)[0], leaves, dout, backward), by_head(row)


def bigbird(row: PatternRow, inputs: Inputs, backward: bool) -> Rival:
    """BigBirdBlockSparseAttention of transformers, with the row's random blocks."""
    import torch

    module = _model("big_bird")
    size = row.options["block_size"]
    layer = module.BigBirdBlockSparseAttention(module.BigBirdConfig(
        hidden_size=row.heads * row.width, num_attention_heads=row.heads, block_size=size,
        num_random_blocks=row.options["num_random"], max_position_embeddings=row.length)).eval()
    *leaves, dout = q, k, v, _ = tokens(row, inputs)
    replace(layer, query=lambda x: x, key=lambda x: k, value=lambda x: v)
    # it has blocks for all rows but those of the first and the last, which are global
    blocks = list(row.blocks()[:, 1:-1])
    by_turns = itertools.cycle(blocks)
    # at some lengths it draws for one head after the other, at others for all
    layer._bigbird_block_rand_mask = lambda *_, **__: next(by_turns)
    layer._bigbird_block_rand_mask_with_head = lambda **_: blocks
    blocked, band, rows, columns = module.BigBirdModel.create_masks_for_block_sparse_attn(
        torch.ones(row.batch, row.length), size)
    return torch_call(lambda: layer(q, band, rows, columns, blocked, blocked)[0], leaves, dout,
                      backward), by_head(row)


def swin(row: PatternRow, inputs: Inputs, backward: bool) -> Rival:
    """SwinAttention of transformers, and its cutting into windows."""
    module = _model("swin")
    window, shape = row.options["window"], row.options["shape"]
    config = module.SwinConfig(window_size=window, attention_probs_dropout_prob=0.0)
    config._attn_implementation = "sdpa"
    layer = module.SwinAttention(config, row.heads * row.width, row.heads, window).eval()
    attended = {name: x for name, x in inputs.items() if name != "bias_table"}
    q, k, v, dout = tokens(row, attended)
    table = layer.relative_position_bias.relative_position_bias_table
    table.requires_grad_(False)
    [given] = torch_tensors(row, {"bias_table": inputs["bias_table"]})
    table.copy_(given)

    def cut(x: Any) -> Any:
        grid = x.view(row.batch, *shape, -1)
        return module.window_partition(grid, window).flatten(1, 2)

    def attend() -> Any:
        out = layer(cut(q))[0].unflatten(1, (window, window))
        return module.window_reverse(out, window, *shape).flatten(1, 2)

    replace(layer, q_proj=lambda x: x, k_proj=lambda x: cut(k), v_proj=lambda x: cut(v),
             o_proj=lambda x: x)
    arranged = by_head(row)

    def host(result: tuple[Any, ...]) -> tuple[np.ndarray, ...]:
        return (*arranged(result[:4]), *torch_to_host(result[4:]))

    return torch_call(attend, (q, k, v, table), dout, backward), host


def axial(row: PatternRow, inputs: Inputs, backward: bool) -> Rival:
    """AxialAttention of lucidrains, which adds up the axes."""
    import torch
    from axial_attention import AxialAttention

    shape = row.options["shape"]
    module = AxialAttention(row.heads * row.width, num_dimensions=2, heads=row.heads, dim_index=-1)
    q, k, v, dout = (x.unflatten(1, shape) for x in tokens(row, inputs))
    kv = torch.cat([k, v], dim=-1)
    for permuted in module.axial_attentions:

        def keys_and_values(x: Any, order: list[int] = permuted.permutation) -> Any:
            return kv.permute(order).contiguous().flatten(0, 1)

        replace(permuted.fn, to_q=lambda x: x, to_kv=keys_and_values, to_out=lambda x: x)
    arranged = by_head(row)

    def host(result: tuple[Any, ...]) -> tuple[np.ndarray, ...]:
        out, *grads = (x.flatten(1, 2) for x in result)
        halves = [half for x in grads[1:] for half in x.chunk(2, dim=-1)]
        return arranged((out, *grads[:1], *halves))

    return torch_call(lambda: module(q), (q, kv), dout, backward), host


def _model(name: str) -> Any:
    """The module of a model in transformers."""
    import importlib

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what its import warns of is its own affair
        return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def replace(layer: Any, **functions: Callable[[Any], Any]) -> None:
    """Put functions in the place of projections."""
    for name, function in functions.items():
        delattr(layer, name)
        setattr(layer, name, function)


def tokens(row: Row, inputs: Inputs) -> list[Any]:
    """The inputs as (B, N, H D), as projections leave them."""
    return [x.transpose(1, 2).flatten(2) for x in torch_tensors(row, inputs)]


def by_head(row: Row) -> Callable[[Any], tuple[np.ndarray, ...]]:
    """From that to (B, H, N, D), in NumPy."""
    return lambda result: tuple(x.reshape(*x.shape[:2], row.heads, row.width).swapaxes(1, 2)
                                for x in torch_to_host(result))


PEERS: dict[str, dict[str, Callable[..., Rival]]] = {
    "sliding_window_attention": {"lucidrains": sliding_window},
    "longformer_attention": {"transformers": longformer},
    "bigbird_attention": {"transformers": bigbird},
    "swin_attention": {"transformers": swin},
    "axial_attention": {"lucidrains": axial},
}
"""By variant, and by the package or its author."""
