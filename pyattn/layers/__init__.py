"""Layers on plain weight arrays, each with its backward.

`layer(...)` gives the output; ``layer.forward(...)`` gives ``(out, saved)``, and
``saved.backward(dout)`` the gradients, named like the arguments.
"""

from ..features.image_convolution import conv2d
from ..features.positions import add_positions, embedding, rotary
from .convolution import (
    conv1d,
    dynamic_conv_layer,
    init_dynamic_conv_layer,
    init_span_convolution,
    span_convolution,
)
from .feed_forward import feed_forward
from .hybrid import hybrid_block, init_hybrid_block, mixed_heads
from .language_model import init_language_model, language_model
from .linear import linear
from .loss import cross_entropy
from .multi_head import cross_attention, multi_head, projected_attention
from .norm import layer_norm
from .nsa import init_nsa_layer, nsa_layer
from .optimise import adam, clip_by_norm
from .recurrent import gru, init_gru
from .swin import init_swin, init_swin_block, patch_merging, swin, swin_block
from .timesformer import init_timesformer_block, timesformer_block
from .transformer import init_transformer_block, transformer, transformer_block
from .vit import init_vit, patchify, vit

__all__ = [
    "adam", "add_positions", "clip_by_norm", "conv1d", "conv2d", "cross_attention",
    "cross_entropy", "dynamic_conv_layer", "embedding", "feed_forward", "gru", "hybrid_block",
    "init_dynamic_conv_layer", "init_gru", "init_hybrid_block", "init_language_model",
    "init_nsa_layer", "init_span_convolution", "init_swin", "init_swin_block",
    "init_timesformer_block", "init_transformer_block", "init_vit", "language_model",
    "layer_norm", "linear", "mixed_heads", "multi_head", "nsa_layer", "patch_merging",
    "patchify", "projected_attention", "rotary", "span_convolution", "swin", "swin_block",
    "timesformer_block", "transformer", "transformer_block", "vit",
]
