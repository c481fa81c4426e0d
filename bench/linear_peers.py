"""Lucidrains' linear attention, Performer, efficient attention and Linformer, as in `peers`.

His Performer adds 1e-4 to its features and 1e-6 to causal denominators, which is left out here, so
that its result is that of the formula. His causal linear attention has features of its own, and
shows a block of keys to no query of that block; his other one has the features of the "efficient"
rows. They are timed and compared with nothing.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable
from typing import Any

import numpy as np

from .calls import Inputs, Rival, torch_call, torch_tensors, torch_to_host
from .content_peers import load
from .linear import RANK, LinearRow
from .peers import by_head, replace, tokens

BLIND = 64
"""Tokens that his README takes for a block, as it saves most of the memory."""


def performer(row: LinearRow, inputs: Inputs, backward: bool) -> Rival:
    """FastAttention of performer-pytorch, with the row's directions."""
    import torch

    own = load("performer_pytorch.performer_pytorch", own=True)
    own.softmax_kernel = functools.partial(own.softmax_kernel, eps=0.0)
    own.causal_linear_attention_noncuda = functools.partial(own.causal_linear_attention_noncuda,
                                                            eps=0.0)
    *leaves, dout = torch_tensors(row, inputs)
    directions = row.projection()
    with contextlib.redirect_stdout(io.StringIO()):     # of CUDA code that is not there
        layer = own.FastAttention(row.width, nb_features=len(directions),
                                  causal=row.options.get("causal", False),
                                  generalized_attention=row.options.get("kernel") == "relu")
    layer.projection_matrix.copy_(torch.from_numpy(directions))
    return torch_call(lambda: layer(*leaves), leaves, dout, backward), torch_to_host


def efficient(row: LinearRow, inputs: Inputs, backward: bool) -> Rival:
    """linear_attn of linear-attention-transformer, which divides by the root of the width."""
    own = load("linear_attention_transformer.linear_attention_transformer")
    root = row.width**0.5
    *leaves, dout = torch_tensors(row, inputs)
    call = torch_call(lambda: own.linear_attn(*leaves), leaves, root * dout, backward)

    def host(result: tuple[Any, ...]) -> tuple[np.ndarray, ...]:
        out, *grads = torch_to_host(result)
        return root * out, *grads

    return call, host


def linear(row: LinearRow, inputs: Inputs, backward: bool) -> Rival:
    """Its layer's function, with features of its own."""
    own = load("linear_attention_transformer.linear_attention_transformer")
    *leaves, dout = torch_tensors(row, inputs)
    attend: Callable[..., Any] = own.linear_attn
    if row.options.get("causal"):
        attend = functools.partial(own.causal_linear_attn, bucket_size=BLIND)
    return torch_call(lambda: attend(*leaves), leaves, dout, backward), None


def linformer(row: LinearRow, inputs: Inputs, backward: bool) -> Rival:
    """LinformerSelfAttention of linformer."""
    import torch

    package = load("linformer.linformer")
    mixing = {name: inputs[name] for name in "ef"}
    attended = {name: x for name, x in inputs.items() if name not in mixing}
    layer = package.LinformerSelfAttention(row.heads * row.width, row.length, k=RANK,
                                           heads=row.heads)
    q, k, v, dout = tokens(row, attended)
    for name, x in zip(("proj_k", "proj_v"), mixing.values(), strict=True):
        setattr(layer, name, torch.nn.Parameter(torch.from_numpy(np.ascontiguousarray(x.T))))
    replace(layer, to_q=lambda x: x, to_k=lambda x: k, to_v=lambda x: v, to_out=lambda x: x)
    arranged = by_head(row)
    call = torch_call(lambda: layer(q), (q, k, v, layer.proj_k, layer.proj_v), dout, backward)

    def host(result: tuple[Any, ...]) -> tuple[np.ndarray, ...]:
        return *arranged(result[:4]), *(x.T for x in torch_to_host(result[4:]))

    return call, host


LINEAR_PEERS: dict[str, dict[str, Callable[..., Rival]]] = {
    "linear_attention": {"lucidrains": linear},
    "performer_attention": {"lucidrains": performer},
    "efficient_attention": {"lucidrains": efficient},
    "linformer_attention": {"lucidrains": linformer},
}
"""By variant, and by the package or its author."""
