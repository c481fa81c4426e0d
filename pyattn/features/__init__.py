"""What comes before an engine: positions, feature maps, pooling."""

from .positions import add_positions, embedding, rotary, sinusoidal

__all__ = ["add_positions", "embedding", "rotary", "sinusoidal"]
