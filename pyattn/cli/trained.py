"""Variants whose arguments are not q, k and v, in the form in which the demo's model has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

import pyattn
from pyattn import layers
from pyattn.arrays import Array
from pyattn.differentiable import Saved, differentiable, gradients
from pyattn.features import standardise, update_centroids

DECAY = 0.9
"""Of the centroids: a short training has few steps."""

CLUSTERS = 8

MAX_SPAN = 128.0
"""Tokens."""

FIRST_SHARE = 0.25
"""Of the longest span, where spans start."""


@dataclasses.dataclass(frozen=True)
class LshHeadsSaved(Saved):
    """The attention's record, and the keys that it did without."""

    attended: Any
    k: Array

    @property
    def decisions(self) -> dict[str, Array]:
        """The attention's."""
        return self.attended.decisions

    def backward(self, dout: Array) -> Any:
        """Gradients of q, k and v, that of k zeros."""
        dqk, dv = self.attended.backward(dout)
        return gradients(("q", "k", "v"))(dqk, np.zeros_like(self.k), dv)


@differentiable
def lsh_heads(q: Array, k: Array, v: Array, **options: Any) -> tuple[Array, LshHeadsSaved]:
    """`pyattn.lsh_attention`, for which queries are keys: `k` is not looked at."""
    out, saved = pyattn.lsh_attention.forward(q, v, **options)
    return out, LshHeadsSaved(saved, k)


@dataclasses.dataclass(frozen=True)
class _Heads:
    """`pyattn.routing_attention` to these centroids, as a function of q, k and v."""

    centroids: Array

    def forward(self, q: Array, k: Array, v: Array, **options: Any) -> tuple[Array, Any]:
        """Attend."""
        return pyattn.routing_attention.forward(q, k, v, self.centroids, **options)


@dataclasses.dataclass(frozen=True)
class RoutingLayerSaved(Saved):
    """The record of the heads and their projections, which are parameters."""

    heads: Any

    @property
    def decisions(self) -> dict[str, Array]:
        """The attention's."""
        return self.heads.decisions

    def backward(self, dout: Array) -> Any:
        """Gradients of x and of params; centroids, which only decide, have zeros."""
        grads = self.heads.backward(dout)._asdict()
        return gradients(("x", "params"))(grads.pop("x"), grads)


@differentiable
def routing_layer(x: Array, params: Mapping[str, Array], *, num_heads: int,
                  num_kv_heads: int | None = None,
                  **options: Any) -> tuple[Array, RoutingLayerSaved]:
    """Multi-head routing attention, its centroids among its parameters."""
    projections = {name: w for name, w in params.items() if name != "centroids"}
    y, saved = layers.multi_head.forward(
        x, **projections, num_heads=num_heads, num_kv_heads=num_kv_heads,
        attention=_Heads(params["centroids"]), **options)
    return y, RoutingLayerSaved(saved)


def init_routing_layer(rng: Any, width: int, *, num_heads: int, depth: int = 1) -> dict[str, Any]:
    """Fresh parameters for `routing_layer`."""
    rng = np.random.default_rng(rng)
    projections = _projections(rng, width, num_heads, depth)
    centroids = rng.standard_normal((num_heads, CLUSTERS, width // num_heads)).astype(np.float32)
    return {**projections,
            "centroids": centroids / np.linalg.norm(centroids, axis=-1, keepdims=True)}


def _projections(rng: Any, width: int, num_heads: int, depth: int) -> dict[str, Any]:
    """Fresh projections of a block's own attention."""
    block = layers.init_transformer_block(rng, width, num_heads=num_heads, depth=depth)
    return {name: block[name] for name in ("w_qkv", "w_o", "b_qkv", "b_o")}


def moved_centroids(blocks: list[dict[str, Any]], saved: Any) -> list[dict[str, Any]]:
    """Return the blocks with centroids nearer to the tokens of a step: `saved` is its record.

    Their directions are all that is kept from step to step.
    """
    moved = []
    for params, block in zip(blocks, saved.blocks, strict=True):
        record = block.attended.heads.heads.attended
        tokens = [standardise(x.x) for x in (record.normal_q, record.normal_k)]
        new = update_centroids(
            params["attention"]["centroids"], np.concatenate(tokens, axis=-2),
            np.concatenate([record.clusters, record.key_clusters], axis=-1), decay=DECAY,
            form="directions")
        moved.append(params | {"attention": params["attention"] | {"centroids": new.centroids}})
    return moved


@dataclasses.dataclass(frozen=True)
class _SpanHeads:
    """`pyattn.adaptive_span_attention` with these spans, as a function of q, k and v."""

    span: Array

    def forward(self, q: Array, k: Array, v: Array, **options: Any) -> tuple[Array, Any]:
        """Attend."""
        return pyattn.adaptive_span_attention.forward(q, k, v, self.span, **options)


@dataclasses.dataclass(frozen=True)
class SpanLayerSaved(Saved):
    """The record of the heads and their projections, the shares, and the longest span."""

    heads: Any
    share: Array
    max_span: float

    @property
    def decisions(self) -> dict[str, Array]:
        """The attention's."""
        return self.heads.decisions

    def backward(self, dout: Array) -> Any:
        """Gradients of x and of params; a share at an end can only come back."""
        grads = self.heads.backward(dout)._asdict()
        # forward: span = max_span clip(share, 0, 1)
        pull = self.max_span * grads.pop("span")
        outward = ((self.share <= 0) & (pull > 0)) | ((self.share >= 1) & (pull < 0))
        grads["span_share"] = np.where(outward, 0, pull)
        return gradients(("x", "params"))(grads.pop("x"), grads)


@differentiable
def span_layer(x: Array, params: Mapping[str, Array], *, num_heads: int,
               num_kv_heads: int | None = None, max_span: float = MAX_SPAN,
               **options: Any) -> tuple[Array, SpanLayerSaved]:
    """Multi-head attention as far back as each head has learned to, in shares of `max_span`."""
    projections = {name: w for name, w in params.items() if name != "span_share"}
    span = max_span * np.clip(params["span_share"], 0, 1)
    y, saved = layers.multi_head.forward(
        x, **projections, num_heads=num_heads, num_kv_heads=num_kv_heads,
        attention=_SpanHeads(span), **options)
    return y, SpanLayerSaved(saved, params["span_share"], max_span)


FUNCTIONS: dict[str, Any] = {"lsh_attention": lsh_heads}
"""Of q, k and v, in place of the variant of that name."""

LAYERS: dict[str, Any] = {"adaptive_span_attention": span_layer,
                          "nsa_attention": layers.nsa_layer, "routing_attention": routing_layer}
"""Of x and parameters of their own, in place of the variant of that name."""


def init_layer(name: str, rng: Any, width: int, *, num_heads: int, depth: int,
               options: Mapping[str, Any]) -> dict[str, Any]:
    """Return fresh parameters for the layer of that name, called with these options."""
    if name == "routing_attention":
        return init_routing_layer(rng, width, num_heads=num_heads, depth=depth)
    if name == "adaptive_span_attention":
        return {**_projections(rng, width, num_heads, depth),
                "span_share": np.full(num_heads, FIRST_SHARE, np.float32)}
    own = {key: options[key] for key in ("block_size", "compression") if key in options}
    return layers.init_nsa_layer(rng, width, num_heads=num_heads, depth=depth, separate=False,
                                 **own)
