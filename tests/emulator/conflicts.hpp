// Bank conflicts of ordinary accesses to shared memory, counted as the hardware serves them: 32
// banks of 4 bytes; a warp's accesses of 8 bytes go in two parts, those of 16 in four.
//
// Threads do not run in step, so which accesses a warp makes together is found afterwards: the n-th
// one of each lane at one place of the text.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <tuple>
#include <vector>

#include "site.hpp"

namespace emulator {

class ConflictCounter {
public:
    void reset(int threads) {
        notes.assign(threads, {});
    }

    void note(int thread, SiteNumber site, uint32_t address, uint32_t bytes, bool write) {
        notes[thread].push_back({site, address, uint8_t(bytes), write});
    }

    // Turns that a warp's accesses took beyond one for each part, since the last count.
    uint64_t count() {
        uint64_t conflicts = 0;
        for (size_t first = 0; first < notes.size(); first += 32) {
            conflicts += count_warp(first);
        }
        for (std::vector<Note>& of_thread : notes) {
            of_thread.clear();
        }
        return conflicts;
    }

private:
    struct Note {
        SiteNumber site;
        uint32_t address;
        uint8_t bytes;
        bool write;
    };

    // file, line, bytes, write
    using Kind = std::tuple<int, int, int, bool>;

    uint64_t count_warp(size_t first) {
        std::map<std::pair<Kind, int>, std::vector<std::pair<int, uint32_t>>> together;
        for (int lane = 0; lane < 32; lane++) {
            std::map<Kind, int> occurrences;
            for (const Note& note : notes[first + lane]) {
                const Kind kind(note.site.file, note.site.line, note.bytes, note.write);
                together[{kind, occurrences[kind]++}].push_back({lane, note.address});
            }
        }
        uint64_t conflicts = 0;
        for (const auto& [key, accesses] : together) {
            conflicts += extra_turns(accesses, std::get<2>(key.first));
        }
        return conflicts;
    }

    static uint64_t extra_turns(const std::vector<std::pair<int, uint32_t>>& accesses, int bytes) {
        const int parts = bytes <= 4 ? 1 : bytes / 4;
        uint64_t extra = 0;
        for (int part = 0; part < parts; part++) {
            std::set<uint32_t> words[32];
            for (const auto& [lane, address] : accesses) {
                if (lane / (32 / parts) == part) {
                    for (int byte = 0; byte < bytes; byte += 4) {
                        const uint32_t word = (address + byte) / 4;
                        words[word % 32].insert(word);
                    }
                }
            }
            size_t turns = 1;
            for (const std::set<uint32_t>& of_bank : words) {
                turns = of_bank.size() > turns ? of_bank.size() : turns;
            }
            extra += turns - 1;
        }
        return extra;
    }

    std::vector<std::vector<Note>> notes;
};

}  // namespace emulator
