// What the emulator's own tests share. tests/emulator.rs compiles them with the emulator, once plain, once with the race
// detector and once with the sanitizers, and runs each program.
#pragma once
#include <cstdarg>
#include <functional>
#include <string>
#include <vector>

#include "common/device.cuh"

#ifdef EMU_RACE
constexpr bool kRaceBuild = true;
#else
constexpr bool kRaceBuild = false;
#endif
#ifdef __SANITIZE_ADDRESS__
constexpr bool kSanitizeBuild = true;
#else
constexpr bool kSanitizeBuild = false;
#endif

struct Test {
    const char* name;
    void (*run)();
    Test* next;
    static inline Test* first = nullptr;
    Test(const char* name, void (*run)()) : name(name), run(run), next(first) { first = this; }
};
#define TEST(name)           \
    static void name();      \
    static Test name##_test(#name, name); \
    static void name()

inline int failures = 0;
inline const char* running = "";
__attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
    va_list args;
    va_start(args, format);
    if (++failures <= 40) {
        printf("FAILED %s: ", running);
        vprintf(format, args);
        printf("\n");
    }
    va_end(args);
}

inline std::string mode_name() {
    static const char* schedules[] = {"in-order", "reverse", "random", "run-ahead"};
    static const char* completions[] = {"early", "late", "mixed"};
    return std::string(schedules[emu::config.sched]) + ", " + completions[emu::config.async] + ", seed " +
           std::to_string(emu::config.seed);
}
#define CHECK(condition) \
    if (!(condition)) fail("%s:%d: %s (%s)", __FILE__, __LINE__, #condition, mode_name().c_str())

// Fixed pseudo-random numbers.
struct Random {
    uint64_t state = 1;
    uint32_t next() {
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        return uint32_t(state >> 33);
    }
    float small_integer() { return float(int(next() % 9) - 4); }  // sums of products stay exact
    float uniform() { return float(next() % 65536) / 32768.f - 1.f; }
};

// Host memory as the card's: 256-byte aligned, of NaN.
template <class T>
struct Buffer {
    size_t count;
    T* data;
    explicit Buffer(size_t count)
        : count(count), data(static_cast<T*>(aligned_alloc(256, (count * sizeof(T) + 255) / 256 * 256))) {
        memset(static_cast<void*>(data), 0xFF, count * sizeof(T));
    }
    Buffer(const Buffer&) = delete;
    ~Buffer() { free(data); }
    T& operator[](size_t i) { return data[i]; }
};

template <class... A>
int run(const char* kernel, dim3 grid, dim3 block, unsigned smem, A... args) {
    void* params[] = {const_cast<void*>(static_cast<const void*>(&args))..., nullptr};
    const emu::Thunk fn = emu::find(kernel);
    if (!fn) {
        fail("no kernel %s", kernel);
        return -1;
    }
    return emu::launch(fn, grid, block, smem, params);
}

// All schedules with all completions, under two seeds.
inline void in_every_mode(const std::function<void()>& body) {
    for (const emu::Sched sched : {emu::InOrder, emu::Reverse, emu::Random, emu::RunAhead}) {
        for (const emu::Async async : {emu::Early, emu::Late, emu::Mixed}) {
            for (const uint64_t seed : {1, 2}) {
                emu::config.sched = sched;
                emu::config.async = async;
                emu::config.seed = seed;
                body();
            }
        }
    }
    emu::config = {};
    emu::config.quiet = true;
}

// A correct kernel: no message.
inline void expect_clean(int result, int line) {
    if (result != 0) fail("line %d: reported: %s (%s)", line, emu::last_error(), mode_name().c_str());
}
#define CLEAN(...) expect_clean(run(__VA_ARGS__), __LINE__)

// A wrong one: a message with each of the texts.
inline void expect_report(int result, int line, std::initializer_list<const char*> texts) {
    if (result == 0) return fail("line %d: nothing was reported (%s)", line, mode_name().c_str());
    for (const char* text : texts) {
        if (!strstr(emu::last_error(), text)) {
            fail("line %d: no \"%s\" in: %s (%s)", line, text, emu::last_error(), mode_name().c_str());
        }
    }
}
#define REPORTS(result, ...) expect_report(result, __LINE__, {__VA_ARGS__})
