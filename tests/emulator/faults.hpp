// Global memory is reached by ordinary pointers, so the processor judges it: arrays are copied to
// pages of their own for a launch, with pages behind and before them that nobody may touch.
#pragma once

#include <signal.h>
#include <time.h>

#include <string>
#include <vector>

#include "emulator.hpp"

namespace emulator {

// The arrays of a launch, each against the end of its pages (or at their start).
class GuardedMemory {
public:
    GuardedMemory(const Region* regions, size_t count, bool at_end);
    ~GuardedMemory();

    // Where what was at `address` is now, 0 if no array holds it.
    u64 moved(u64 address) const;

    // The regions as they are now.
    const std::vector<Region>& regions() const {
        return now;
    }

    // Gives the arrays back what was written. The name of an array that was written to beside
    // itself, or nothing.
    std::string copy_back();

    // What it means that `address` may not be touched.
    std::string explain(u64 address) const;

private:
    struct Pages {
        u8* start;
        size_t bytes;
    };

    std::vector<Region> before;
    std::vector<Region> now;
    std::vector<Pages> pages;
};

// While it lives, faults of kernels and threads that run for too long are reported by `fail`.
class FaultWatch {
public:
    FaultWatch(const GuardedMemory* memory, u32 seconds);
    ~FaultWatch();

private:
    struct sigaction earlier_segv;
    struct sigaction earlier_bus;
    struct sigaction earlier_alarm;
    stack_t earlier_stack;
    timer_t timer;
    bool timed;
};

}  // namespace emulator
