// Operations: what was asked for and has not happened yet. They form a graph; one may run when all it waits for have.
// Which of those that may run does so next is drawn from the seed. All of this runs with the driver locked.
#include "driver.h"

namespace emu::driver {

static Timing timing = Timing::Early;
static uint64_t random_state = 0x9E3779B97F4A7C15ull;
static std::vector<OperationRef> ready;  // waits for nothing, has not run
static int held = 0;                     // Holds in force
static uint64_t waits = 0;               // numbers the calls that wait

void set_timing(Timing new_timing, uint64_t seed) {
    timing = new_timing;
    random_state = seed * 0x9E3779B97F4A7C15ull ^ 0x2545F4914F6CDD1Dull;
    if (random_state == 0) random_state = 1;
}

uint64_t draw(uint64_t below) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (random_state >> 11) % below;
}

// Keeps operations alive that nobody else refers to: those of a destroyed stream, the free of a memory.
static std::unordered_set<OperationRef>& pending() {
    static auto* only = new std::unordered_set<OperationRef>;
    return *only;
}

// Runs ready[index]. In a faulty context the work is dropped: a card runs nothing after a fault either.
static void run_ready(size_t index) {
    const OperationRef operation = ready[index];
    ready[index] = ready.back();
    ready.pop_back();
    if (operation->work && state().fault == CUDA_SUCCESS) {
        const CUresult result = operation->work->run();
        if (result != CUDA_SUCCESS && state().fault == CUDA_SUCCESS) state().fault = result;
    }
    operation->done = true;
    operation->work = nullptr;
    operation->waits_for.clear();
    for (const auto& weak : operation->dependents) {
        const OperationRef dependent = weak.lock();
        if (dependent && --dependent->missing == 0) ready.push_back(dependent);
    }
    operation->dependents.clear();
    pending().erase(operation);
}

static void run_some(uint64_t count) {
    while (count-- && !ready.empty()) run_ready(draw(ready.size()));
}

// What runs right after something was asked for.
static void run_what_timing_asks() {
    if (timing == Timing::Early) {
        while (!ready.empty()) run_ready(draw(ready.size()));
    } else if (timing == Timing::Mixed && draw(2)) {
        run_some(1 + draw(4));
    }
}

OperationRef append(WorkRef work, const std::vector<OperationRef>& waits_for) {
    auto operation = std::make_shared<Operation>();
    operation->work = std::move(work);
    for (const OperationRef& earlier : waits_for) {
        if (!earlier || earlier->done) continue;
        operation->waits_for.push_back(earlier);
        earlier->dependents.push_back(operation);
    }
    operation->missing = operation->waits_for.size();
    pending().insert(operation);
    if (operation->missing == 0) ready.push_back(operation);
    if (held == 0) run_what_timing_asks();
    return operation;
}

Hold::Hold() { held++; }

Hold::~Hold() {
    if (--held == 0) run_what_timing_asks();
}

bool completes_at_once() { return timing == Timing::Early && held == 0; }

// Marks what `target` needs with the number of this wait; depth first, without recursion: a queue may be long.
static void mark_wanted(const OperationRef& target, uint64_t number) {
    std::vector<Operation*> stack{target.get()};
    while (!stack.empty()) {
        Operation* operation = stack.back();
        stack.pop_back();
        if (operation->done || operation->wanted == number) continue;
        operation->wanted = number;
        for (const OperationRef& earlier : operation->waits_for) stack.push_back(earlier.get());
    }
}

// Runs one operation that the wait `number` wants, drawn from those that are ready.
static void run_one_wanted(uint64_t number) {
    std::vector<size_t> candidates;
    for (size_t i = 0; i < ready.size(); i++) {
        if (ready[i]->wanted == number) candidates.push_back(i);
    }
    run_ready(candidates[draw(candidates.size())]);
}

CUresult wait_for(const OperationRef& target) {
    if (target && !target->done) {
        const uint64_t number = ++waits;
        mark_wanted(target, number);
        while (!target->done) {
            if (timing == Timing::Mixed && draw(4) == 0) {
                run_some(1);
            } else {
                run_one_wanted(number);
            }
        }
    }
    if (state().fault == CUDA_SUCCESS) check_guards("seen at a synchronisation, after " + last_launch());
    return state().fault;
}

CUresult wait_for_everything() {
    while (!ready.empty()) run_ready(draw(ready.size()));
    if (state().fault == CUDA_SUCCESS) check_guards("seen at a synchronisation, after " + last_launch());
    return state().fault;
}

void make_progress(const OperationRef& target) {
    if (!target || target->done) return;
    const uint64_t number = ++waits;
    mark_wanted(target, number);
    run_one_wanted(number);
}

void forget_operations() {
    for (const OperationRef& operation : pending()) {
        operation->done = true;
        operation->work = nullptr;
        operation->waits_for.clear();
        operation->dependents.clear();
    }
    pending().clear();
    ready.clear();
}

}  // namespace emu::driver
