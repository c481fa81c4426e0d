"""Timings of pyattn beside others in one process: ``python -m bench --help``."""
