"""The name that `pyattn.__init__` asks for."""

from .config import show_config  # noqa: F401
