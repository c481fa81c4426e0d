"""What a kernel is told: one record of addresses, strides (in bytes) and counts.

An address of 0 means that there is no such array. Kernels look at these fields while they run; only
the kind of numbers they compute with is compiled in.
"""

from __future__ import annotations

import numpy as np


def _record(integers: str) -> np.dtype:
    return np.dtype([(name, "i8") for name in integers.split()])


SOURCES = ("float64", "float32", "float16", "bfloat16")
"""Dtypes of arrays; records hold the index."""

PACK = _record(
    "heads length tiles width "
    "padded "                   # the width in packed tiles
    "at b h n d "               # the source (batch, heads, length, width): address and strides
    "kind "                     # of the source's numbers
    "lengths "                  # int32 (batch,): rows from here on count as zeros
    "scale "                    # (heads,): factor, or 0
    "lse "                      # (batch, heads, tokens), or 0: rows with -inf count as zeros
    "items "                    # batch items that share one of the source
    "tokens "                   # the source's length
    "index index_b index_h "    # int32: which token a row is, -1 for zeros; 0 if all in order
    "rows columns pairs notes") # packed tiles in up to three layouts, and uint8 per tile; or 0

TARGET = _record(
    "at b h n kind size "       # a result: address, strides, and its numbers
    "onto")                     # whether to add to what is there

RUNS = _record("start first count tile names tiles")

TERM = _record("at item b h n m")

GRADIENT = _record(
    "at item copy b h n m "     # in the term's own shape, a copy for each slice of its owners
    "total "                    # if that has no query and no key axis: float64 sums instead
    "chunk")                    # in blocks: float64, and a copy for each chunk of keys, too

TABLE = _record("at unit h rows")   # float64, by distance, a copy for each unit of work

FORWARD_SCRATCH = _record("q acc scores gates row words names tops sums decays keys values "
                          "part")

BACKWARD_SCRATCH = _record("k_rows k_columns k_pairs v_columns dk dv weights dscores slopes dgates "
                           "operand words names row kept packed")

LISTS = _record(
    "start token "              # int64 (lines, blocks + 1), int32: who lists each block of keys
    "blocks "                   # how many there are; a line is a batch item and a group
    "block_size parts width "   # a block's keys, in so many tiles of so many keys
    "lengths "                  # int32 (batch,): keys from here on are padding
    "offset "                   # int32 (batch,): the position of query 0
    "causal "
    "chunk "                    # tokens whose rows a forward holds at a time
    "first last")               # tokens that this round of a backward is about

LISTED_FORWARD = _record("q acc sums tops places rows row_sums row_tops product scores words "
                         "decays shares")

LISTED_BACKWARD = _record("k_rows k_columns k_pairs v_columns places q dout q_pairs dout_pairs "
                          "shifts means weights dscores slopes product operand words")

CHOICE = _record(
    "top room count "           # scores wanted, held, and numbers to a list
    "out "                      # int32 (batch, heads, n, count)
    "q scores names floors held values keys word")     # in scratch

JOB = np.dtype([
    *_record("size operand fold lanes "     # bytes of a number and of an operand, operands that
                                            # lie side by side, numbers in a vector
             "heads groups n m d e d_padded e_padded "
             "d_depth e_depth "             # how deep a product over d or e is
             "row_tiles key_tiles").descr,
    ("q", PACK), ("k", PACK), ("v", PACK), ("dout", PACK),
    *_record("layout bits").descr,
    ("rows", RUNS), ("columns", RUNS),
    ("out", TARGET), *_record("lse lse_b lse_h sinks").descr,
    *_record("per_group chunk splits part_bytes parts").descr,
    ("bias", TERM), ("gate", TERM),
    # a gate in blocks of so many, or a table so wide, or a ramp over float64 spans; see GateForm
    *_record("gate_block gate_width gate_shift").descr, ("ramp", "f8"),
    *_record("offsets offsets_h offsets_width offset_origin").descr,
    *_record("q_positions q_positions_b k_positions k_positions_b streams streams_b").descr,
    ("softcap", "f8"), ("keep", "f8"),
    ("threshold", "u8"), ("seed_low", "u8"), ("seed_high", "u8"),
    ("ahead", FORWARD_SCRATCH),
    # from here on for the backward alone
    *_record("delta shifts means dq_sums dk_sums dv_sums dscale").descr,
    ("dq", TARGET), ("dk", TARGET), ("dv", TARGET),
    ("dbias", GRADIENT), ("dgate", GRADIENT),
    ("doffsets", TABLE), ("dgate_table", TABLE),
    # pieces: int64 lists of (batch, group) pairs, and which slice of its owner a piece is
    *_record("pairs piece_start piece_slice chunks short per_pair phase").descr,
    ("back", BACKWARD_SCRATCH),
    # for listed blocks of keys
    ("lists", LISTS), ("near", LISTED_FORWARD), ("far", LISTED_BACKWARD),
    # for the keys of the highest scores
    ("choice", CHOICE), ("floor", "f8"),
])

DELTA = _record("size kind heads n e e_padded "
                "dout dout_b dout_h dout_n dout_e out out_b out_h out_n out_e lse dlse delta")

BOX = _record("state done kernel place queue units scratch posted")
"""What a helper who is awake is asked to do; see jit/waiting.py."""

LISTED = _record("at b h n kind")
"""Rows of an array, contiguous each: address, strides, and its numbers."""

EDGES = np.dtype([
    *_record("size lanes heads groups n m d e d_padded e_padded "
             "runs chunks rows "        # int64 (runs, 5): item, group, first head, heads, list
             "start key").descr,        # int64 (lists, n + 1) and int32: see pyattn.engines.edges
    ("q", LISTED), ("k", LISTED), ("v", LISTED), ("out", LISTED), ("dout", LISTED),
    *_record("lse dlse bias bias_b bias_h").descr,
    ("scale", "f8"), ("softcap", "f8"),
    *_record("at_q at_dout at_out at_scores at_dscores at_slopes at_words at_list at_tops at_sums "
             "at_decays at_factors at_dk at_dv "
             # from here on for the backward alone
             "dbias dbias_b dbias_h "
             "kept kept_at "            # weight and score's gradient of each head and edge of a
                                        # run; and int64 (runs,): where those of a run start
             "pair_runs "               # int64 (batch * groups + 1,): the runs of each
             "columns query edge").descr,   # the lists by key
    ("dq", LISTED), ("dk", LISTED), ("dv", LISTED),
])
"""Lists of keys for each query: see jit/edges.py."""
