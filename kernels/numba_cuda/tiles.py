"""Products of tiles by the threads of one block, in the plain way of a GPU.

A block owns some rows (queries, or keys in `backward.by_keys`) and walks tiles of columns (keys, or
queries). Numbers that several threads need are staged in shared memory, a slice at a time; sums
stay in the registers of the thread that owns them. Both products are sums of outer products:

    add_scores                                  add_weighted

                slice of k                                  slab of v
                [c][c][c]..   one d at a time               [c][c][c]..   one key at a time
    slice       +---------+                     weights     +---------+
    of q    [a] | total   |                     of that [a] | total   |
            [a] | [a, c]  |                     key     [a] | [a, c]  |
            [a] |         |                             [a] |         |
                +---------+                                 +---------+

A thread reads as many numbers as it has rows and columns, and multiplies all with all. Its rows and
columns lie `down` and `across` apart, so that neighbouring threads read neighbouring numbers. What
is summed over comes first in every shared tile: ``slice[d, row]``, ``weights[column, row]``. A
padding column keeps its numbers in different banks of shared memory when they are written.

Registers cannot be indexed: arrays of a thread are only used in loops short enough to be unrolled,
as here, where every index becomes a constant. What is done to pairs one by one is no such loop. So
scores go through a shared tile, in which a thread reads and writes its own places alone; a second
such tile lies in the two slices, a half in each, while they are not needed.

A barrier follows every staging, before the numbers are read, and every last reading, before they
are written over. All threads of a block call these functions together, with the same arguments but
`total`, `row` and `column`.
"""

from __future__ import annotations

from .compile import cuda, device


@device
def place(across):
    """Return the row and column of this thread in the grid of threads."""
    # there are no more threads, but so the compiler knows that no index is negative
    thread = cuda.threadIdx.x & 1023
    return thread // across, thread % across


@device
def clear(total):
    """Set all sums of a thread to 0."""
    for a in range(total.shape[0]):
        for c in range(total.shape[1]):
            total[a, c] = 0


@device
def put(tile, total, row, column, down, across):
    """Write what a thread owns to the places of a shared tile that it owns."""
    for a in range(total.shape[0]):
        for c in range(total.shape[1]):
            tile[column + c * across, row + a * down] = total[a, c]


@device
def put_aside(left, right, total, row, column, down, across):
    """Write what a thread owns to the tile that lies in both slices."""
    for a in range(total.shape[0]):
        for c in range(total.shape[1]):
            set_aside(left, right, column + c * across, row + a * down, total[a, c])


@device
def set_aside(left, right, x, r, value):
    """Write to a place of the tile that lies in both slices."""
    if x < left.shape[0]:
        left[x, r] = value
    else:
        right[x - left.shape[0], r] = value


@device
def aside(left, right, x, r):
    """Read a place of the tile that lies in both slices."""
    return left[x, r] if x < left.shape[0] else right[x - left.shape[0], r]


@device
def stage_slice(shared, source, first, limit, offset):
    """Copy some columns of some rows of `source`, as ``shared[column, row]``.

    Rows from `limit` on, and columns that it does not have, become zeros.
    """
    number = shared.dtype.type
    depth, width = shared.shape[0], source.shape[1]
    for x in range(cuda.threadIdx.x, depth * (shared.shape[1] - 1), cuda.blockDim.x):
        r, d = x // depth, x % depth
        if first + r < limit and offset + d < width:
            shared[d, r] = number(source[first + r, offset + d])
        else:
            shared[d, r] = number(0)


@device
def stage_slab(shared, source, first, limit, offset):
    """Copy some columns of some rows of `source`, as ``shared[row, column]``, likewise."""
    number = shared.dtype.type
    columns, width = shared.shape[1], source.shape[1]
    for x in range(cuda.threadIdx.x, shared.shape[0] * columns, cuda.blockDim.x):
        r, c = x // columns, x % columns
        if first + r < limit and offset + c < width:
            shared[r, c] = number(source[first + r, offset + c])
        else:
            shared[r, c] = number(0)


@device
def add_outer(total, left, x, right, y, row, column, down, across):
    """Add the outer product of a thread's part of ``left[x]`` and ``right[y]``."""
    for c in range(total.shape[1]):
        value = right[y, column + c * across]
        for a in range(total.shape[0]):
            total[a, c] += left[x, row + a * down] * value


@device
def add_scores(total, q, k, i0, queries, j0, keys, left, right, row, column, down, across):
    """Add to total[a, c] the product of a row of q and a row of k, both from `left` and `right`.

    Also with dout for q and v for k, for the gradients of the weights.
    """
    for offset in range(0, q.shape[1], left.shape[0]):
        stage_slice(left, q, i0, queries, offset)
        stage_slice(right, k, j0, keys, offset)
        cuda.syncthreads()
        # four steps for one round of the loop, which takes instructions of its own
        for d in range(0, left.shape[0], 4):
            add_outer(total, left, d, right, d, row, column, down, across)
            add_outer(total, left, d + 1, right, d + 1, row, column, down, across)
            add_outer(total, left, d + 2, right, d + 2, row, column, down, across)
            add_outer(total, left, d + 3, right, d + 3, row, column, down, across)
        cuda.syncthreads()


@device
def add_weighted(total, weights, seen, whole, values, first, limit, offset, slab, row, column, down,
                 across):
    """Add to total[a] the rows of `values` from `first` on, ``weights[column, row]`` times each.

    Weights of pairs that are not `seen` are 0, but 0 times NaN is NaN: unless the tile is `whole`,
    such pairs are passed over.
    """
    for start in range(0, seen.shape[0], slab.shape[0]):
        stage_slab(slab, values, first + start, limit, offset)
        cuda.syncthreads()
        if whole:
            for y in range(0, slab.shape[0], 4):
                x = start + y
                add_outer(total, weights, x, slab, y, row, column, down, across)
                add_outer(total, weights, x + 1, slab, y + 1, row, column, down, across)
                add_outer(total, weights, x + 2, slab, y + 2, row, column, down, across)
                add_outer(total, weights, x + 3, slab, y + 3, row, column, down, across)
        else:
            for y in range(slab.shape[0]):
                for a in range(total.shape[0]):
                    if seen[start + y, row + a * down]:
                        weight = weights[start + y, row + a * down]
                        for c in range(total.shape[1]):
                            total[a, c] += weight * slab[y, column + c * across]
        cuda.syncthreads()
