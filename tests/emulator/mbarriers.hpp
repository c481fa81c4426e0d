// Barriers in shared memory, copies by tensor map, and the way by which copies and products of a
// warpgroup read shared memory: they do not see a thread's stores before a fence.
#pragma once

#include <map>

#include "emulator.hpp"

namespace emulator {

// ---- stores that a fence has yet to follow

struct Store {
    u16 thread = 0;     // 1 + the thread, 0: none
    u32 fences = 0;     // how many fences it had made
};

static std::vector<Store> stores;       // of each 16 bytes, the last one
static std::vector<u32> fences;         // of each thread

static void note_store(u32 address, u32 bytes) {
    stores[cell_of(address)] = {u16(current->index + 1), fences[current->index]};
}

static void check_fenced(u32 address, const char* reader, Site site) {
    const Store& store = stores[cell_of(address)];
    if (store.thread != 0 && fences[store.thread - 1] == store.fences) {
        fail("missing proxy fence: a " + std::string(reader) + " (" + site.text()
             + ") meets shared bytes from " + std::to_string(address - SHARED_BASE)
             + " on, which thread " + std::to_string(store.thread - 1)
             + " stored with no async_proxy_fence after it");
    }
}

// ---- barriers

struct Mbarrier {
    u32 count;
    int arrived;
    i64 bytes;          // expected less come
    u32 phase;
    int maker;
    u32 fences;         // the maker's, then
    std::vector<u32> coming, ended;     // clocks
    std::vector<Thread*> asleep;
    std::vector<bool> known;            // to which threads, in the right order
};

static std::map<u32, Mbarrier> mbarriers;

static std::string name_of_mbarrier(u32 address) {
    return "mbarrier at shared base + " + std::to_string(i64(address) - SHARED_BASE);
}

static Mbarrier& mbarrier_at(u32 address, Site site) {
    const auto found = mbarriers.find(address);
    if (found == mbarriers.end()) {
        fail_here(name_of_mbarrier(address) + " is used before it was initialised", site);
    }
    Mbarrier& barrier = found->second;
    if (current != nullptr && !barrier.known[current->index]) {
        barrier.known[current->index] = true;
        note_shared(address, 8, Access::READ, current->index, site);
    }
    return barrier;
}

static void make_mbarrier(u32 address, u32 count, Site site) {
    access_shared(address, 8, Access::WRITE, site);
    if (count == 0) {
        fail_here(name_of_mbarrier(address) + " of no arrivals", site);
    }
    Mbarrier& barrier = mbarriers[address];
    barrier = Mbarrier();
    barrier.count = count;
    barrier.maker = current->index;
    barrier.fences = fences[current->index];
    barrier.known.assign(block.threads, false);
}

static void end_phase(Mbarrier& barrier) {
    if (barrier.arrived < int(barrier.count) || barrier.bytes != 0) {
        return;
    }
    barrier.phase++;
    barrier.arrived = 0;
    barrier.ended = barrier.coming;
    note_progress();
    std::vector<Thread*> woken;
    woken.swap(barrier.asleep);
    for (Thread* thread : woken) {
        wake(thread);
    }
}

static void arrive_at_mbarrier(u32 address, i64 bytes, Site site) {
    Mbarrier& barrier = mbarrier_at(address, site);
    if (barrier.arrived == int(barrier.count)) {
        fail_here(name_of_mbarrier(address) + " has had all of its "
                  + std::to_string(barrier.count) + " arrivals of this phase", site);
    }
    if (options.races) {
        clocks.release(current->index, barrier.coming);
    }
    barrier.arrived++;
    barrier.bytes += bytes;
    end_phase(barrier);
}

static void wait_at_mbarrier(u32 address, u32 parity, Site site) {
    Mbarrier& barrier = mbarrier_at(address, site);
    while ((barrier.phase & 1) == (parity & 1)) {
        barrier.asleep.push_back(current);
        wait_for({"mbarrier", address, site, &barrier.arrived, int(barrier.count)});
    }
    if (options.races) {
        clocks.acquire(current->index, barrier.ended);
    }
}

// ---- copies by tensor map

// What EmulatedDevice puts in the driver's place.
struct DescribedArray {
    static constexpr u64 MAGIC = 0x70616d726f736e74;

    u64 magic;
    u64 address;
    u64 sizes[4];       // columns, tokens, heads, items
    u64 strides[4];     // in bytes
    u32 columns, rows;  // of a box
};

static constexpr int COPIERS = 16;
static const int copiers = add_agents(COPIERS);
static int next_copier;

static void land_box(const DescribedArray& array, u32 to, const i64 (&from)[4], int copier,
                     Site site) {
    for (u32 row = 0; row < array.rows; row++) {
        for (u32 column = 0; column < array.columns; column += 8) {
            u16 chunk[8];
            for (u32 i = 0; i < 8; i++) {
                const u64 place[4] = {u64(from[0] + column + i), u64(from[1] + row), u64(from[2]),
                                      u64(from[3])};
                bool inside = true;
                u64 at = array.address;
                for (int axis = 0; axis < 4; axis++) {
                    inside &= place[axis] < array.sizes[axis];
                    at += place[axis] * array.strides[axis];
                }
                chunk[i] = inside ? *reinterpret_cast<const u16*>(at) : 0;
            }
            u32 address = to + row * 128 + column * 2;
            address ^= (address >> 7 & 7) << 4;
            note_landing(address, 16, copier, site);
            memcpy(shared_bytes_at(address), chunk, 16);
        }
    }
}

static void start_box(u32 to, const void* map, u32 mbarrier, const i64 (&from)[4], Site site) {
    DescribedArray array;
    memcpy(&array, map, sizeof array);
    if (u64(map) % 64 != 0 || array.magic != DescribedArray::MAGIC) {
        fail_here("no tensor map, or not at a multiple of 64 bytes", site);
    }
    if (array.columns != 64) {
        fail_here("boxes of 64 columns are emulated; got " + std::to_string(array.columns), site);
    }
    if (to % 128 != 0) {
        fail_here("misaligned: a box goes to a multiple of 128", site);
    }
    if (fences[mbarrier_at(mbarrier, site).maker] == mbarrier_at(mbarrier, site).fences) {
        fail_here(name_of_mbarrier(mbarrier) + " is told to a copy, with no mbarrier_fence since "
                  "it was initialised", site);
    }
    statistics.tma++;
    const u32 bytes = array.rows * 128;
    const int copier = block.threads + next_copier;
    next_copier = (next_copier + 1) % COPIERS;
    if (options.races) {
        clocks.fork(current->index, copier);
    }
    for (u32 address = to; address < to + bytes; address += 16) {
        check_place(address, 16, site);
        check_fenced(address, "copy", site);
        note_flight(address, 16, copier, site);
        stores[cell_of(address)] = Store();
    }
    memset(shared_bytes_at(to), POISON, bytes);
    start_agent([=] {
        land_box(array, to, from, copier, site);
        Mbarrier& barrier = mbarrier_at(mbarrier, site);
        if (options.races) {
            clocks.release(copier, barrier.coming);
        }
        barrier.bytes -= bytes;
        end_phase(barrier);
    });
}

}  // namespace emulator
