// Functions that run in turn on stacks of their own, for the emulation's threads. On x86-64 a switch saves and loads
// the registers that a called function must keep. ucontext, which serves elsewhere, asks the kernel for the signal mask
// each time and takes a hundred times as long; sanitizers know it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define THIMBLE_FAST_FIBERS
#ifdef __clang__
#define THIMBLE_OPAQUE __attribute__((naked, noinline))
#else
#define THIMBLE_OPAQUE __attribute__((naked, noipa))  // the compiler must not conclude what memory it leaves alone
#endif
#else
#include <ucontext.h>
#endif

namespace thimble::cuda::simt {

/// A function's place on its stack, or where a thread of the host left to run one.
class Fiber {
public:
  /// The next switch to this fiber calls `run`, which must not return.
  void begin(void (*run)()) {
    if (!stack_) stack_ = std::make_unique_for_overwrite<char[]>(kStackBytes);
#ifdef THIMBLE_FAST_FIBERS
    const uintptr_t end = (reinterpret_cast<uintptr_t>(stack_.get()) + kStackBytes) / 16 * 16;
    void** at = reinterpret_cast<void**>(end);
    *--at = nullptr;  // in the place of the address to which `run` would return
    *--at = reinterpret_cast<void*>(run);
    for (int i = 0; i < kSavedRegisters; i++) *--at = nullptr;
    place_ = at;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_.get();
    context_.uc_stack.ss_size = kStackBytes;
    context_.uc_link = nullptr;
    makecontext(&context_, run, 0);
#endif
  }

  /// Leaves this fiber, which runs, for another. Returns when something switches back.
  void switch_to(Fiber& other) {
#ifdef THIMBLE_FAST_FIBERS
    switch_stacks(&place_, other.place_);
#else
    swapcontext(&context_, &other.context_);
#endif
  }

private:
  static constexpr size_t kStackBytes = 128 << 10;  // little of it is used
  std::unique_ptr<char[]> stack_;
#ifdef THIMBLE_FAST_FIBERS
  static constexpr int kSavedRegisters = 6;
  void* place_ = nullptr;

  // Arguments are in rdi and rsi. The address to return to is on the stack of each.
  THIMBLE_OPAQUE static void switch_stacks(void** /*leave*/, void* /*enter*/) {
    asm("pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
        "movq %rsp, (%rdi)\n\tmovq %rsi, %rsp\n\t"
        "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret");
  }
#else
  ucontext_t context_;
#endif
};

}  // namespace thimble::cuda::simt
