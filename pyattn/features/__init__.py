"""What comes before an engine: positions, norms, and what content decides.

`lsh_hash`, `kmeans`, `important_blocks` and `prune` make decisions, which are constants of every
backward. `update_centroids`, `update_importance` and `update_baseline` move a state from one step
of training to the next. The others are operations with a backward, but for what measures or
schedules or exports: `connection_importance`, `policy_gradient`, `pruning_schedule`,
`prune_weights`, `gate_mask`, `sparsebert_mask`.
"""

from .clustering import commitment_loss, kmeans, segment_means, update_centroids
from .compression import compress
from .connections import gate_mask, sparsebert_loss, sparsebert_mask
from .gates import (
    bernoulli_gates,
    binary_concrete,
    hard_concrete,
    l0_penalty,
    policy_gradient,
    straight_through,
    update_baseline,
)
from .hashing import lsh_hash
from .importance import important_blocks
from .normalise import standardise, unit_length
from .positions import add_positions, embedding, rotary, sinusoidal
from .pruning import (
    connection_importance,
    prune,
    prune_weights,
    pruning_schedule,
    update_importance,
)
from .spans import dynamic_spans, span_loss

__all__ = [
    "add_positions", "bernoulli_gates", "binary_concrete", "commitment_loss", "compress",
    "connection_importance", "dynamic_spans", "embedding", "gate_mask", "hard_concrete",
    "important_blocks", "kmeans", "l0_penalty", "lsh_hash", "policy_gradient", "prune",
    "prune_weights", "pruning_schedule", "rotary", "segment_means", "sinusoidal", "span_loss",
    "sparsebert_loss", "sparsebert_mask", "standardise", "straight_through", "unit_length",
    "update_baseline", "update_centroids", "update_importance",
]
