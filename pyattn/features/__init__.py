"""What comes before an engine: positions, norms, and what content decides.

`lsh_hash`, `kmeans` and `important_blocks` make decisions, integers on the host that are constants
of every backward. The others are operations with a backward, but for `update_centroids`, which
moves a state from one step of training to the next. `FeatureMap` describes what the engine of
linear attention computes for itself.
"""

from .clustering import commitment_loss, kmeans, segment_means, update_centroids
from .compression import compress
from .feature_maps import FeatureMap
from .hashing import lsh_hash
from .importance import important_blocks
from .normalise import standardise, unit_length
from .positions import add_positions, embedding, rotary, sinusoidal

__all__ = [
    "FeatureMap", "add_positions", "commitment_loss", "compress", "embedding", "important_blocks",
    "kmeans", "lsh_hash", "rotary", "segment_means", "sinusoidal", "standardise", "unit_length",
    "update_centroids",
]
