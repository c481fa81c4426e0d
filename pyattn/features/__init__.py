"""What comes before an engine: positions, feature maps, pooling, hashing."""

from .hashing import lsh_hash
from .normalise import standardise, unit_length
from .positions import add_positions, embedding, rotary, sinusoidal

__all__ = ["add_positions", "embedding", "lsh_hash", "rotary", "sinusoidal", "standardise",
           "unit_length"]
