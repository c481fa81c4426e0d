// Products of a warpgroup. They run as late as they may: when they are waited for. Until then sums
// are poison, and neither they nor operands in registers may be touched.
#pragma once

#include <deque>

#include "formats.hpp"
#include "mbarriers.hpp"

namespace emulator {

static constexpr int GROUP_THREADS = 128;

// What is said of a product by all threads alike.
struct Product {
    u64 a, b;
    int columns;
    bool a_in_registers, b_mn_major, bfloat, add;
    Site site;

    bool operator==(const Product& other) const {
        return a == other.a && b == other.b && columns == other.columns
            && a_in_registers == other.a_in_registers && b_mn_major == other.b_mn_major
            && bfloat == other.bfloat && add == other.add && site == other.site;
    }
};

// What one thread brings to it.
struct Share {
    float* sums;
    const u32* a;
    u32 saved[4];
};

struct Issued {
    Product product;
    Share shares[GROUP_THREADS];
};

// A thread's sums under way: what they are, while the thread's own array is poison.
struct Flight {
    float* sums;
    int count;
    int products;
    float values[128];
};

struct ThreadOfGroup {
    bool fenced = false;
    std::vector<std::pair<Product, Share>> open;
    std::vector<Flight> flights;
};

struct Warpgroup {
    Meeting meeting;
    std::deque<std::vector<Issued>> groups;
    ThreadOfGroup threads[GROUP_THREADS];
    int registers = 0;
};

static std::vector<Warpgroup> warpgroups;

static Warpgroup& own_group() {
    return warpgroups[current->index / GROUP_THREADS];
}

static ThreadOfGroup& own_thread() {
    return own_group().threads[current->index % GROUP_THREADS];
}

template <class Together>
static void meet_group(const char* what, Site site, Together together) {
    meet(own_group().meeting, GROUP_THREADS, what, site, together);
}

static void start_hopper_block() {
    stores.assign((block.shared_bytes + 15) / 16, Store());
    fences.assign(block.threads, 1);
    mbarriers.clear();
    next_copier = 0;
    warpgroups.clear();
    warpgroups.resize((block.threads + GROUP_THREADS - 1) / GROUP_THREADS);
}

static const bool hooked = [] {
    on_block = start_hopper_block;
    on_store = note_store;
    return true;
}();

// ---- sums under way

// A signalling NaN: any arithmetic makes another one of it.
static constexpr u32 UNDER_WAY = 0x7f80dead;

static bool untouched(const Flight& flight) {
    for (int i = 0; i < flight.count; i++) {
        if (bits_as<u32>(flight.sums[i]) != UNDER_WAY) {
            return false;
        }
    }
    return true;
}

static Flight& flight_of(ThreadOfGroup& thread, float* sums, int count) {
    for (Flight& flight : thread.flights) {
        if (flight.sums == sums) {
            return flight;
        }
    }
    Flight flight = {sums, count, 0, {}};
    memcpy(flight.values, sums, count * sizeof(float));
    const u32 poison = UNDER_WAY;
    for (int i = 0; i < count; i++) {
        memcpy(&sums[i], &poison, sizeof poison);
    }
    thread.flights.push_back(flight);
    return thread.flights.back();
}

static __attribute__((noinline)) void issue_product(const Product& product, float* sums,
                                                    const u32* a) {
    ThreadOfGroup& thread = own_thread();
    if (!thread.fenced) {
        fail_here("missing wgmma_fence: a product after a wait, or the first one", product.site);
    }
    for (u64 descriptor : {product.a, product.b}) {
        if ((descriptor != product.a || !product.a_in_registers) && descriptor >> 62 != 1) {
            fail_here("matrix descriptor: the 128-byte swizzle is emulated", product.site);
        }
    }
    Flight& flight = flight_of(thread, sums, product.columns / 2);
    if (!untouched(flight)) {
        fail_here("sums of a product are touched while it is under way", product.site);
    }
    flight.products++;
    Share share = {sums, a, {}};
    if (a != nullptr) {
        memcpy(share.saved, a, sizeof share.saved);
    }
    thread.open.push_back({product, share});
}

// ---- operands in shared memory

// Where eight neighbouring elements of an operand lie. K-major: row `mn`, from `k` on; MN-major:
// rows `mn` on of column `k`.
static u32 chunk_address(u64 descriptor, int mn, int k, bool mn_major) {
    const u32 start = u32(descriptor & 0x3fff) << 4;
    const u32 leading = u32(descriptor >> 16 & 0x3fff) << 4;
    const u32 stride = u32(descriptor >> 32 & 0x3fff) << 4;
    const u32 address = mn_major
        ? start + mn / 64 * leading + k / 8 * stride + k % 8 * 128 + mn % 64 * 2
        : start + mn / 8 * stride + mn % 8 * 128 + k * 2;
    return address ^ (address >> 7 & 7) << 4;
}

// Calls visit(address, mn, k) for each chunk of an operand of `rows` x 16.
template <class Visit>
static void visit_chunks(u64 descriptor, int rows, bool mn_major, Visit visit) {
    for (int mn = 0; mn < rows; mn += mn_major ? 8 : 1) {
        for (int k = 0; k < 16; k += mn_major ? 1 : 8) {
            visit(chunk_address(descriptor, mn, k, mn_major), mn, k);
        }
    }
}

static void note_operand(u64 descriptor, int rows, bool mn_major, Site site) {
    visit_chunks(descriptor, rows, mn_major, [&](u32 address, int, int) {
        check_place(address, 16, site);
        check_fenced(address, "product", site);
        note_shared(address, 16, Access::READ, current->index, site);
    });
}

static void note_operands(const Product& product) {
    if (!product.a_in_registers) {
        note_operand(product.a, 64, false, product.site);
    }
    note_operand(product.b, product.columns, product.b_mn_major, product.site);
}

static float element(u16 bits, bool bfloat) {
    return bfloat ? float_of_bf16(bits) : float_of_f16(bits);
}

// to[mn][k]
static void read_operand(float (*to)[16], u64 descriptor, int rows, bool mn_major, bool bfloat) {
    visit_chunks(descriptor, rows, mn_major, [&](u32 address, int mn, int k) {
        u16 bits[8];
        memcpy(bits, shared_bytes_at(address), sizeof bits);
        for (int i = 0; i < 8; i++) {
            to[mn + (mn_major ? i : 0)][k + (mn_major ? 0 : i)] = element(bits[i], bfloat);
        }
    });
}

// ---- execution

static void execute(Warpgroup& group, const Issued& issued) {
    const Product& product = issued.product;
    note_operands(product);
    statistics.wgmma++;
    float a[64][16];
    float b[128][16];
    Float8 right[16][16];       // [k][column / 8]
    if (!product.a_in_registers) {
        read_operand(a, product.a, 64, false, product.bfloat);
    }
    read_operand(b, product.b, product.columns, product.b_mn_major, product.bfloat);
    const int blocks = product.columns / 8;
    for (int k = 0; k < 16; k++) {
        for (int column = 0; column < product.columns; column++) {
            right[k][column / 8][column % 8] = b[column][k];
        }
    }
    float* values[GROUP_THREADS];
    for (int thread = 0; thread < GROUP_THREADS; thread++) {
        const Share& share = issued.shares[thread];
        values[thread] = flight_of(group.threads[thread], share.sums, product.columns / 2).values;
        if (!product.a_in_registers) {
            continue;
        }
        if (memcmp(share.a, share.saved, sizeof share.saved) != 0) {
            fail_here("operands of a product are touched while it is under way", product.site);
        }
        const int row = thread / 32 * 16 + thread % 32 / 4;
        const int column = thread % 4 * 2;
        for (int i = 0; i < 4; i++) {
            for (int e = 0; e < 2; e++) {
                a[row + i % 2 * 8][column + i / 2 * 8 + e] =
                    element(u16(share.saved[i] >> 16 * e), product.bfloat);
            }
        }
    }
    for (int row = 0; row < 64; row++) {
        Float8 sums[16];
        float* owners[4];
        const int first = row / 16 * 32 + row % 8 * 4;
        const int half = row % 16 / 8 * 2;
        for (int i = 0; i < 4; i++) {
            owners[i] = values[first + i] + half;
        }
        for (int i = 0; i < blocks; i++) {
            for (int column = 0; column < 8; column++) {
                sums[i][column] = product.add ? owners[column / 2][4 * i + column % 2] : 0.0f;
            }
        }
        for (int k = 0; k < 16; k++) {
            for (int i = 0; i < blocks; i++) {
                sums[i] += a[row][k] * right[k][i];
            }
        }
        for (int i = 0; i < blocks; i++) {
            for (int column = 0; column < 8; column++) {
                owners[column / 2][4 * i + column % 2] = sums[i][column];
            }
        }
    }
    for (int thread = 0; thread < GROUP_THREADS; thread++) {
        std::vector<Flight>& flights = group.threads[thread].flights;
        for (size_t i = 0; i < flights.size(); i++) {
            if (flights[i].sums != issued.shares[thread].sums || --flights[i].products > 0) {
                continue;
            }
            if (!untouched(flights[i])) {
                fail_here("sums of a product are touched while it is under way", product.site);
            }
            memcpy(flights[i].sums, flights[i].values, flights[i].count * sizeof(float));
            flights.erase(flights.begin() + i);
            break;
        }
    }
}

static void close_group_together(Warpgroup& group, Site site) {
    const std::vector<std::pair<Product, Share>>& first = group.threads[0].open;
    std::vector<Issued> issued(first.size());
    for (int thread = 0; thread < GROUP_THREADS; thread++) {
        std::vector<std::pair<Product, Share>>& open = group.threads[thread].open;
        if (open.size() != first.size()) {
            fail_here("threads of a warpgroup close groups of unlike products", site);
        }
        for (size_t i = 0; i < open.size(); i++) {
            if (!(open[i].first == first[i].first)) {
                fail_here("threads of a warpgroup describe a product in unlike ways",
                          open[i].first.site);
            }
            issued[i].product = open[i].first;
            issued[i].shares[thread] = open[i].second;
        }
    }
    for (ThreadOfGroup& thread : group.threads) {
        thread.open.clear();
    }
    for (const Issued& each : issued) {
        note_operands(each.product);
    }
    group.groups.push_back(std::move(issued));
}

static __attribute__((noinline)) void close_group(Site site) {
    meet_group("wgmma_commit", site, [&] { close_group_together(own_group(), site); });
}

static __attribute__((noinline)) void wait_for_groups(int left, Site site) {
    own_thread().fenced = false;
    meet_group("wgmma_wait", site, [&] {
        Warpgroup& group = own_group();
        while (int(group.groups.size()) > left) {
            for (const Issued& issued : group.groups.front()) {
                execute(group, issued);
            }
            group.groups.pop_front();
        }
    });
}

// ---- registers

static constexpr int REGISTERS = 65536 / GROUP_THREADS;

static void set_registers(int count, bool increase, Site site) {
    if (count % 8 != 0 || count < 24 || count > 256) {
        fail_here("registers of a warpgroup: a multiple of 8 from 24 to 256; got "
                  + std::to_string(count), site);
    }
    meet_group(increase ? "register_increase" : "register_decrease", site, [&] {
        const int even = REGISTERS / int(warpgroups.size()) / 8 * 8;
        Warpgroup& group = own_group();
        const int before = group.registers == 0 ? even : group.registers;
        if (increase ? count < before : count > before) {
            fail_here("registers of a warpgroup: " + std::to_string(before) + " are not "
                      + (increase ? "increased" : "decreased") + " to " + std::to_string(count),
                      site);
        }
        group.registers = count;
        int sum = 0;
        for (const Warpgroup& other : warpgroups) {
            sum += other.registers;
        }
        if (sum > REGISTERS) {
            fail_here("registers of the warpgroups are " + std::to_string(sum * GROUP_THREADS)
                      + ", more than 65536", site);
        }
    });
}

}  // namespace emulator
