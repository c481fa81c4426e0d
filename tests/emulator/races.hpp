// The race detector: who touched which bytes of shared memory, and what each thread knows of that.
//
// Actors are the block's threads, and agents that work beside them (copies of the hardware's own).
// Each has a clock; `seen[actor][other]` is the newest time of `other` that is ordered before what
// `actor` does now. A sync object collects clocks (`release`) and hands them on (`acquire`). Two
// accesses to one byte, one of them a write, race where neither is ordered before the other.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "site.hpp"

namespace emulator {

class Clocks {
public:
    void reset(int actors_) {
        actors = actors_;
        seen.assign(size_t(actors) * actors, 0);
        for (int actor = 0; actor < actors; actor++) {
            row(actor)[actor] = 1;
        }
    }

    uint32_t* row(int actor) {
        return seen.data() + size_t(actor) * actors;
    }

    // What `actor` has done and knows becomes known to whoever acquires `into`.
    void release(int actor, std::vector<uint32_t>& into) {
        into.resize(actors, 0);
        join(into.data(), row(actor));
        row(actor)[actor]++;
    }

    void acquire(int actor, const std::vector<uint32_t>& from) {
        if (!from.empty()) {
            const uint32_t own = row(actor)[actor];
            join(row(actor), from.data());
            row(actor)[actor] = own;
        }
    }

    // `agent` starts now, after all that `actor` has done and knows.
    void fork(int actor, int agent) {
        const uint32_t own = row(agent)[agent];
        join(row(agent), row(actor));
        row(agent)[agent] = own + 1;
        row(actor)[actor]++;
    }

private:
    void join(uint32_t* into, const uint32_t* from) const {
        for (int other = 0; other < actors; other++) {
            into[other] = std::max(into[other], from[other]);
        }
    }

    int actors = 0;
    std::vector<uint32_t> seen;
};

enum class Access : uint8_t {
    READ,
    WRITE,
    FLIGHT,  // bytes of a copy under way: nobody may touch them
};

struct Entry {
    uint32_t clock;
    uint16_t actor;
    uint8_t mask;  // which of the cell's eight pairs of bytes
    Access access;
    SiteNumber site;
};

// What is remembered of 16 bytes: the accesses that a later one could still race with.
struct Cell {
    static constexpr int PLACES = 10;

    uint32_t generation;
    uint16_t count;
    uint16_t further;  // 1 + the index of the overflow list, 0: none
    Entry entries[PLACES];
};

class Shadow {
public:
    static constexpr uint32_t CELL_BYTES = 16;

    // A new block: everything before is forgotten, at no cost.
    void reset(size_t bytes) {
        const size_t wanted = (bytes + CELL_BYTES - 1) / CELL_BYTES;
        if (cells.size() < wanted) {
            cells.assign(wanted, Cell());
            generation = 0;
        }
        generation++;
        first_generation = generation;
        overflow.clear();
    }

    // A barrier of the whole block: all accesses so far are ordered before all later ones.
    void new_generation() {
        generation++;
    }

    // Notes an access of `actor`, whose clocks are `seen`. The entry that it races with, or none.
    const Entry* note(uint32_t cell_number, uint8_t mask, Access access, int actor,
                      const uint32_t* seen, SiteNumber site) {
        Cell& cell = current(cell_number);
        Entry* entries = entries_of(cell);
        int kept = 0;
        for (int i = 0; i < cell.count; i++) {
            Entry entry = entries[i];
            if ((entry.mask & mask) != 0) {
                const bool ordered = entry.actor == actor || entry.clock <= seen[entry.actor];
                if (races(entry, access, ordered)) {
                    found = entry;
                    return &found;
                }
                // one that is ordered before this access need not be remembered, if whatever
                // could race with it later races with this one as well
                if (ordered && (access != Access::READ || entry.access == Access::READ)) {
                    entry.mask &= ~mask;
                }
            }
            if (entry.mask != 0) {
                entries[kept++] = entry;
            }
        }
        cell.count = kept;
        append(cell, {seen[actor], uint16_t(actor), mask, access, site});
        return nullptr;
    }

    // A copy of `actor` has arrived: its bytes may be touched again. A note of the write follows.
    void land(uint32_t cell_number, uint8_t mask, int actor) {
        Cell& cell = current(cell_number);
        Entry* entries = entries_of(cell);
        for (int i = 0; i < cell.count; i++) {
            if (entries[i].access == Access::FLIGHT && entries[i].actor == actor) {
                entries[i].mask &= ~mask;
            }
        }
    }

private:
    static bool races(const Entry& entry, Access access, bool ordered) {
        if (entry.access == Access::FLIGHT) {
            return true;
        }
        return !ordered && (access != Access::READ || entry.access == Access::WRITE);
    }

    Entry* entries_of(Cell& cell) {
        return cell.further != 0 ? overflow[cell.further - 1].data() : cell.entries;
    }

    // The cell, with what older generations left in it: copies under way.
    Cell& current(uint32_t cell_number) {
        Cell& cell = cells[cell_number];
        if (cell.generation != generation) {
            if (cell.generation < first_generation) {
                cell.count = 0;
                cell.further = 0;
            }
            Entry* entries = entries_of(cell);
            int kept = 0;
            for (int i = 0; i < cell.count; i++) {
                if (entries[i].access == Access::FLIGHT && entries[i].mask != 0) {
                    entries[kept++] = entries[i];
                }
            }
            cell.count = kept;
            cell.generation = generation;
        }
        return cell;
    }

    void append(Cell& cell, const Entry& entry) {
        if (cell.further == 0 && cell.count == Cell::PLACES) {
            overflow.emplace_back(cell.entries, cell.entries + cell.count);
            cell.further = overflow.size();
        }
        if (cell.further != 0) {
            std::vector<Entry>& list = overflow[cell.further - 1];
            list.resize(cell.count);
            list.push_back(entry);
        } else {
            cell.entries[cell.count] = entry;
        }
        cell.count++;
    }

    std::vector<Cell> cells;
    std::vector<std::vector<Entry>> overflow;
    uint32_t generation = 0;
    uint32_t first_generation = 0;
    Entry found;
};

}  // namespace emulator
