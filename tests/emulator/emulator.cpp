// The emulator's scheduler, its judgement of shared memory, barriers and launches.
#include "emulator.hpp"

#include <deque>

#include "conflicts.hpp"
#include "faults.hpp"

namespace emulator {

Options options;
Statistics statistics;
Block block;
std::vector<Thread> threads;
std::vector<Warp> warps;
u8* shared;
Clocks clocks;
Thread* current;
void (*on_block)();
void (*on_store)(u32 address, u32 bytes);

static std::vector<u8> shared_memory;
static std::vector<u8> written;  // of each 16 bytes of shared memory, which pairs
static Shadow shadow;
static ConflictCounter conflict_counter;
static Stacks stacks;
static Fiber scheduler;
static std::string finding;
static std::deque<std::function<void()>> agents;
static int agent_count;
static std::vector<Region> regions;

struct Stop {};  // thrown where a finding ends the scheduler's own work, or an agent's

// ---- reports

std::string name_of(int actor) {
    if (actor >= block.threads) {
        return "agent " + std::to_string(actor - block.threads);
    }
    return "thread " + std::to_string(actor);
}

[[noreturn]] void fail(const std::string& message) {
    finding = message;
    if (current == nullptr) {
        throw Stop();
    }
    Thread* failed = current;
    current = nullptr;
    switch_fiber(failed->fiber, scheduler);
    abort();
}

[[noreturn]] void fail_here(const std::string& message, Site site) {
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

u32 random_number() {
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
    static constexpr u32 CAPACITY = 2 * MOST_THREADS;  // a power of two

    void clear() {
        head = tail = 0;
    }

    bool empty() const {
        return head == tail;
    }

    void add(Thread* thread) {
        places[tail++ % CAPACITY] = thread;
    }

    // Behind all others.
    void add_last(Thread* thread) {
        if (options.seed != 0 && options.seed % 3 == 2) {
            places[--head % CAPACITY] = thread;
        } else {
            add(thread);
        }
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

void wake(Thread* thread) {
    thread->state = Thread::READY;
    ready.add(thread);
}

// Until somebody wakes this thread.
void wait_for(const Waiting& waiting) {
    current->waiting = waiting;
    current->state = Thread::ASLEEP;
    hand_over();
}

// Threads synchronised: whatever they spin for may have changed.
void note_progress() {
    block.steps = 0;
}

static __attribute__((noinline)) void pause_spinning(Site site) {
    block.steps += current->steps;
    current->steps = 0;
    if (block.steps > options.step_limit) {
        fail_here("livelock: " + std::to_string(block.steps)
                  + " accesses to shared memory and nobody synchronised", site);
    }
    ready.add_last(current);
    hand_over();
}

// ---- shared memory

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
void check_place(u32 address, u32 bytes, Site site) {
    const u32 offset = address - SHARED_BASE;
    if (address % bytes != 0 || offset >= block.shared_bytes
        || bytes > block.shared_bytes - offset) {
        report_place(address, bytes, site);
    }
}

// To be called after check_place. `actor` may be an agent.
void note_shared(u32 address, u32 bytes, Access access, int actor, Site site) {
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

void access_shared(u32 address, u32 bytes, Access access, Site site) {
    statistics.accesses++;
    if (++current->steps >= 4096) {
        pause_spinning(site);
    }
    check_place(address, bytes, site);
    note_shared(address, bytes, access, current->index, site);
    if (access == Access::WRITE && on_store != nullptr) {
        on_store(address, bytes);
    }
    if (options.conflicts) {
        conflict_counter.note(current->index, SiteNumber::of(site), address, bytes,
                              access != Access::READ);
    }
}

void note_flight(u32 address, u32 bytes, int actor, Site site) {
    note_shared(address, bytes, Access::FLIGHT, actor, site);
}

void note_landing(u32 address, u32 bytes, int actor, Site site) {
    if (options.races) {
        shadow.land(cell_of(address), pairs_of(address, bytes), actor);
    }
    note_shared(address, bytes, Access::WRITE, actor, site);
}

// ---- copies beside the threads: their bytes are poison until they are waited for

void check_global(const void* from, u64 bytes, Site site) {
    const u64 address = u64(from);
    for (const Region& region : regions) {
        if (address >= region.address && address + bytes <= region.address + region.bytes) {
            return;
        }
    }
    if (!regions.empty()) {
        fail_here("out of bounds: a copy of " + std::to_string(bytes)
                  + " bytes of global memory that no array has", site);
    }
}

void start_copy(u32 to, const void* from, u32 bytes, bool valid, Site site) {
    statistics.copies++;
    access_shared(to, bytes, Access::FLIGHT, site);
    Copy copy = {to, bytes, site, {}};
    if (valid) {
        if (u64(from) % bytes != 0) {
            fail_here("misaligned: the global address of a copy is no multiple of "
                      + std::to_string(bytes), site);
        }
        check_global(from, bytes, site);
        memcpy(copy.data, from, bytes);
    }
    memset(shared_bytes_at(to), POISON, bytes);
    current->copies.push_back(copy);
    current->open_copies++;
}

void close_copy_group() {
    current->copy_groups.push_back(current->open_copies);
    current->open_copies = 0;
}

void land_copies(size_t groups_left) {
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
        note_landing(copy.to, copy.bytes, thread.index, copy.site);
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
    for (Thread* thread : barrier.waiting) {
        thread->vote = vote;
        wake(thread);
    }
    barrier.waiting.clear();
}

// __syncthreads, and __syncthreads_or of `vote`.
bool synchronise_block(bool vote, const char* what, Site site) {
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
        barrier.waiting.push_back(current);
        wait_for({what, 0, site, &barrier.arrived, block.threads});
    } else {
        finish_block_barrier();
    }
    return current->vote;
}

static std::string name_of_barrier(int id) {
    return "barrier " + std::to_string(id);
}

static void finish_named_barrier(Barrier& barrier) {
    statistics.barriers++;
    note_progress();
    for (Thread* thread : barrier.waiting) {
        if (options.races) {
            clocks.acquire(thread->index, barrier.clocks);
        }
        thread->before_barrier = false;
        if (thread->at_barrier) {
            thread->at_barrier = false;
            wake(thread);
        }
    }
    barrier = Barrier();
}

static void bring_warp(Barrier& barrier, int id, int expected, bool waits, Site site) {
    if (barrier.arrived > 0 && barrier.expected != expected) {
        fail_here(name_of_barrier(id) + " of " + std::to_string(expected) + " threads, "
                  + std::to_string(barrier.expected) + " by those who came first", site);
    }
    barrier.expected = expected;
    barrier.arrived += WARP;
    for (int lane = 0; lane < WARP; lane++) {
        Thread* thread = current->warp->meeting.members[lane];
        if (options.races) {
            clocks.release(thread->index, barrier.clocks);
        }
        if (waits) {
            thread->before_barrier = true;
            barrier.waiting.push_back(thread);
        }
    }
    if (barrier.arrived == expected) {
        finish_named_barrier(barrier);
    }
}

// The hardware counts warps, whose lanes come with one instruction.
void come_to_named_barrier(int id, int expected, bool waits, Site site) {
    if (id < 1 || id >= NAMED_BARRIERS) {
        fail_here(name_of_barrier(id) + ": named barriers are 1 to 15, 0 is __syncthreads'", site);
    }
    if (expected <= 0 || expected % WARP != 0 || expected > block.threads) {
        fail_here(name_of_barrier(id) + " of " + std::to_string(expected)
                  + " threads: whole warps of the block are wanted", site);
    }
    Barrier& barrier = block.named[id];
    meet(current->warp->meeting, WARP, waits ? "barrier_sync" : "barrier_arrive", site,
         [&] { bring_warp(barrier, id, expected, waits, site); });
    if (waits && current->before_barrier) {
        current->at_barrier = true;
        static const char* const names[NAMED_BARRIERS] = {
            "", "barrier 1", "barrier 2", "barrier 3", "barrier 4", "barrier 5", "barrier 6",
            "barrier 7", "barrier 8", "barrier 9", "barrier 10", "barrier 11", "barrier 12",
            "barrier 13", "barrier 14", "barrier 15"};
        wait_for({names[id], u32(id), site, &barrier.arrived, expected});
    }
}

// ---- collectives

bool come(Meeting& meeting, int size, const char* what, Site site) {
    if (meeting.arrived == 0) {
        meeting.what = what;
        meeting.site = site;
    } else if (meeting.what != what || !(meeting.site == site)) {
        fail_here("divergent collective: " + std::string(what) + ", while "
                  + name_of(meeting.members[0]->index) + " waits at " + meeting.what + " of "
                  + meeting.site.text(), site);
    }
    meeting.members[meeting.arrived++] = current;
    if (meeting.arrived == size) {
        statistics.collectives++;
        return true;
    }
    wait_for({what, u32(current->index / size), site, &meeting.arrived, size});
    return false;
}

void dismiss(Meeting& meeting, int size) {
    meeting.arrived = 0;
    for (int i = 0; i < size - 1; i++) {
        wake(meeting.members[i]);
    }
}

void join_members(Meeting& meeting, int size) {
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

int add_agents(int count) {
    agent_count += count;
    return count;
}

void start_agent(std::function<void()> work) {
    const size_t place = options.seed == 0 ? agents.size() : random_number() % (agents.size() + 1);
    agents.insert(agents.begin() + place, std::move(work));
}

static void (*run_kernel)(const void* arguments);
static const void* kernel_arguments;

static void run_thread() {
    run_kernel(kernel_arguments);
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
    shared_memory.assign(block.shared_bytes, POISON);
    shared = shared_memory.data();
    written.assign((block.shared_bytes + 15) / 16, 0);
    shadow.reset(block.shared_bytes);
    if (options.races) {
        clocks.reset(block.threads + agent_count);
    }
    if (options.conflicts) {
        conflict_counter.reset(block.threads);
    }
    agents.clear();
    if (on_block != nullptr) {
        on_block();
    }
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
        thread.before_barrier = false;
        thread.at_barrier = false;
        thread.steps = 0;
        thread.copies.clear();
        thread.copy_groups.clear();
        thread.open_copies = 0;
        thread.stack = stacks.get(i);
        thread.fiber.start(thread.stack, Stacks::BYTES, run_thread);
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
        for (const Thread& thread : threads) {
            if (finding.empty() && Stacks::left(thread.stack)) {
                finding = "the local variables of " + name_of(thread.index) + " take more than "
                    + std::to_string(Stacks::BYTES) + " bytes";
            }
        }
        if (!finding.empty()) {
            return "block (" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", "
                + std::to_string(index.z) + "): " + finding;
        }
    }
    return "";
}

// Runs the kernel with the arrays in guarded memory.
static std::string run_guarded(u8* arguments) {
    GuardedMemory memory(options.regions, options.region_count, options.guard == 1);
    for (u32 i = 0; i < options.pointer_count; i++) {
        u64 address;
        memcpy(&address, arguments + options.pointers[i], sizeof address);
        if (address == 0) {
            continue;
        }
        address = memory.moved(address);
        if (address == 0) {
            return "the address at byte " + std::to_string(options.pointers[i])
                + " of the arguments is not of an array that is known";
        }
        memcpy(arguments + options.pointers[i], &address, sizeof address);
    }
    regions = memory.regions();
    std::string report;
    {
        const FaultWatch watch(&memory, options.time_limit);
        report = run_blocks();
    }
    const std::string spoiled = memory.copy_back();
    if (report.empty() && !spoiled.empty()) {
        report = "out of bounds: a write beside array '" + spoiled + "'";
    }
    return report;
}

static std::string run_unguarded() {
    regions.assign(options.regions, options.regions + options.region_count);
    const FaultWatch watch(nullptr, options.time_limit);
    return run_blocks();
}

static std::string run_launch(const void* arguments, u64 given_bytes, u64 wanted_bytes,
                              u64 alignment) {
    if (given_bytes != wanted_bytes) {
        return "the kernel takes arguments of " + std::to_string(wanted_bytes)
            + " bytes, the launch gives " + std::to_string(given_bytes);
    }
    if (block.threads == 0 || block.threads % WARP != 0 || block.threads > MOST_THREADS) {
        return "a block of " + std::to_string(block.threads)
            + " threads: whole warps, at most 1024 threads are wanted";
    }
    std::vector<u8> memory(given_bytes + alignment);
    u8* copy = memory.data() + (alignment - u64(memory.data()) % alignment) % alignment;
    memcpy(copy, arguments, given_bytes);
    kernel_arguments = copy;
    return options.guard != 0 ? run_guarded(copy) : run_unguarded();
}

int launch(void (*kernel)(const void* arguments), const void* arguments, u64 given_bytes,
           u64 wanted_bytes, u64 alignment, const u32* grid, u32 block_threads, u32 shared_bytes,
           const Options* given, char* message, int message_size, Statistics* counted) {
    options = *given;
    statistics = Statistics();
    finding.clear();
    block.grid = {grid[0], grid[1], grid[2]};
    block.size = {block_threads, 1, 1};
    block.threads = block_threads;
    block.shared_bytes = shared_bytes;
    run_kernel = kernel;
    const std::string report = run_launch(arguments, given_bytes, wanted_bytes, alignment);
    snprintf(message, message_size, "%s", report.c_str());
    *counted = statistics;
    return report.empty() ? 0 : 1;
}

}  // namespace emulator
