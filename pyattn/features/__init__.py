"""What comes before an engine: positions, norms, and what content decides.

`lsh_hash`, `kmeans`, `important_blocks` and `random_projection` make decisions, arrays on the host
that are constants of every backward. The others are operations with a backward, but for
`update_centroids`, which moves a state from one step of training to the next,
`projection_at`, which tells the draw of a step, and `FeatureMap`, which describes features.
"""

from .clustering import commitment_loss, kmeans, segment_means, update_centroids
from .compression import compress
from .feature_maps import FeatureMap
from .hashing import lsh_hash
from .importance import important_blocks
from .normalise import standardise, unit_length
from .positions import add_positions, embedding, rotary, sinusoidal
from .random_features import projection_at, random_features, random_projection

__all__ = [
    "FeatureMap", "add_positions", "commitment_loss", "compress", "embedding", "important_blocks",
    "kmeans", "lsh_hash", "projection_at", "random_features", "random_projection", "rotary",
    "segment_means", "sinusoidal", "standardise", "unit_length", "update_centroids",
]
