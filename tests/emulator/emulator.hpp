// Executes CUDA C++ kernels on the CPU, one block after the other, each thread as a fiber.
//
// Kernels reach everything beyond plain C++ through primitives.cuh, whose host version (beside this
// file) calls what is here. So each access to shared memory, each barrier and each collective of a
// warp is seen and judged: races, bounds, alignment, bytes that were never written, threads that
// never meet. What the hardware may do late is done as late as it may: copies arrive when they are
// waited for, and until then their bytes are poison. The first finding ends the launch.
//
// More primitives are built on these parts:
//   wait_for, wake             a thread sleeps until another one, or an agent, wakes it
//   start_agent                work beside the threads
//   meet, join_members         threads that do something together: a warp, or 128 threads
//   clocks                     what one knows is handed on by release and acquire; agents have
//                              clocks, too (add_agents), and start from what a thread knows: fork
//   check_place, note_shared   judge an access to shared memory by any actor
//   note_flight, note_landing  bytes that something is copied to, between issue and arrival
//   fail_here                  report a finding
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "fibers.hpp"
#include "language.hpp"
#include "races.hpp"
#include "site.hpp"

#define EMULATOR_SITE emulator::Site site = emulator::Site::here()

namespace emulator {

// ---- what a launch is given and gives back (device.py has the same)

// Global memory that a launch may touch.
struct Region {
    u64 address;
    u64 bytes;
    u32 writable;
    char name[44];
};

struct Options {
    u32 seed;           // 0: threads and blocks in order; others shuffle both
    u32 races;          // run the race detector
    u32 uninitialised;  // allow reads of shared memory that nobody has written
    u32 conflicts;      // count bank conflicts of ordinary accesses too
    u64 step_limit;     // accesses of a block between two synchronisations, before it is a livelock
    u32 time_limit;     // seconds that a thread may run without meeting anybody
    u32 guard;          // 1: regions lie before pages that nobody may touch; 2: after them
    u32 region_count;
    u32 pointer_count;
    const Region* regions;
    const u32* pointers;  // where in the arguments addresses of global memory are
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
static constexpr int MOST_THREADS = 1024;
static constexpr u8 POISON = 0xff;        // NaN in every format

struct Copy {
    u32 to;
    u32 bytes;
    Site site;
    u8 data[16];
};

// What a thread sleeps for; `number` says which one of them, `arrived` is shown in reports.
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
    u8* stack;
    uint3 position;
    int index;
    int lane;
    Warp* warp;
    State state;
    Waiting waiting;
    bool vote;
    bool before_barrier;  // has come to a named one that is not complete
    bool at_barrier;      // and sleeps there
    u32 steps;
    std::vector<Copy> copies;         // in the order of their issue
    std::vector<size_t> copy_groups;  // how many copies each closed group has
    size_t open_copies;
};

// Threads that come together to do one thing. The last to come does it for all.
struct Meeting {
    const char* what = "";
    int arrived = 0;
    Site site;
    Thread* members[128];  // in the order of their arrival
};

typedef float Float8 __attribute__((vector_size(32)));
typedef double Double8 __attribute__((vector_size(64)));

struct Warp {
    Meeting meeting;
    u64 brought[WARP];      // shuffles: what lanes bring,
    u64 shuffled[WARP];     // and what all may read until they meet again
    u32 rows[WARP];         // ldmatrix: addresses
    u32 fragments[WARP][4];
    float left[16][16];     // mma: a, b, a b
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
    std::vector<Thread*> waiting;
    std::vector<u32> clocks;  // of all who have come
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

extern Options options;
extern Statistics statistics;
extern Block block;
extern std::vector<Thread> threads;
extern std::vector<Warp> warps;
extern u8* shared;       // what address SHARED_BASE and the following ones hold
extern Clocks clocks;    // of threads and, behind them, of other actors
extern Thread* current;  // null while the scheduler or an agent runs

// ---- reports

std::string name_of(int actor);
[[noreturn]] void fail(const std::string& message);
[[noreturn]] void fail_here(const std::string& message, Site site);

// ---- scheduling

// The current thread sleeps until somebody wakes it.
void wait_for(const Waiting& waiting);
void wake(Thread* thread);
u32 random_number();

// Threads synchronised: what they spin for may have changed.
void note_progress();

// ---- shared memory

static inline u8* shared_bytes_at(u32 address) {
    return shared + (address - SHARED_BASE);
}

// The number of the 16 bytes that hold `address`.
static inline u32 cell_of(u32 address) {
    return (address - SHARED_BASE) / Shadow::CELL_BYTES;
}

// [address, address + bytes) is the block's, at a multiple of bytes: 2, 4, 8 or 16.
void check_place(u32 address, u32 bytes, Site site);

// To be called after check_place, for each 2, 4, 8 or 16 bytes. `actor` is a thread's index, or an
// actor beside them.
void note_shared(u32 address, u32 bytes, Access access, int actor, Site site);
void note_flight(u32 address, u32 bytes, int actor, Site site);
void note_landing(u32 address, u32 bytes, int actor, Site site);

// All of this, for the current thread's ordinary access.
void access_shared(u32 address, u32 bytes, Access access, Site site);

// ---- actors beside the threads

// So many agents more have clocks; to be called when a library is loaded. Agents are actors whose
// numbers start at block.threads. Returns `count`.
int add_agents(int count);

// Work that goes on beside the threads: it is done when no thread can run, or by chance before, and
// then not in the order of its start.
void start_agent(std::function<void()> work);

// What primitives built on this do at each start of a block, and at each ordinary store.
extern void (*on_block)();
extern void (*on_store)(u32 address, u32 bytes);

// ---- copies beside the threads

void start_copy(u32 to, const void* from, u32 bytes, bool valid, Site site);
void close_copy_group();
void land_copies(size_t groups_left);
void check_global(const void* address, u64 bytes, Site site);

// ---- barriers

bool synchronise_block(bool vote, const char* what, Site site);
void come_to_named_barrier(int id, int expected, bool waits, Site site);

// ---- collectives

// True for the last of `size` threads; the others sleep until it dismisses them.
bool come(Meeting& meeting, int size, const char* what, Site site);
void dismiss(Meeting& meeting, int size);

// `size` threads come with one call, the last one runs `together()` for all of them.
template <class Together>
static inline void meet(Meeting& meeting, int size, const char* what, Site site,
                        Together together) {
    if (come(meeting, size, what, site)) {
        together();
        dismiss(meeting, size);
    }
}

// For use in `together`: all members know afterwards what each of them knew before.
void join_members(Meeting& meeting, int size);

void synchronise_warp(u32 mask, Site site);
u64 exchange(u32 mask, u64 bits, int source, const char* what, Site site);
u32 ballot(u32 mask, bool vote, const char* what, Site site);
void load_matrices(u32 (&r)[4], u32 row, bool transposed, Site site);
void multiply_f16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, Site site);
void multiply_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, Site site);
void multiply_tf32(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, Site site);
void multiply_f64(double (&c)[2], double a, double b, Site site);

// ---- launches

int launch(void (*kernel)(const void* arguments), const void* arguments, u64 given_bytes,
           u64 wanted_bytes, u64 alignment, const u32* grid, u32 block_threads, u32 shared_bytes,
           const Options* given, char* message, int message_size, Statistics* counted);

template <auto KERNEL>
struct Launcher;

// The kernel's own type says what its arguments are.
template <class Arguments, void (*KERNEL)(Arguments)>
struct Launcher<KERNEL> {
    static void run(const void* arguments) {
        KERNEL(*static_cast<const Arguments*>(arguments));
    }

    static int launch(const void* arguments, u64 argument_bytes, const u32* grid,
                      u32 block_threads, u32 shared_bytes, const Options* given, char* message,
                      int message_size, Statistics* counted) {
        return emulator::launch(run, arguments, argument_bytes, sizeof(Arguments),
                                alignof(Arguments), grid, block_threads, shared_bytes, given,
                                message, message_size, counted);
    }
};

}  // namespace emulator

#define threadIdx (emulator::current->position)
#define blockIdx (emulator::block.index)
#define blockDim (emulator::block.size)
#define gridDim (emulator::block.grid)
#define warpSize 32
