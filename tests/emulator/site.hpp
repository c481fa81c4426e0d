// Where in the kernel's text something was called, for reports.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace emulator {

struct Site {
    const char* file = "?";
    int line = 0;

    // As a default argument: the place of the call.
    static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return Site{file, line};
    }

    bool operator==(const Site& other) const {
        return line == other.line && (file == other.file || std::string(file) == other.file);
    }

    std::string text() const {
        return std::string(file) + ":" + std::to_string(line);
    }
};

// The same in four bytes.
struct SiteNumber {
    uint16_t file = 0;
    uint16_t line = 0;

    static std::vector<const char*>& files() {
        static std::vector<const char*> known;
        return known;
    }

    static SiteNumber of(Site site) {
        std::vector<const char*>& known = files();
        size_t file = 0;
        while (file < known.size() && known[file] != site.file) {
            file++;
        }
        if (file == known.size()) {
            known.push_back(site.file);
        }
        return SiteNumber{uint16_t(file), uint16_t(site.line)};
    }

    Site site() const {
        return Site{files()[file], line};
    }
};

}  // namespace emulator
