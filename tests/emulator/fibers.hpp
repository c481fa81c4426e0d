// Fibers: each CUDA thread runs on a stack of its own and hands over where it has to wait.
#pragma once

#include <cstddef>
#include <cstdint>
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

// Stacks are kept from launch to launch. The page below each one may not be touched.
class Stacks {
public:
    static constexpr size_t BYTES = 256 << 10;

    unsigned char* get(size_t index) {
        while (index >= stacks.size()) {
            stacks.push_back(make());
        }
        return stacks[index];
    }

private:
    static unsigned char* make() {
        const size_t page = sysconf(_SC_PAGESIZE);
        void* memory = mmap(nullptr, page + BYTES, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) {
            abort();
        }
        mprotect(memory, page, PROT_NONE);
        return static_cast<unsigned char*>(memory) + page;
    }

    std::vector<unsigned char*> stacks;
};

}  // namespace emulator
