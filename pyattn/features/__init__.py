"""What comes before an engine: positions, feature maps, pooling, hashing."""

from .clustering import commitment_loss, kmeans, segment_means, update_centroids
from .compression import compress
from .hashing import lsh_hash
from .importance import important_blocks
from .normalise import standardise, unit_length
from .positions import add_positions, embedding, rotary, sinusoidal

__all__ = [
    "add_positions", "commitment_loss", "compress", "embedding", "important_blocks", "kmeans",
    "lsh_hash", "rotary", "segment_means", "sinusoidal", "standardise", "unit_length",
    "update_centroids",
]
