// Executes CUDA C++ kernels on the CPU, one block after the other, each thread as a fiber.
//
// Kernels reach everything beyond plain C++ through primitives.cuh, whose host version (beside this
// file) calls what is here. So each access to shared memory, each barrier and each collective of a
// warp is seen and judged: races, bounds, alignment, bytes that were never written, threads that
// never meet. What the hardware may do late is done as late as it may: copies arrive when they are
// waited for, and until then their bytes are poison. The first finding ends the launch.
//
// More primitives are built on these parts:
//   wait_for, wake             a thread sleeps until another (or an agent) wakes it
//   agents                     work beside the threads; runs when no thread can, or by chance
//   Meeting                    threads that do something together (a warp, or 128 threads)
//   clocks.release / acquire   what one knows is handed on by a sync object; agents have clocks of
//   clocks.fork, add_agents    their own, which start from what a thread knows
//   note_shared, check_place   judge an access to shared memory, by threads or agents
//   fail                       report a finding
#pragma once

#include <deque>
#include <functional>
#include <string>
#include <vector>

#include "conflicts.hpp"
#include "fibers.hpp"
#include "language.hpp"
#include "races.hpp"
#include "site.hpp"

#define EMULATOR_SITE emulator::Site site = emulator::Site::here()

namespace emulator {

// ---- what a launch is given and gives back (device.py has the same)

struct Region {
    u64 address;
    u64 bytes;
};

struct Options {
    u32 seed;           // 0: threads and blocks in order; others shuffle both
    u32 races;          // run the race detector
    u32 uninitialised;  // allow reads of shared memory that nobody has written
    u32 conflicts;      // count bank conflicts of ordinary accesses too
    u64 step_limit;     // accesses of a block between two synchronisations, before it is a livelock
    u64 region_count;   // what global memory may be copied from; 0: anything
    const Region* regions;
};

#define EMULATOR_STATISTICS(X) \
    X(mma) X(matrix_loads) X(matrix_conflicts) X(access_conflicts) X(accesses) X(copies) \
    X(barriers) X(collectives) X(switches) X(wgmma) X(tma)

struct Statistics {
#define EMULATOR_FIELD(NAME) u64 NAME;
    EMULATOR_STATISTICS(EMULATOR_FIELD)
#undef EMULATOR_FIELD
};

// ---- state: one block at a time

static constexpr u32 SHARED_BASE = 1024;  // not 0, so that an offset is no address by chance
static constexpr int WARP = 32;
static constexpr u8 POISON = 0xff;        // NaN in every format

struct Copy {
    u32 to;
    u32 bytes;
    Site site;
    u8 data[16];
};

// What a thread sleeps for; `number` says which one of them.
struct Waiting {
    const char* what = "";
    u32 number = 0;
    Site site;
    const int* arrived = nullptr;
    int expected = 0;
};

struct Warp;

struct Thread {
    enum State { READY, ASLEEP, DONE };

    Fiber fiber;
    uint3 position;
    int index;
    int lane;
    Warp* warp;
    State state;
    Waiting waiting;
    bool vote;
    u32 steps;
    std::vector<Copy> copies;         // in the order of their issue
    std::vector<size_t> copy_groups;  // how many copies each closed group has
    size_t open_copies;
};

// Threads that come together to do one thing. The last to come does it for all.
struct Meeting {
    const char* what = "";
    int arrived = 0;
    int first = 0;  // the thread that came first
    Site site;
    Thread* members[128];
};

typedef float Float8 __attribute__((vector_size(32)));
typedef double Double8 __attribute__((vector_size(64)));

struct Warp {
    Meeting meeting;
    u64 lane_values[WARP];       // shuffles: what lanes bring
    u64 shuffled[WARP];          // and what they all may read until the next one
    u32 rows[WARP];              // ldmatrix: addresses
    u32 fragments[WARP][4];
    float left[16][16];          // mma: a, b, a b
    Float8 right[16];
    Float8 product[16];
    double left64[8][4];
    Double8 right64[4];
    Double8 product64[8];
};

struct Barrier {
    int arrived = 0;
    int expected = 0;
    Site site;
    std::vector<Thread*> asleep;
    std::vector<u32> clocks;
    std::vector<int> lanes_of_warp;
};

static constexpr int NAMED_BARRIERS = 16;

struct Block {
    uint3 grid;
    uint3 size;
    uint3 index;
    int threads;
    int live;
    u32 shared_bytes;
    Barrier barrier;
    bool vote;
    Barrier named[NAMED_BARRIERS];
    u64 random;
    u64 steps;  // since the last synchronisation
};

static Options options;
static Statistics statistics;
static Block block;
static std::vector<Thread> threads;
static std::vector<Warp> warps;
static std::vector<u8> shared;   // what address SHARED_BASE and the following ones hold
static std::vector<u8> written;  // of each 16 bytes, which pairs
static Clocks clocks;
static Shadow shadow;
static ConflictCounter conflict_counter;
static Stacks stacks;
static Fiber scheduler;
static Thread* current;  // null while the scheduler runs
static std::string finding;
static std::deque<std::function<void()>> agents;
static int agent_count;  // actors beside the threads; set before launches by add_agents

struct Stop {};  // thrown where a finding ends the scheduler's own work

// ---- reports

static std::string name_of(int actor) {
    if (actor >= block.threads) {
        return "agent " + std::to_string(actor - block.threads);
    }
    return "thread " + std::to_string(actor);
}

[[noreturn]] static __attribute__((noinline)) void fail(const std::string& message) {
    finding = message;
    if (current == nullptr) {
        throw Stop();
    }
    Thread* failed = current;
    current = nullptr;
    switch_fiber(failed->fiber, scheduler);
    abort();
}

[[noreturn]] static void fail_here(const std::string& message, Site site) {
    fail(message + " (" + (current ? name_of(current->index) + ", " : "") + site.text() + ")");
}

// "0-31, 64" of sorted numbers.
static std::string ranges(const std::vector<int>& numbers) {
    std::string text;
    for (size_t i = 0; i < numbers.size();) {
        size_t end = i + 1;
        while (end < numbers.size() && numbers[end] == numbers[end - 1] + 1) {
            end++;
        }
        text += (i > 0 ? ", " : "") + std::to_string(numbers[i]);
        text += end > i + 1 ? "-" + std::to_string(numbers[end - 1]) : "";
        i = end;
    }
    return text;
}

static std::string sleep_report() {
    std::string report;
    std::vector<bool> told(threads.size());
    for (size_t i = 0; i < threads.size(); i++) {
        if (told[i] || threads[i].state != Thread::ASLEEP) {
            continue;
        }
        const Waiting& waiting = threads[i].waiting;
        std::vector<int> same;
        for (size_t j = i; j < threads.size(); j++) {
            const Waiting& other = threads[j].waiting;
            if (threads[j].state == Thread::ASLEEP && !strcmp(other.what, waiting.what)
                && other.number == waiting.number && other.site == waiting.site
                && other.arrived == waiting.arrived) {
                same.push_back(j);
                told[j] = true;
            }
        }
        report += (report.empty() ? "threads " : "; threads ") + ranges(same) + " wait at "
            + waiting.what + " (" + waiting.site.text();
        if (waiting.arrived != nullptr) {
            report += ", " + std::to_string(*waiting.arrived) + " of "
                + std::to_string(waiting.expected) + " have come";
        }
        report += ")";
    }
    return report;
}

// ---- scheduling: who runs next

static u32 random_number() {
    block.random ^= block.random << 13;
    block.random ^= block.random >> 7;
    block.random ^= block.random << 17;
    return u32(block.random >> 32);
}

// Threads that can run. The seed says which one does: the one that waits longest (0), any (1, 4,
// ...), the one that was woken last, so that a warp runs far ahead of the others (2, 5, ...), or the
// one that waits longest after a shuffled start (3, 6, ...).
class ReadyThreads {
public:
    static constexpr u32 CAPACITY = 2048;  // a power of two, at least the threads of a block

    void clear() {
        head = tail = 0;
    }

    bool empty() const {
        return head == tail;
    }

    void add(Thread* thread) {
        places[tail++ % CAPACITY] = thread;
    }

    Thread* take() {
        if (options.seed == 0 || options.seed % 3 == 0) {
            return places[head++ % CAPACITY];
        }
        if (options.seed % 3 == 2) {
            return places[--tail % CAPACITY];
        }
        const u32 chosen = (head + random_number() % (tail - head)) % CAPACITY;
        Thread* thread = places[chosen];
        places[chosen] = places[head++ % CAPACITY];
        return thread;
    }

    void shuffle() {
        for (u32 i = tail - head; i > 1; i--) {
            std::swap(places[(head + i - 1) % CAPACITY],
                      places[(head + random_number() % i) % CAPACITY]);
        }
    }

private:
    u32 head = 0;
    u32 tail = 0;
    Thread* places[CAPACITY];
};

static ReadyThreads ready;

// Hands over to the next thread, or to the scheduler, which lets an agent run or ends the block.
static __attribute__((noinline)) void hand_over() {
    statistics.switches++;
    Thread* before = current;
    const bool agent = !agents.empty() && options.seed != 0 && random_number() % 16 == 0;
    if (ready.empty() || agent) {
        current = nullptr;
        switch_fiber(before->fiber, scheduler);
        return;
    }
    Thread* next = ready.take();
    if (next != before) {
        current = next;
        switch_fiber(before->fiber, next->fiber);
    }
}

static void wake(Thread* thread) {
    thread->state = Thread::READY;
    ready.add(thread);
}

// Until somebody wakes this thread.
static void wait_for(const Waiting& waiting) {
    current->waiting = waiting;
    current->state = Thread::ASLEEP;
    hand_over();
}

// Threads synchronised: whatever they spin for may have changed.
static void note_progress() {
    block.steps = 0;
}

static __attribute__((noinline)) void pause_spinning(Site site) {
    block.steps += current->steps;
    current->steps = 0;
    if (block.steps > options.step_limit) {
        fail_here("livelock: " + std::to_string(block.steps)
                  + " accesses to shared memory and nobody synchronised", site);
    }
    ready.add(current);
    hand_over();
}

// ---- shared memory

static u8* shared_bytes_at(u32 address) {
    return shared.data() + (address - SHARED_BASE);
}

static u32 cell_of(u32 address) {
    return (address - SHARED_BASE) / Shadow::CELL_BYTES;
}

// The pairs of bytes, of the 16 around them, that [address, address + bytes) has.
static u8 pairs_of(u32 address, u32 bytes) {
    return u8(((1u << (bytes / 2)) - 1) << (address % Shadow::CELL_BYTES / 2));
}

static const char* verb_of(Access access) {
    return access == Access::READ ? "reads" : access == Access::WRITE ? "writes" : "copies to";
}

[[noreturn]] static __attribute__((noinline)) void report_race(
        u32 address, u32 bytes, Access access, int actor, Site site, const Entry& other) {
    const std::string where = "shared bytes " + std::to_string(address - SHARED_BASE) + " to "
        + std::to_string(address - SHARED_BASE + bytes);
    std::string earlier = name_of(other.actor);
    if (other.access == Access::FLIGHT) {
        earlier = "a copy of " + earlier + " is still under way to (" + other.site.site().text()
            + ")";
    } else {
        earlier += std::string(other.access == Access::WRITE ? " wrote" : " read") + " ("
            + other.site.site().text() + "), with nothing that orders the two";
    }
    fail("race: " + name_of(actor) + " " + verb_of(access) + " " + where + " (" + site.text()
         + "), which " + earlier);
}

[[noreturn]] static __attribute__((noinline)) void report_place(u32 address, u32 bytes,
                                                               Site site) {
    const i64 offset = i64(address) - SHARED_BASE;
    if (address % bytes != 0) {
        fail_here("misaligned: shared address base + " + std::to_string(offset)
                  + " is no multiple of " + std::to_string(bytes), site);
    }
    fail_here("out of bounds: " + std::to_string(bytes) + " bytes at shared base + "
              + std::to_string(offset) + ", of " + std::to_string(block.shared_bytes)
              + " that the block has", site);
}

// bytes: 2, 4, 8 or 16.
static inline void check_place(u32 address, u32 bytes, Site site) {
    const u32 offset = address - SHARED_BASE;
    if (address % bytes != 0 || offset >= block.shared_bytes
        || bytes > block.shared_bytes - offset) {
        report_place(address, bytes, site);
    }
}

// To be called after check_place. `actor` may be an agent.
static inline void note_shared(u32 address, u32 bytes, Access access, int actor, Site site) {
    const u32 cell = cell_of(address);
    const u8 pairs = pairs_of(address, bytes);
    if (options.races) {
        const Entry* other = shadow.note(cell, pairs, access, actor, clocks.row(actor),
                                         SiteNumber::of(site));
        if (other != nullptr) {
            report_race(address, bytes, access, actor, site, *other);
        }
    }
    if (access == Access::WRITE) {
        written[cell] |= pairs;
    } else if (access == Access::FLIGHT) {
        written[cell] &= ~pairs;
    } else if ((written[cell] & pairs) != pairs && !options.uninitialised) {
        fail("uninitialised: " + name_of(actor) + " reads shared bytes "
             + std::to_string(address - SHARED_BASE) + " to "
             + std::to_string(address - SHARED_BASE + bytes) + " (" + site.text()
             + "), which nobody has written");
    }
}

static inline void access_shared(u32 address, u32 bytes, Access access, Site site) {
    statistics.accesses++;
    if (++current->steps >= 4096) {
        pause_spinning(site);
    }
    check_place(address, bytes, site);
    note_shared(address, bytes, access, current->index, site);
    if (options.conflicts) {
        conflict_counter.note(current->index, SiteNumber::of(site), address, bytes,
                              access != Access::READ);
    }
}

// ---- copies beside the threads: their bytes are poison until they are waited for

static void check_source(const void* from, u32 bytes, Site site) {
    const u64 address = u64(from);
    if (address % bytes != 0) {
        fail_here("misaligned: global address of a copy is no multiple of "
                  + std::to_string(bytes), site);
    }
    if (options.region_count == 0) {
        return;
    }
    for (u64 i = 0; i < options.region_count; i++) {
        const Region& region = options.regions[i];
        if (address >= region.address && address + bytes <= region.address + region.bytes) {
            return;
        }
    }
    fail_here("out of bounds: a copy reads " + std::to_string(bytes)
              + " bytes of global memory outside of all arrays", site);
}

static void start_copy(u32 to, const void* from, u32 bytes, bool valid, Site site) {
    statistics.copies++;
    access_shared(to, bytes, Access::FLIGHT, site);
    Copy copy = {to, bytes, site, {}};
    if (valid) {
        check_source(from, bytes, site);
        memcpy(copy.data, from, bytes);
    }
    memset(shared_bytes_at(to), POISON, bytes);
    current->copies.push_back(copy);
    current->open_copies++;
}

static void close_copy_group() {
    current->copy_groups.push_back(current->open_copies);
    current->open_copies = 0;
}

static void land_copies(size_t groups_left) {
    Thread& thread = *current;
    if (thread.copy_groups.size() <= groups_left) {
        return;
    }
    const size_t groups = thread.copy_groups.size() - groups_left;
    size_t count = 0;
    for (size_t group = 0; group < groups; group++) {
        count += thread.copy_groups[group];
    }
    for (size_t i = 0; i < count; i++) {
        const Copy& copy = thread.copies[i];
        if (options.races) {
            shadow.land(cell_of(copy.to), pairs_of(copy.to, copy.bytes), thread.index);
        }
        note_shared(copy.to, copy.bytes, Access::WRITE, thread.index, copy.site);
        memcpy(shared_bytes_at(copy.to), copy.data, copy.bytes);
    }
    thread.copies.erase(thread.copies.begin(), thread.copies.begin() + count);
    thread.copy_groups.erase(thread.copy_groups.begin(), thread.copy_groups.begin() + groups);
}

// ---- barriers

static void finish_block_barrier() {
    Barrier& barrier = block.barrier;
    statistics.barriers++;
    note_progress();
    shadow.new_generation();
    if (options.conflicts) {
        statistics.access_conflicts += conflict_counter.count();
    }
    const bool vote = block.vote;
    block.vote = false;
    barrier.arrived = 0;
    current->vote = vote;
    for (Thread* thread : barrier.asleep) {
        thread->vote = vote;
        wake(thread);
    }
    barrier.asleep.clear();
}

// __syncthreads, and __syncthreads_or of `vote`.
static bool synchronise_block(bool vote, const char* what, Site site) {
    Barrier& barrier = block.barrier;
    if (barrier.arrived > 0 && !(barrier.site == site)) {
        fail_here("divergent barrier: " + std::string(what) + ", while "
                  + std::to_string(barrier.arrived) + " threads wait at that of "
                  + barrier.site.text(), site);
    }
    if (block.live < block.threads) {
        fail_here("divergent barrier: " + std::string(what) + " after "
                  + std::to_string(block.threads - block.live) + " threads have returned", site);
    }
    barrier.site = site;
    block.vote |= vote;
    barrier.arrived++;
    if (barrier.arrived < block.threads) {
        barrier.asleep.push_back(current);
        wait_for({what, 0, site, &barrier.arrived, block.threads});
    } else {
        finish_block_barrier();
    }
    return current->vote;
}

static std::string name_of_barrier(int id) {
    return "barrier " + std::to_string(id);
}

static void finish_named_barrier(Barrier& barrier, int id, Site site) {
    statistics.barriers++;
    note_progress();
    for (size_t warp = 0; warp < barrier.lanes_of_warp.size(); warp++) {
        const int lanes = barrier.lanes_of_warp[warp];
        if (lanes != 0 && lanes != WARP) {
            fail_here(name_of_barrier(id) + " is complete with " + std::to_string(lanes)
                      + " threads of warp " + std::to_string(warp) + ": whole warps come", site);
        }
    }
    for (Thread* thread : barrier.asleep) {
        if (options.races) {
            clocks.acquire(thread->index, barrier.clocks);
        }
        if (thread != current) {
            wake(thread);
        }
    }
    barrier = Barrier();
}

static void come_to_named_barrier(int id, int expected, bool waits, Site site) {
    if (id < 1 || id >= NAMED_BARRIERS) {
        fail_here(name_of_barrier(id) + ": named barriers are 1 to 15, 0 is __syncthreads'", site);
    }
    if (expected <= 0 || expected % WARP != 0 || expected > block.threads) {
        fail_here(name_of_barrier(id) + " of " + std::to_string(expected)
                  + " threads: whole warps of the block are wanted", site);
    }
    Barrier& barrier = block.named[id];
    if (barrier.arrived > 0 && barrier.expected != expected) {
        fail_here(name_of_barrier(id) + " of " + std::to_string(expected) + " threads, "
                  + std::to_string(barrier.expected) + " by those who came first", site);
    }
    barrier.expected = expected;
    barrier.lanes_of_warp.resize(warps.size(), 0);
    if (++barrier.lanes_of_warp[current->index / WARP] > WARP) {
        fail_here(name_of_barrier(id) + ": a warp comes twice before it is complete", site);
    }
    if (options.races) {
        clocks.release(current->index, barrier.clocks);
    }
    barrier.arrived++;
    if (waits) {
        barrier.asleep.push_back(current);
    }
    if (barrier.arrived == expected) {
        finish_named_barrier(barrier, id, site);
    } else if (waits) {
        static const char* const names[NAMED_BARRIERS] = {
            "", "barrier 1", "barrier 2", "barrier 3", "barrier 4", "barrier 5", "barrier 6",
            "barrier 7", "barrier 8", "barrier 9", "barrier 10", "barrier 11", "barrier 12",
            "barrier 13", "barrier 14", "barrier 15"};
        wait_for({names[id], u32(id), site, &barrier.arrived, expected});
    }
}

// ---- collectives: `size` threads come with one call, the last one runs `together()`

template <class Together>
static inline void meet(Meeting& meeting, int size, const char* what, Site site,
                        Together together) {
    if (meeting.arrived == 0) {
        meeting.what = what;
        meeting.site = site;
        meeting.first = current->index;
    } else if (meeting.what != what || meeting.site.line != site.line
               || !(meeting.site == site)) {
        fail_here("divergent collective: " + std::string(what) + ", while thread "
                  + std::to_string(meeting.first) + " waits at " + meeting.what + " of "
                  + meeting.site.text(), site);
    }
    meeting.members[meeting.arrived++] = current;
    if (meeting.arrived < size) {
        wait_for({what, u32(current->index / size), site, &meeting.arrived, size});
        return;
    }
    statistics.collectives++;
    together();
    meeting.arrived = 0;
    for (int i = 0; i < size - 1; i++) {
        wake(meeting.members[i]);
    }
}

// All members know afterwards what each of them knew before.
static void join_members(Meeting& meeting, int size) {
    if (!options.races) {
        return;
    }
    std::vector<u32> together;
    for (int i = 0; i < size; i++) {
        clocks.release(meeting.members[i]->index, together);
    }
    for (int i = 0; i < size; i++) {
        clocks.acquire(meeting.members[i]->index, together);
    }
}

// ---- launches

// So many actors beside the threads have clocks; to be called when the program is loaded.
static int add_agents(int count) {
    agent_count += count;
    return count;
}

static void (*run_kernel)();

static void run_thread() {
    run_kernel();
    current->state = Thread::DONE;
    block.live--;
    note_progress();
    if (block.barrier.arrived > 0) {
        fail("divergent barrier: " + name_of(current->index) + " has returned while "
             + sleep_report());
    }
    hand_over();
    abort();
}

static void start_block(uint3 index) {
    block.index = index;
    block.live = block.threads;
    block.barrier = Barrier();
    for (Barrier& barrier : block.named) {
        barrier = Barrier();
    }
    block.vote = false;
    block.steps = 0;
    block.random = (options.seed + 1) * 0x9e3779b97f4a7c15ull
        ^ (index.x + 0x10001ull * index.y + 0x100000001ull * index.z + 1) * 0xbf58476d1ce4e5b9ull;
    shared.assign(block.shared_bytes, POISON);
    written.assign((block.shared_bytes + 15) / 16, 0);
    shadow.reset(block.shared_bytes);
    if (options.races) {
        clocks.reset(block.threads + agent_count);
    }
    if (options.conflicts) {
        conflict_counter.reset(block.threads);
    }
    agents.clear();
    ready.clear();
    threads.resize(block.threads);
    warps.resize(block.threads / WARP);
    for (int i = 0; i < block.threads; i++) {
        Thread& thread = threads[i];
        thread.position = {u32(i), 0, 0};
        thread.index = i;
        thread.lane = i % WARP;
        thread.warp = &warps[i / WARP];
        thread.warp->meeting.arrived = 0;
        thread.state = Thread::READY;
        thread.steps = 0;
        thread.copies.clear();
        thread.copy_groups.clear();
        thread.open_copies = 0;
        thread.fiber.start(stacks.get(i), Stacks::BYTES, run_thread);
        ready.add(&thread);
    }
    if (options.seed != 0) {
        ready.shuffle();
    }
}

static void run_block() {
    while (block.live > 0 && finding.empty()) {
        if (!agents.empty() && (ready.empty() || options.seed != 0)) {
            std::function<void()> agent = std::move(agents.front());
            agents.pop_front();
            agent();
            note_progress();
        } else if (ready.empty()) {
            fail("deadlock: " + sleep_report());
        }
        if (!ready.empty()) {
            current = ready.take();
            switch_fiber(scheduler, current->fiber);
        }
    }
    if (options.conflicts && finding.empty()) {
        statistics.access_conflicts += conflict_counter.count();
    }
}

static std::vector<uint3> order_of_blocks() {
    std::vector<uint3> order;
    for (u32 z = 0; z < block.grid.z; z++) {
        for (u32 y = 0; y < block.grid.y; y++) {
            for (u32 x = 0; x < block.grid.x; x++) {
                order.push_back({x, y, z});
            }
        }
    }
    if (options.seed != 0) {
        block.random = options.seed * 0x9e3779b97f4a7c15ull;
        for (size_t i = order.size(); i > 1; i--) {
            std::swap(order[i - 1], order[random_number() % i]);
        }
    }
    return order;
}

static std::string run_blocks() {
    for (uint3 index : order_of_blocks()) {
        try {
            start_block(index);
            run_block();
        } catch (const Stop&) {
        }
        if (!finding.empty()) {
            return "block (" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", "
                + std::to_string(index.z) + "): " + finding;
        }
    }
    return "";
}

template <class Arguments>
static int launch(void (*kernel)(Arguments), const void* arguments, u64 argument_bytes,
                  u32 grid_x, u32 grid_y, u32 grid_z, u32 block_threads, u32 shared_bytes,
                  const Options* given, char* message, int message_size, Statistics* counted) {
    static void (*the_kernel)(Arguments);
    static const Arguments* the_arguments;
    std::string report;
    options = *given;
    statistics = Statistics();
    finding.clear();
    block.grid = {grid_x, grid_y, grid_z};
    block.size = {block_threads, 1, 1};
    block.threads = block_threads;
    block.shared_bytes = shared_bytes;
    if (argument_bytes != sizeof(Arguments)) {
        report = "the kernel's Arguments have " + std::to_string(sizeof(Arguments))
            + " bytes, the launch gives " + std::to_string(argument_bytes);
    } else if (block_threads == 0 || block_threads % WARP != 0 || block_threads > 1024) {
        report = "a block of " + std::to_string(block_threads)
            + " threads: whole warps, at most 1024 threads are wanted";
    } else {
        std::vector<u8> memory(sizeof(Arguments) + alignof(Arguments));
        const u64 start = (u64(memory.data()) + alignof(Arguments) - 1) & -u64(alignof(Arguments));
        memcpy(reinterpret_cast<void*>(start), arguments, sizeof(Arguments));
        the_kernel = kernel;
        the_arguments = reinterpret_cast<const Arguments*>(start);
        run_kernel = [] { the_kernel(*the_arguments); };
        report = run_blocks();
    }
    snprintf(message, message_size, "%s", report.c_str());
    *counted = statistics;
    return report.empty() ? 0 : 1;
}

}  // namespace emulator

#define threadIdx (emulator::current->position)
#define blockIdx (emulator::block.index)
#define blockDim (emulator::block.size)
#define gridDim (emulator::block.grid)
#define warpSize 32
