"""Products of tiles by the threads of one block, in the plain way of a GPU.

Numbers that several threads need are staged in shared memory, a slice at a time; sums stay in the
registers of the thread that owns them. Both products below are outer products, step by step:

    add_scores                                  add_weighted

               slice of k, transposed                      slab of v
               [c][c][c]..   one d at a time               [c][c][c]..   one key at a time
    slice      +---------+                      weights    +---------+
    of q   [a] | total   |                      of one [a] | total   |
           [a] | [a, c]  |                      key    [a] | [a, c]  |
           [a] |         |                             [a] |         |
               +---------+                                 +---------+

A thread reads as many numbers as it has rows and columns, and multiplies all with all. Its rows and
columns lie `down` and `across` apart, so that neighbouring threads read neighbouring numbers; a
padding column keeps rows of a slice in different banks of shared memory.

A barrier follows every staging, before the numbers are read, and every last reading, before they
are written over. All threads of a block call these functions together, with the same arguments but
`total`, `row` and `column`.
"""

from __future__ import annotations

from .compile import cuda, device


@device
def clear(total):
    """Set all sums of a thread to 0."""
    for a in range(total.shape[0]):
        for c in range(total.shape[1]):
            total[a, c] = 0


@device
def stage(shared, source, first, limit, offset, count):
    """Copy rows `first`.. and `count` columns from `offset` of `source` to the rows of `shared`.

    Rows from `limit` on, and columns that it does not have, become zeros.
    """
    number = shared.dtype.type
    width = source.shape[1]
    for x in range(cuda.threadIdx.x, shared.shape[0] * count, cuda.blockDim.x):
        r = x // count
        c = x - r * count
        if first + r < limit and offset + c < width:
            shared[r, c] = number(source[first + r, offset + c])
        else:
            shared[r, c] = number(0)


@device
def add_scores(total, q, k, i0, queries, j0, keys, left, right, depth, row, column, down, across):
    """Add to total[a, c] the product of a row of q and a row of k, both from `left` and `right`.

    Also for the gradients of the weights, with dout for q and v for k.
    """
    for offset in range(0, q.shape[1], depth):
        stage(left, q, i0, queries, offset, depth)
        stage(right, k, j0, keys, offset, depth)
        cuda.syncthreads()
        for d in range(depth):
            for c in range(total.shape[1]):
                y = right[column + c * across, d]
                for a in range(total.shape[0]):
                    total[a, c] += left[row + a * down, d] * y
        cuda.syncthreads()


@device
def add_weighted(total, weights, seen, whole, values, first, limit, offset, width, slab, turned,
                 row, column, down, across):
    """Add weights @ values to total, or if `turned` weights^T @ values.

    `values` are taken from row `first` on, columns `offset` to `offset` + `width`. Weights of pairs
    that are not `seen` are 0, but 0 times NaN is NaN: unless the tile is `whole`, such pairs are
    passed over.
    """
    reach = seen.shape[0] if turned else seen.shape[1]
    for start in range(0, reach, slab.shape[0]):
        stage(slab, values, first + start, limit, offset, width)
        cuda.syncthreads()
        for y in range(slab.shape[0]):
            if whole:
                for c in range(total.shape[1]):
                    value = slab[y, column + c * across]
                    for a in range(total.shape[0]):
                        if turned:
                            total[a, c] += weights[start + y, row + a * down] * value
                        else:
                            total[a, c] += weights[row + a * down, start + y] * value
            else:
                for a in range(total.shape[0]):
                    i, j = row + a * down, start + y
                    if turned:
                        i, j = j, i
                    if seen[i, j]:
                        weight = weights[i, j]
                        for c in range(total.shape[1]):
                            total[a, c] += weight * slab[y, column + c * across]
        cuda.syncthreads()
