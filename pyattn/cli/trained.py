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
from pyattn.features import dynamic_spans, standardise, update_centroids

DECAY = 0.9
"""Of the centroids: a short training has few steps."""

CLUSTERS = 8

TAPS = 15
"""Of a convolution's kernels."""

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


PROJECTIONS = ("w_qkv", "w_o", "b_qkv", "b_o")


@dataclasses.dataclass(frozen=True)
class HeadsLayerSaved(Saved):
    """The record of the heads and their projections, which are parameters."""

    heads: Any

    @property
    def decisions(self) -> dict[str, Array]:
        """The attention's."""
        return self.heads.decisions

    def backward(self, dout: Array) -> Any:
        """Gradients of x and of params; arrays that only decide have zeros."""
        grads = self.heads.backward(dout)._asdict()
        return gradients(("x", "params"))(grads.pop("x"), grads)


@dataclasses.dataclass(frozen=True)
class HeadsLayer:
    """Multi-head attention whose arrays, beside q, k and v, are parameters by their names."""

    attention: Any

    def forward(self, x: Array, params: Mapping[str, Array],
                **options: Any) -> tuple[Array, HeadsLayerSaved]:
        """Attend."""
        y, saved = layers.multi_head.forward(x, **params, attention=self.attention, **options)
        return y, HeadsLayerSaved(saved)


@dataclasses.dataclass(frozen=True)
class GatedHeadsSaved(Saved):
    """The attention's record, and how many logits were left out at either end."""

    attended: Any
    cut: int

    @property
    def decisions(self) -> dict[str, Array]:
        """The attention's."""
        return self.attended.decisions

    def backward(self, dout: Array) -> Any:
        """Gradients of q, k, v and all logits."""
        grads = self.attended.backward(dout)
        pad = ((0, 0), (self.cut, self.cut))
        return grads._replace(gate_logits=np.pad(grads.gate_logits, pad))


@differentiable
def gated_heads(q: Array, k: Array, v: Array, gate_logits: Array, *, block_size: int,
                **options: Any) -> tuple[Array, GatedHeadsSaved]:
    """`pyattn.gated_attention`; a text shorter than the logits are for takes those in the middle.

    They are (H, offsets between blocks).
    """
    blocks = -(-q.shape[-2] // block_size)
    cut = (gate_logits.shape[1] + 1) // 2 - blocks
    own = gate_logits[:, cut:gate_logits.shape[1] - cut]
    out, saved = pyattn.gated_attention.forward(q, k, v, own, block_size=block_size, **options)
    return out, GatedHeadsSaved(saved, cut)


def _directions(rng: np.random.Generator, heads: int, width: int) -> Array:
    centroids = rng.standard_normal((heads, CLUSTERS, width))
    return centroids / np.linalg.norm(centroids, axis=-1, keepdims=True)


def _arrays(name: str, rng: np.random.Generator, heads: int, width: int, context: int,
            options: Mapping[str, Any]) -> dict[str, Array]:
    """Return what heads of this width have beside their projections, for so many tokens."""
    def normal(*shape: int, size: float) -> Array:
        return size * rng.standard_normal(shape)

    if name == "routing_attention":
        return {"centroids": _directions(rng, heads, width)}
    if name == "talking_heads_attention":
        return {side: np.eye(heads) + normal(heads, heads, size=0.02)
                for side in ("w_pre", "w_post")}
    if name == "additive_attention":
        return {"w_q": normal(width, width, size=width ** -0.5),
                "w_k": normal(width, width, size=width ** -0.5),
                "w_score": normal(width, size=1.0), "b": np.zeros(width)}
    if name == "sparsebert_attention":
        return {"alpha": normal(heads, context, 2, size=1e-3)}
    blocks = -(-context // options["block_size"])
    return {"gate_logits": normal(heads, 2 * blocks - 1, size=0.1)}


def init_heads_layer(name: str, rng: Any, width: int, *, num_heads: int, depth: int,
                     context: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Fresh parameters for the `HeadsLayer` of that name."""
    rng = np.random.default_rng(rng)
    projections = _projections(rng, width, num_heads, depth)
    more = _arrays(name, rng, num_heads, width // num_heads, context, options)
    return projections | {key: x.astype(np.float32) for key, x in more.items()}


def _projections(rng: Any, width: int, num_heads: int, depth: int) -> dict[str, Any]:
    """Fresh projections of a block's own attention."""
    block = layers.init_transformer_block(rng, width, num_heads=num_heads, depth=depth)
    return {name: block[name] for name in PROJECTIONS}


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


@differentiable
def convolution_layer(x: Array, params: Mapping[str, Array], *, num_heads: int,
                      num_kv_heads: int | None = None, rotary_base: float | None = None,
                      **options: Any) -> tuple[Array, Any]:
    """`layers.dynamic_conv_layer`; it has neither keys nor queries to turn."""
    return layers.dynamic_conv_layer.forward(x, params, num_heads=num_heads, **options)


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
    span = max_span * np.clip(params["span_share"], 0, 1)
    y, saved = layers.multi_head.forward(
        x, **{name: params[name] for name in PROJECTIONS}, num_heads=num_heads,
        num_kv_heads=num_kv_heads, attention=pyattn.adaptive_span_attention, span=span, **options)
    return y, SpanLayerSaved(saved, params["span_share"], max_span)


@dataclasses.dataclass(frozen=True)
class DynamicSpanLayerSaved(Saved):
    """The record of the heads and their projections, and that of the spans."""

    heads: Any
    spans: Any

    @property
    def decisions(self) -> dict[str, Array]:
        """The attention's."""
        return self.heads.decisions

    def backward(self, dout: Array) -> Any:
        """Gradients of x and of params."""
        grads = self.heads.backward(dout)._asdict()
        dx, dw, db = self.spans.backward(grads.pop("span"))
        return gradients(("x", "params"))(grads.pop("x") + dx,
                                          {**grads, "w_span": dw, "b_span": db})


@differentiable
def dynamic_span_layer(x: Array, params: Mapping[str, Array], *, num_heads: int,
                       num_kv_heads: int | None = None, max_span: float = MAX_SPAN,
                       **options: Any) -> tuple[Array, DynamicSpanLayerSaved]:
    """Multi-head attention as far back as each token says, up to `max_span`."""
    span, spans = dynamic_spans.forward(x, params["w_span"], params["b_span"], max_span=max_span)
    y, saved = layers.multi_head.forward(
        x, **{name: params[name] for name in PROJECTIONS}, num_heads=num_heads,
        num_kv_heads=num_kv_heads, attention=pyattn.dynamic_span_attention, span=span, **options)
    return y, DynamicSpanLayerSaved(saved, spans)


FUNCTIONS: dict[str, Any] = {"lsh_attention": lsh_heads}
"""Of q, k and v, in place of the variant of that name."""

LAYERS: dict[str, Any] = {
    "adaptive_span_attention": span_layer,
    "additive_attention": HeadsLayer(pyattn.additive_attention),
    "dynamic_convolution": convolution_layer,
    "dynamic_span_attention": dynamic_span_layer,
    "gated_attention": HeadsLayer(gated_heads),
    "lightweight_convolution": convolution_layer,
    "nsa_attention": layers.nsa_layer,
    "routing_attention": HeadsLayer(pyattn.routing_attention),
    "sparsebert_attention": HeadsLayer(pyattn.sparsebert_attention),
    "talking_heads_attention": HeadsLayer(pyattn.talking_heads_attention),
}
"""Of x and parameters of their own, in place of the variant of that name."""


def init_layer(name: str, rng: Any, width: int, *, num_heads: int, depth: int, context: int,
               options: Mapping[str, Any]) -> dict[str, Any]:
    """Return fresh parameters for the layer of that name, called with these options.

    Texts have `context` tokens at most.
    """
    if isinstance(LAYERS[name], HeadsLayer):
        return init_heads_layer(name, rng, width, num_heads=num_heads, depth=depth,
                                context=context, options=options)
    if name.endswith("convolution"):
        return layers.init_dynamic_conv_layer(rng, width, num_heads=num_heads, depth=depth,
                                              kernel_size=TAPS,
                                              lightweight=name == "lightweight_convolution")
    if name == "adaptive_span_attention":
        return {**_projections(rng, width, num_heads, depth),
                "span_share": np.full(num_heads, FIRST_SHARE, np.float32)}
    if name == "dynamic_span_attention":
        # sigmoid(-1.1) is a quarter
        return {**_projections(rng, width, num_heads, depth),
                "w_span": np.zeros((width, num_heads), np.float32),
                "b_span": np.full(num_heads, -1.1, np.float32)}
    own = {key: options[key] for key in ("block_size", "compression") if key in options}
    return layers.init_nsa_layer(rng, width, num_heads=num_heads, depth=depth, separate=False,
                                 **own)
