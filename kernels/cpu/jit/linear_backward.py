"""The gradients of linear attention: once more from the first step, then from the last.

Units of work, tiles and states as in jit/linear.py; g are gradients of numerators and denominators.

    by query     dphi_q = T g;  dphi_q += (g v^T) phi_k where seen;  then T += phi_k^T [v, 1]
    by key       dphi_k = R v, dv = phi_k R;  both += the same pairs;  then R += phi_q^T g

Features are computed again in either, and what a token's features have for gradients becomes those
of the token at once.
"""

from __future__ import annotations

import math

from ..compile import kernel, part
from .access import fetch_add, load, numbers, rounded, store
from .linear import (
    BLOCK,
    EXP,
    FLOAT32,
    HALF,
    NONE,
    STEP,
    absorb,
    clipped,
    finite,
    keep_state,
    linear_at,
    load_state,
    multiply_pairs,
    read_features,
    read_keys,
    read_rows,
    scale_all,
    segment_at,
    state_place,
    step_at,
    top_place,
    turn_values,
    weigh_step,
    wide,
)
from .packing import NOWHERE, TILE
from .vector import (
    dots,
    gemm,
    pull_features,
    row_dots,
    scale_columns,
    scale_rows,
    transpose,
    write_rows,
)


@part
def read_pull(job, b, h, i, rows, scratch, unit):
    """Read the gradients of a step's numerators and denominators; whether one is not finite."""
    size, g = job.size, scratch + job.at_g
    columns = wide(job, rows)
    strange = read_rows(job.dout, b, h, i, rows, columns, job.e, job.w_padded, unit, g, unit)
    if job.normalize:
        out, delta = scratch + job.at_out, scratch + job.at_delta
        read_rows(job.out, b, h, i, rows, columns, job.e, job.w_padded, unit, out, unit)
        row_dots(g, out, job.w_padded, rows, job.w_padded, delta, unit)
        kept = job.den + ((b * job.heads + h) * job.n + i) * size
        shares = numbers(scratch + job.at_den, TILE, unit)
        for r in range(rows):
            # forward: out = num / den
            den = load(kept + r * size, unit)
            row = g + r * job.w_padded * size
            if den == 0:
                numbers(row, job.w_padded, unit)[:] = 0
                shares[r] = 1
            else:
                product = load(delta + r * size, unit)
                strange |= not abs(product / den) < math.inf
                store(row + job.e * size, -product)
                shares[r] = unit / den
        scale_rows(g, job.w_padded, rows, job.w_padded, scratch + job.at_den, unit)
    return strange


@part
def pull_tokens(job, phi, dphi, count, target, b, h, first, scratch, unit):
    """Write the gradients of tokens whose features have the gradients `dphi`.

    The tokens themselves, scaled, are in `at_x`.
    """
    size, columns, dx = job.size, wide(job, count), scratch + job.at_g_columns
    pull_features(dphi, phi, job.f, columns, job.kind, rounded(job.epsilon, unit), unit)
    if job.projection:
        # forward: h = projection x
        gemm(count, job.d_padded, job.f, dphi, STEP, TILE, job.projection, job.d_padded, dx,
             job.d_padded, NONE, unit)
    else:
        transpose(dphi, TILE, dx, job.d_padded, job.d, columns, unit)
    if job.kind == EXP:
        # forward: phi = exp(h - |x|^2 / 2)
        totals = scratch + job.at_found
        gemm(STEP, columns, job.f, job.ones, NONE, NONE, dphi, TILE, totals, TILE,
             NONE, unit)
        each = numbers(totals, TILE, unit)
        for r in range(count):
            row = numbers(dx + r * job.d_padded * size, job.d, unit)
            x = numbers(scratch + job.at_x + r * job.d_padded * size, job.d, unit)
            total = each[r]
            for c in range(job.d):
                row[c] -= total * x[c]
    factors = NOWHERE
    if job.scale != 1:
        factors = scratch + job.at_delta
        numbers(factors, TILE, unit)[:] = rounded(job.scale, unit)
    write_rows(dx, job.d_padded, count, job.d, factors,
               target.at + b * target.b + h * target.h + first * target.n, target.n, target.kind,
               unit)


@kernel
def by_query(place, queue, units, scratch, unit, operand):
    """Compute dq, and keep the stabiliser before each step."""
    job = linear_at(place)
    task = fetch_add(queue, STEP)
    while task < units:
        pair, segment = divmod(task, job.segments)
        b, g = divmod(pair, job.groups)
        first, last = segment_at(job, b, segment)
        load_state(job, state_place(job, job.state, task), scratch, unit)
        top = load(top_place(job, pair, first), unit)
        some = job.given != 0 or segment > 0
        shared = job.heads // job.groups
        for s in range(first, last):
            i, rows, j, columns, shift = step_at(job, b, s)
            strange = False
            if columns:
                strange, _ = read_keys(job, b, g, j, columns, scratch, unit)
                if rows:
                    turn_values(job, columns, scratch, unit)
            after = top
            if job.kind == EXP:
                after = weigh_step(job, top, rows, columns, shift, scratch, unit)
            if rows:
                for h in range(g * shared, (g + 1) * shared):
                    pull_queries(job, b, h, i, rows, columns, shift, some, strange, scratch, unit)
            if columns:
                absorb(job, columns, top, after, scratch, unit)
                some, top = True, after
            # the stabilisers before segments are there already
            if s + 1 < last or segment + 1 == job.segments:
                store(top_place(job, pair, s + 1), top)
        task = fetch_add(queue, STEP)


@part
def pull_queries(job, b, h, i, rows, columns, shift, some, strange, scratch, unit):
    """Compute the gradients of the queries of one head in a step."""
    size, phi, dphi = job.size, scratch + job.at_phi_q, scratch + job.at_dphi
    g, turned, across = scratch + job.at_g, scratch + job.at_g_columns, wide(job, rows)
    read_pull(job, b, h, i, rows, scratch, unit)
    read_features(job, job.q, b, h, i, rows, phi, scratch + job.at_delta, scratch, unit)
    if some:
        # forward: num = before * phi state
        transpose(g, job.w_padded, turned, TILE, across, job.width, unit)
        if job.kind == EXP:
            scale_columns(turned, job.width, across, scratch + job.at_before, unit)
        gemm(job.f, across, job.width, scratch + job.at_state, job.w_padded, STEP, turned, TILE,
             dphi, TILE, NONE, unit)
    else:
        numbers(dphi, job.f * TILE, unit)[:] = 0
    if columns:
        # forward: num += (phi_q phi_k^T) v
        b_tile, b_turned = scratch + job.at_b, scratch + job.at_turned
        multiply_pairs(job, rows, columns, shift, job.width, g, job.w_padded, STEP,
                       scratch + job.at_v_columns, b_tile, scratch, unit)
        numbers(b_tile + rows * TILE * size, (across - rows) * TILE, unit)[:] = 0
        transpose(b_tile, TILE, b_turned, TILE, across, wide(job, columns), unit)
        add_pairs(job, scratch + job.at_phi_k, b_turned, dphi, columns, across, shift, strange,
                  scratch, unit)
    pull_tokens(job, phi, dphi, rows, job.dq, b, h, i, scratch, unit)


@part
def add_pairs(job, phi, pairs, dphi, columns, across, shift, strange, scratch, unit):
    """Add features of keys times pairs (keys, queries) to the gradients of queries' features."""
    size = job.size
    if strange:
        for r in range(across):
            for c in range(clipped(r + shift + 1, columns)):
                x = load(pairs + (c * TILE + r) * size, unit)
                for f in range(job.f):
                    at = dphi + (f * TILE + r) * size
                    store(at, load(at, unit) + x * load(phi + (f * TILE + c) * size, unit))
        return
    for r in range(NONE, across, HALF):
        width = min(HALF, across - r)
        gemm(job.f, width, clipped(r + width + shift, columns), phi, TILE, STEP, pairs + r * size,
             TILE, dphi + r * size, TILE, STEP, unit)


@kernel
def later_sums(place, queue, units, scratch, unit, operand):
    """Compute what each segment adds to the state of later queries, but for the first."""
    job = linear_at(place)
    task = fetch_add(queue, STEP)
    while task < units:
        pair, segment = divmod(task, job.segments)
        if segment:
            b, g = divmod(pair, job.groups)
            first, last = segment_at(job, b, segment)
            own = state_place(job, job.later, task - 1)
            load_state(job, own, scratch, unit)
            shared = job.heads // job.groups
            for back in range(last - first):
                s = last - 1 - back
                i, rows, j, columns, shift = step_at(job, b, s)
                if job.kind == EXP:
                    if columns:
                        read_keys(job, b, g, j, columns, scratch, unit)
                    fade(job, pair, s, rows, columns, shift, scratch, unit)
                if rows:
                    for h in range(g * shared, (g + 1) * shared):
                        read_pull(job, b, h, i, rows, scratch, unit)
                        read_features(job, job.q, b, h, i, rows, scratch + job.at_phi_q,
                                      scratch + job.at_delta, scratch, unit)
                        join_later(job, rows, scratch, unit)
            keep_state(job, own, scratch, unit)
        task = fetch_add(queue, STEP)


@part
def fade(job, pair, s, rows, columns, shift, scratch, unit):
    """Work out the factors of a step, and bring the state of later queries to before it."""
    top = load(top_place(job, pair, s), unit)
    after = weigh_step(job, top, rows, columns, shift, scratch, unit)
    # forward: state = kept * state + ...
    scale_all(scratch + job.at_state, job.f * job.w_padded,
                  rounded(math.exp(top - finite(after)), unit), unit)


@part
def join_later(job, rows, scratch, unit):
    """Add the queries of one head in a step to the state of later queries."""
    size, g, phi = job.size, scratch + job.at_g, scratch + job.at_phi_q
    state, found = scratch + job.at_state, scratch + job.at_found
    if job.kind == EXP:
        scale_rows(g, job.w_padded, rows, job.w_padded, scratch + job.at_before, unit)
    # forward: num = before * phi state
    gemm(job.f, job.e_padded, rows, phi, TILE, STEP, g, job.w_padded, state, job.w_padded, STEP,
         unit)
    if job.normalize and job.e == job.e_padded:
        pull = numbers(scratch + job.at_den, TILE, unit)
        for r in range(rows):
            pull[r] = load(g + (r * job.w_padded + job.e) * size, unit)
        dots(STEP, job.f, rows, scratch + job.at_den, TILE, phi, TILE * size, FLOAT32, found, job.f,
             unit)
        more, last = numbers(found, job.f, unit), state + job.e * size
        for f in range(job.f):
            at = last + f * job.w_padded * size
            store(at, load(at, unit) + more[f])


@kernel
def by_key(place, queue, units, scratch, unit, operand):
    """Compute dk and dv, from the last step to the first."""
    job = linear_at(place)
    task = fetch_add(queue, STEP)
    while task < units:
        pair, segment = divmod(task, job.segments)
        b, g = divmod(pair, job.groups)
        first, last = segment_at(job, b, segment)
        own = state_place(job, job.later, task)
        load_state(job, own, scratch, unit)
        for back in range(last - first):
            pull_keys(job, pair, b, g, last - 1 - back, scratch, unit)
        if segment == 0:
            keep_state(job, own, scratch, unit)
        task = fetch_add(queue, STEP)


@part
def pull_keys(job, pair, b, g, s, scratch, unit):
    """Compute the gradients of a step's keys and values, and add its queries to the state."""
    state = scratch + job.at_state
    phi, dphi, dv = scratch + job.at_phi_k, scratch + job.at_dphi, scratch + job.at_turned
    i, rows, j, columns, shift = step_at(job, b, s)
    across = wide(job, columns)
    if columns:
        read_keys(job, b, g, j, columns, scratch, unit)
        turn_values(job, columns, scratch, unit)
    top = load(top_place(job, pair, s), unit)
    after = top
    if job.kind == EXP:
        after = weigh_step(job, top, rows, columns, shift, scratch, unit)
    if columns:
        # forward: state = kept * state + (share * phi_k)^T v
        share = scratch + job.at_share
        gemm(job.f, across, job.width, state, job.w_padded, STEP, scratch + job.at_v_columns, TILE,
             dphi, TILE, NONE, unit)
        gemm(columns, job.e_padded, job.f, phi, STEP, TILE, state, job.w_padded, dv, job.e_padded,
             NONE, unit)
        if job.kind == EXP:
            scale_columns(dphi, job.f, across, share, unit)
            scale_rows(dv, job.e_padded, columns, job.e_padded, share, unit)
    if job.kind == EXP:
        scale_all(state, job.f * job.w_padded,
                  rounded(math.exp(top - finite(after)), unit), unit)
    shared = job.heads // job.groups
    for h in range(g * shared, (g + 1) * shared if rows else g * shared):
        strange_g = read_pull(job, b, h, i, rows, scratch, unit)
        strange_q = read_features(job, job.q, b, h, i, rows, scratch + job.at_phi_q,
                                  scratch + job.at_delta, scratch, unit)
        if columns:
            meet_queries(job, rows, columns, shift, strange_g, strange_q, dv, dphi, scratch, unit)
        join_later(job, rows, scratch, unit)
    if columns:
        # the queries have taken the place of the keys
        if job.kind == EXP:
            read_rows(job.k, b, g, j, columns, across, job.d, job.d_padded,
                      rounded(job.scale, unit), scratch + job.at_x, unit)
        write_rows(dv, job.e_padded, columns, job.e, NOWHERE,
                   job.dv.at + b * job.dv.b + g * job.dv.h + j * job.dv.n, job.dv.n, job.dv.kind,
                   unit)
        pull_tokens(job, phi, dphi, columns, job.dk, b, g, j, scratch, unit)


@part
def meet_queries(job, rows, columns, shift, strange_g, strange_q, dv, dphi, scratch, unit):
    """Add to the gradients of keys and values what the queries of their step bring them."""
    size, a, b = job.size, scratch + job.at_a, scratch + job.at_b
    phi, g, across = scratch + job.at_phi_q, scratch + job.at_g, wide(job, columns)
    multiply_pairs(job, rows, columns, shift, job.f, phi, STEP, TILE, scratch + job.at_phi_k, a,
                   scratch, unit)
    multiply_pairs(job, rows, columns, shift, job.width, g, job.w_padded, STEP,
                   scratch + job.at_v_columns, b, scratch, unit)
    # forward: num += (phi_q phi_k^T) v; a key meets the queries from the first that sees it
    block = STEP if strange_g else BLOCK
    for c in range(NONE, columns, block):
        first = clipped(c - shift, rows)
        gemm(min(block, columns - c), job.e_padded, rows - first, a + (first * TILE + c) * size,
             STEP, TILE, g + first * job.w_padded * size, job.w_padded,
             dv + c * job.e_padded * size, job.e_padded, STEP, unit)
    if strange_q:
        for c in range(columns):
            for r in range(clipped(c - shift, rows), rows):
                x = load(b + (r * TILE + c) * size, unit)
                for f in range(job.f):
                    at = dphi + (f * TILE + c) * size
                    store(at, load(at, unit) + x * load(phi + (f * TILE + r) * size, unit))
        return
    for c in range(NONE, across, HALF):
        first = clipped(c - shift, rows)
        gemm(job.f, min(HALF, across - c), rows - first, phi + first * size, TILE, STEP,
             b + (first * TILE + c) * size, TILE, dphi + c * size, TILE, STEP, unit)
