"""One paper per file: each describes a pattern and calls an engine."""
