// Fibers: each CUDA thread runs on a stack of its own and hands over where it has to wait.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

#if !defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)
#define EMULATOR_UCONTEXT
#endif

#if defined(EMULATOR_UCONTEXT)
#include <ucontext.h>
#endif

namespace emulator {

// A stack and where its fiber stopped. `start` prepares it to run `entry`, which never returns.
#if defined(EMULATOR_UCONTEXT)

struct Fiber {
    ucontext_t context;

    void start(unsigned char* stack, size_t bytes, void (*entry)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        context.uc_stack.ss_size = bytes;
        context.uc_link = nullptr;
        makecontext(&context, entry, 0);
    }
};

static inline void switch_fiber(Fiber& from, Fiber& to) {
    swapcontext(&from.context, &to.context);
}

#else

struct Fiber {
    void** stack_pointer;

    void start(unsigned char* stack, size_t bytes, void (*entry)()) {
        stack_pointer = reinterpret_cast<void**>(stack + bytes);
        *--stack_pointer = nullptr;  // entry finds the stack as after a call
        *--stack_pointer = reinterpret_cast<void*>(entry);
        for (int saved = 0; saved < 6; saved++) {
            *--stack_pointer = nullptr;
        }
    }
};

// Saves what a call keeps (System V), changes stacks, and goes on where the other one stopped.
// A jump, not a return: the processor's guesses of returns are wrong here each time.
static __attribute__((naked, noinline, noipa)) void switch_fiber(Fiber& from, Fiber& to) {
    asm("pushq %rbp\n"
        "pushq %rbx\n"
        "pushq %r12\n"
        "pushq %r13\n"
        "pushq %r14\n"
        "pushq %r15\n"
        "movq %rsp, (%rdi)\n"
        "movq (%rsi), %rsp\n"
        "popq %r15\n"
        "popq %r14\n"
        "popq %r13\n"
        "popq %r12\n"
        "popq %rbx\n"
        "popq %rbp\n"
        "popq %rcx\n"
        "jmp *%rcx\n");
}

#endif

// Stacks are kept from launch to launch. Every kernel that a process has loaded keeps its own, so
// they lie in few mappings, of which a system has no more than some ten thousand: the page below a
// mapping may not be touched, and the lowest word of each stack tells whether it was left.
class Stacks {
public:
    static constexpr size_t BYTES = 256 << 10;
    static constexpr size_t TOGETHER = 128;

    unsigned char* get(size_t index) {
        while (index >= stacks.size()) {
            make();
        }
        unsigned char* stack = stacks[index];
        word(stack) = UNTOUCHED;
        return stack;
    }

    static bool left(unsigned char* stack) {
        return word(stack) != UNTOUCHED;
    }

private:
    static constexpr uint64_t UNTOUCHED = 0x5AFE57AC4B077011ull;

    static uint64_t& word(unsigned char* stack) {
        return *reinterpret_cast<uint64_t*>(stack);
    }

    void make() {
        const size_t page = sysconf(_SC_PAGESIZE);
        void* memory = mmap(nullptr, page + TOGETHER * BYTES, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) {
            fprintf(stderr, "the emulator has no memory for the stacks of its threads\n");
            abort();
        }
        mprotect(memory, page, PROT_NONE);
        for (size_t i = 0; i < TOGETHER; i++) {
            stacks.push_back(static_cast<unsigned char*>(memory) + page + i * BYTES);
        }
    }

    std::vector<unsigned char*> stacks;
};

}  // namespace emulator
