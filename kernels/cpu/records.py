"""What a kernel is told: one record of addresses, strides (in bytes) and counts.

An address of 0 means that there is no such array. Kernels look at these fields while they run; only
the dtype they compute in is compiled in.
"""

from __future__ import annotations

import numpy as np


def _record(integers: str, **others: object) -> np.dtype:
    return np.dtype([(name, "i8") for name in integers.split()] + list(others.items()))


PACK = _record(
    "at b h n d "               # the source (batch, heads, length, width): address and strides
    "size batch heads length tiles width padded "
    "lengths "                  # int32 (batch,): rows from here on count as zeros
    "scale "                    # (heads,): factor, or 0
    "lse "                      # (batch, heads, length), or 0: rows with -inf count as zeros
    "rows columns notes")       # packed tiles, their transposes, and uint8 per tile; or 0

RUNS = _record("start first count tile names tiles")

TERM = _record("at item b h n m")

GRADIENT = _record(
    "at item b h n m "          # in the term's own shape; where that has no query and no key axis,
    "total")                    # a float64 sum per (batch, head, row of tiles) instead

JOB = np.dtype([
    *_record("size heads groups n m d e d_padded e_padded row_tiles key_tiles").descr,
    ("q", PACK), ("k", PACK), ("v", PACK), ("dout", PACK),
    *_record("out lse delta sinks scale dq dk dv dscale").descr,
    *_record("layout bits").descr,
    ("rows", RUNS), ("columns", RUNS),
    ("bias", TERM), ("gate", TERM), ("dbias", GRADIENT), ("dgate", GRADIENT),
    *_record("offsets offsets_h offsets_width offset_origin "
             "doffsets doffsets_unit doffsets_h").descr,
    *_record("q_positions q_positions_b k_positions k_positions_b streams streams_b").descr,
    ("softcap", "f8"), ("keep", "f8"),
    ("threshold", "u8"), ("seed_low", "u8"), ("seed_high", "u8"),
    # who owns what in the backward: int64 lists of (batch, head or group) pairs
    *_record("pairs pair_start slices").descr,
])
