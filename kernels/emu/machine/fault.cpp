// An access of a kernel that faults ends the launch, as an illegal address does on the card, not the process.
//
// The handler sends the faulting fiber to fault_landing(), on the top of its own stack, and returns. It sees accesses to
// addresses that are not mapped: a stack's guard page, null, far outside. What lies between is the business of the race and
// sanitizer builds, and of the driver's guard zones. Faults outside a kernel go to the handler that was there before.
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <mutex>

#include "machine.h"

namespace emu {

// In the place of an address where the processor gives none: a vector access off its alignment.
constexpr uintptr_t kNoAddress = ~uintptr_t(0);

static struct sigaction previous_segv, previous_bus;
static thread_local bool has_signal_stack;

[[noreturn]] static void fault_landing() {
    const Machine& m = *machine;
    const uintptr_t address = m.fault_address, low = uintptr_t(self().stack->low);
    if (address >= low - kPage && address < low) {
        report(Message::Error, "%s: stack overflow, %zu KiB of local memory a thread",
               thread_name(m, cur->index).c_str(), kStackBytes / 1024);
    } else if (address == kNoAddress) {
        report(Message::Error, "%s: access to memory that is not aligned as its type wants, or to no possible address",
               thread_name(m, cur->index).c_str());
    } else {
        report(Message::Error, "%s: access to address %#zx, where there is no memory", thread_name(m, cur->index).c_str(),
               size_t(address));
    }
    abandon_block();
}

static void pass_on(int signal, siginfo_t* info, void* context) {
    const struct sigaction& previous = signal == SIGBUS ? previous_bus : previous_segv;
    if (previous.sa_flags & SA_SIGINFO) return previous.sa_sigaction(signal, info, context);
    if (previous.sa_handler == SIG_DFL || previous.sa_handler == SIG_IGN) {
        ::signal(signal, SIG_DFL);  // the access happens again, and ends the process
        return;
    }
    previous.sa_handler(signal);
}

static void on_fault(int signal, siginfo_t* info, void* context) {
    if (!machine || !cur) return pass_on(signal, info, context);
    const bool no_address = info->si_code == SI_KERNEL || (signal == SIGBUS && info->si_code == BUS_ADRALN);
    machine->fault_address = no_address ? kNoAddress : uintptr_t(info->si_addr);
    const uintptr_t top = (uintptr_t(self().stack->low) + kStackBytes - 64) & ~uintptr_t(15);
    auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext;
#if defined(__x86_64__)
    registers.gregs[REG_RIP] = greg_t(reinterpret_cast<uintptr_t>(&fault_landing));
    registers.gregs[REG_RSP] = greg_t(top - 8);  // as after a call
#elif defined(__aarch64__)
    registers.pc = reinterpret_cast<uintptr_t>(&fault_landing);
    registers.sp = top;
#endif
}

void catch_faults() {
    if (kAsan) return;  // its own report says more
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        sigemptyset(&action.sa_mask);
        sigaction(SIGSEGV, &action, &previous_segv);
        sigaction(SIGBUS, &action, &previous_bus);
    });
    // A handler cannot run on a stack that has overflowed. Rust's threads have one for signals; ours get one.
    if (has_signal_stack) return;
    has_signal_stack = true;
    stack_t stack = {};
    sigaltstack(nullptr, &stack);
    if (!(stack.ss_flags & SS_DISABLE)) return;
    constexpr size_t kSignalStackBytes = 64 * 1024;
    void* p = mmap(nullptr, kSignalStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return;
    stack = {};
    stack.ss_sp = p;
    stack.ss_size = kSignalStackBytes;
    sigaltstack(&stack, nullptr);
}
}  // namespace emu
