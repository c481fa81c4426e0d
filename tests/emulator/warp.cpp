// What the 32 lanes of a warp do together.
#include "emulator.hpp"
#include "formats.hpp"

namespace emulator {

template <class Together>
static void meet_warp(const char* what, Site site, Together together) {
    meet(current->warp->meeting, WARP, what, site, together);
}

static void want_whole_warp(u32 mask, const char* what, Site site) {
    if (mask != 0xffffffffu) {
        fail_here(std::string(what) + " of some lanes only: not emulated", site);
    }
}

void synchronise_warp(u32 mask, Site site) {
    want_whole_warp(mask, "__syncwarp", site);
    meet_warp("__syncwarp", site, [] {
        note_progress();
        join_members(current->warp->meeting, WARP);
    });
}

// Each lane gets what lane `source` brings.
u64 exchange(u32 mask, u64 bits, int source, const char* what, Site site) {
    want_whole_warp(mask, what, site);
    Warp& warp = *current->warp;
    warp.brought[current->lane] = bits;
    meet_warp(what, site, [&] { memcpy(warp.shuffled, warp.brought, sizeof warp.shuffled); });
    return warp.shuffled[source];
}

u32 ballot(u32 mask, bool vote, const char* what, Site site) {
    want_whole_warp(mask, what, site);
    Warp& warp = *current->warp;
    warp.brought[current->lane] = vote;
    meet_warp(what, site, [&] {
        u32 votes = 0;
        for (int lane = 0; lane < WARP; lane++) {
            votes |= u32(warp.brought[lane]) << lane;
        }
        warp.shuffled[0] = votes;
    });
    return u32(warp.shuffled[0]);
}

// ---- ldmatrix

// Turns that the eight rows of one matrix take beyond the first: rows that lie in the same 16 bytes
// of the 128 that all banks have cannot be read at once.
static int extra_turns(const u32* rows) {
    int most = 1;
    for (int i = 0; i < 8; i++) {
        int turns = 1;
        for (int j = 0; j < i; j++) {
            turns += rows[j] / 16 % 8 == rows[i] / 16 % 8 && rows[j] != rows[i];
        }
        most = std::max(most, turns);
    }
    return most - 1;
}

static void read_matrices(Warp& warp, bool transposed) {
    statistics.matrix_loads++;
    for (int matrix = 0; matrix < 4; matrix++) {
        const u32* rows = warp.rows + matrix * 8;
        statistics.matrix_conflicts += extra_turns(rows);
        u16 elements[8][8];
        for (int row = 0; row < 8; row++) {
            memcpy(elements[row], shared_bytes_at(rows[row]), 16);
        }
        for (int lane = 0; lane < WARP; lane++) {
            const int group = lane / 4;
            const int pair = lane % 4 * 2;
            const u16 low = transposed ? elements[pair][group] : elements[group][pair];
            const u16 high = transposed ? elements[pair + 1][group] : elements[group][pair + 1];
            warp.fragments[lane][matrix] = low | u32(high) << 16;
        }
    }
}

void load_matrices(u32 (&r)[4], u32 row, bool transposed, Site site) {
    statistics.accesses++;
    check_place(row, 16, site);
    note_shared(row, 16, Access::READ, current->index, site);
    Warp& warp = *current->warp;
    warp.rows[current->lane] = row;
    meet_warp(transposed ? "load_matrix_x4_transposed" : "load_matrix_x4", site,
              [&] { read_matrices(warp, transposed); });
    memcpy(r, warp.fragments[current->lane], sizeof r);
}

// ---- mma: lanes put their elements where they belong, the last one multiplies

template <int DEPTH>
static void multiply(Warp& warp) {
    statistics.mma++;
    for (int row = 0; row < 16; row++) {
        Float8 sum = {};
        for (int k = 0; k < DEPTH; k++) {
            sum += warp.left[row][k] * warp.right[k];
        }
        warp.product[row] = sum;
    }
}

static void add_product(float (&c)[4]) {
    const Warp& warp = *current->warp;
    const int group = current->lane / 4;
    const int pair = current->lane % 4 * 2;
    c[0] += warp.product[group][pair];
    c[1] += warp.product[group][pair + 1];
    c[2] += warp.product[group + 8][pair];
    c[3] += warp.product[group + 8][pair + 1];
}

template <float (*FLOAT_OF)(u16)>
static void multiply_16_bits(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, const char* what,
                             Site site) {
    Warp& warp = *current->warp;
    const int group = current->lane / 4;
    const int pair = current->lane % 4 * 2;
    for (int half = 0; half < 2; half++) {
        const int shift = 16 * half;
        warp.left[group][pair + half] = FLOAT_OF(u16(a[0] >> shift));
        warp.left[group + 8][pair + half] = FLOAT_OF(u16(a[1] >> shift));
        warp.left[group][pair + 8 + half] = FLOAT_OF(u16(a[2] >> shift));
        warp.left[group + 8][pair + 8 + half] = FLOAT_OF(u16(a[3] >> shift));
        warp.right[pair + half][group] = FLOAT_OF(u16(b0 >> shift));
        warp.right[pair + 8 + half][group] = FLOAT_OF(u16(b1 >> shift));
    }
    meet_warp(what, site, [&] { multiply<16>(warp); });
    add_product(c);
}

void multiply_f16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, Site site) {
    multiply_16_bits<float_of_f16>(c, a, b0, b1, "mma_f16", site);
}

void multiply_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, Site site) {
    multiply_16_bits<float_of_bf16>(c, a, b0, b1, "mma_bf16", site);
}

void multiply_tf32(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, Site site) {
    Warp& warp = *current->warp;
    const int group = current->lane / 4;
    const int column = current->lane % 4;
    warp.left[group][column] = float_of_tf32(a[0]);
    warp.left[group + 8][column] = float_of_tf32(a[1]);
    warp.left[group][column + 4] = float_of_tf32(a[2]);
    warp.left[group + 8][column + 4] = float_of_tf32(a[3]);
    warp.right[column][group] = float_of_tf32(b0);
    warp.right[column + 4][group] = float_of_tf32(b1);
    meet_warp("mma_tf32", site, [&] { multiply<8>(warp); });
    add_product(c);
}

void multiply_f64(double (&c)[2], double a, double b, Site site) {
    Warp& warp = *current->warp;
    const int group = current->lane / 4;
    const int column = current->lane % 4;
    warp.left64[group][column] = a;
    warp.right64[column][group] = b;
    meet_warp("mma_f64", site, [&] {
        statistics.mma++;
        for (int row = 0; row < 8; row++) {
            Double8 sum = {};
            for (int k = 0; k < 4; k++) {
                sum += warp.left64[row][k] * warp.right64[k];
            }
            warp.product64[row] = sum;
        }
    });
    c[0] += warp.product64[group][column * 2];
    c[1] += warp.product64[group][column * 2 + 1];
}

}  // namespace emulator
