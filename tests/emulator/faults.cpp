#include "faults.hpp"

#include <dlfcn.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

namespace emulator {

static size_t page_bytes() {
    return sysconf(_SC_PAGESIZE);
}

static constexpr u8 UNTOUCHED = 0xa5;
static constexpr size_t ALIGNMENT = 16;  // of addresses, kept

GuardedMemory::GuardedMemory(const Region* regions, size_t count, bool at_end)
        : before(regions, regions + count) {
    const size_t page = page_bytes();
    for (const Region& region : before) {
        const size_t room = (region.bytes + ALIGNMENT - 1 + page) / page * page;
        Pages own = {nullptr, room + 2 * page};
        own.start = static_cast<u8*>(mmap(nullptr, own.bytes, PROT_READ | PROT_WRITE,
                                          MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        memset(own.start, UNTOUCHED, own.bytes);
        const size_t remainder = region.address % ALIGNMENT;
        u64 address = u64(own.start) + page + remainder;
        if (at_end) {
            const u64 last = u64(own.start) + page + room - region.bytes;
            address = last - (last - remainder) % ALIGNMENT;
        }
        memcpy(reinterpret_cast<void*>(address), reinterpret_cast<void*>(region.address),
               region.bytes);
        mprotect(own.start, page, PROT_NONE);
        mprotect(own.start + page + room, page, PROT_NONE);
        if (!region.writable) {
            mprotect(own.start + page, room, PROT_READ);
        }
        pages.push_back(own);
        now.push_back(region);
        now.back().address = address;
    }
}

GuardedMemory::~GuardedMemory() {
    for (const Pages& own : pages) {
        munmap(own.start, own.bytes);
    }
}

u64 GuardedMemory::moved(u64 address) const {
    for (size_t i = 0; i < before.size(); i++) {
        const Region& region = before[i];
        if (address >= region.address && address < region.address + std::max<u64>(region.bytes, 1)) {
            return address - region.address + now[i].address;
        }
    }
    return 0;
}

std::string GuardedMemory::copy_back() {
    const size_t page = page_bytes();
    std::string spoiled;
    for (size_t i = 0; i < now.size(); i++) {
        const Region& region = now[i];
        const u8* start = reinterpret_cast<const u8*>(region.address);
        for (const u8* byte = pages[i].start + page; byte < start; byte++) {
            spoiled = *byte == UNTOUCHED ? spoiled : region.name;
        }
        const u8* end = pages[i].start + pages[i].bytes - page;
        for (const u8* byte = start + region.bytes; byte < end; byte++) {
            spoiled = *byte == UNTOUCHED ? spoiled : region.name;
        }
        if (region.writable) {
            memcpy(reinterpret_cast<void*>(before[i].address), start, region.bytes);
        }
    }
    return spoiled;
}

std::string GuardedMemory::explain(u64 address) const {
    for (size_t i = 0; i < now.size(); i++) {
        const Region& region = now[i];
        if (address < u64(pages[i].start) || address >= u64(pages[i].start) + pages[i].bytes) {
            continue;
        }
        const std::string array = std::string("array '") + region.name + "'";
        if (address < region.address) {
            return "out of bounds: global memory " + std::to_string(region.address - address)
                + " bytes before the start of " + array;
        }
        if (address >= region.address + region.bytes) {
            return "out of bounds: global memory "
                + std::to_string(address - region.address - region.bytes)
                + " bytes past the end of " + array;
        }
        return "read-only: a write to " + array;
    }
    char text[80];
    snprintf(text, sizeof text, "out of bounds: global address 0x%llx is in no array", address);
    return text;
}

// ---- signals

static const GuardedMemory* watched;
static u64 switches_before;
static u8 signal_stack[64 << 10];

// "{+0x1234}": the place in the library of the instruction that was executed; device.py makes it
// a line of the text.
static std::string place_of(void* context) {
#if defined(__x86_64__)
    const u64 place = static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP];
#elif defined(__aarch64__)
    const u64 place = static_cast<ucontext_t*>(context)->uc_mcontext.pc;
#else
    const u64 place = 0;
#endif
    Dl_info found;
    char text[40] = "";
    if (place != 0 && dladdr(reinterpret_cast<void*>(place), &found) != 0) {
        snprintf(text, sizeof text, " {+0x%llx}", place - u64(found.dli_fbase));
    }
    return text;
}

static void on_fault(int number, siginfo_t* info, void* context) {
    if (current == nullptr) {
        signal(number, SIG_DFL);  // not the kernel's: happens again, and ends the process
        return;
    }
    const u64 address = u64(info->si_addr);
    const std::string who = " (" + name_of(current->index) + place_of(context) + ")";
    const u64 stack = u64(current->stack);
    if (address < stack && address >= stack - page_bytes()) {
        fail("stack overflow" + who);
    }
    fail((watched != nullptr ? watched->explain(address) : "fault of global memory") + who);
}

static void on_alarm(int, siginfo_t*, void* context) {
    if (current != nullptr && statistics.switches == switches_before) {
        fail("livelock: " + name_of(current->index) + " runs and runs and meets nobody ("
             + name_of(current->index) + place_of(context) + ")");
    }
    switches_before = statistics.switches;
}

static void handle(int number, void (*handler)(int, siginfo_t*, void*), struct sigaction* earlier) {
    struct sigaction action = {};
    action.sa_sigaction = handler;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // handlers leave by another way
    sigaction(number, &action, earlier);
}

FaultWatch::FaultWatch(const GuardedMemory* memory, u32 seconds) {
    watched = memory;
    switches_before = ~0ull;
    stack_t stack = {};
    stack.ss_sp = signal_stack;
    stack.ss_size = sizeof signal_stack;
    sigaltstack(&stack, &earlier_stack);
    handle(SIGSEGV, on_fault, &earlier_segv);
    handle(SIGBUS, on_fault, &earlier_bus);
    handle(SIGALRM, on_alarm, &earlier_alarm);
    sigevent event = {};
    event.sigev_notify = SIGEV_THREAD_ID;
    event.sigev_signo = SIGALRM;
    event.sigev_notify_thread_id = syscall(SYS_gettid);
    timed = seconds != 0 && timer_create(CLOCK_MONOTONIC, &event, &timer) == 0;
    if (timed) {
        itimerspec every = {};
        every.it_interval.tv_sec = seconds;
        every.it_value.tv_sec = seconds;
        timer_settime(timer, 0, &every, nullptr);
    }
}

FaultWatch::~FaultWatch() {
    if (timed) {
        timer_delete(timer);
    }
    sigaction(SIGSEGV, &earlier_segv, nullptr);
    sigaction(SIGBUS, &earlier_bus, nullptr);
    sigaction(SIGALRM, &earlier_alarm, nullptr);
    sigaltstack(&earlier_stack, nullptr);
    watched = nullptr;
}

}  // namespace emulator
