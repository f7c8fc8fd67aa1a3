// wgmma. Its products are carried out when they are issued or when they are waited for (config.async); in between nobody
// may touch the registers they work on. So `d` is moved out of the threads' registers at the first product, NaN stands there
// until the last one was waited for, and what was found there then, and in the registers of `a`, must be unchanged.
#include <algorithm>
#include <memory>

#include "machine.h"

#define EMU_INLINE inline __attribute__((always_inline))

namespace emu {

// What ptxas gives a thread of a kernel with setmaxnreg; 0: it ignores setmaxnreg, not knowing the number.
static unsigned launch_registers(const Kernel& kernel) {
    return kernel.min_blocks ? std::min(65536 / (kernel.max_threads * kernel.min_blocks) / 8 * 8, 256u) : 0;
}

void reset_wgmma(Machine& m) {
    for (Warpgroup& group : m.warpgroup) {
        group.open = group.committed = group.committed_by_first = group.executed = 0;
        memset(group.reached, 0, sizeof group.reached);
        group.fenced_since_wait = group.fenced_since_commit = false;
        group.steps.clear();
        group.products.clear();
        group.groups.clear();
        group.accumulators.clear();
        group.registers = launch_registers(*m.kernel);
        group.wanted = 0;
    }
    m.free_registers = 0;
}

// ---- operands in shared memory ----

struct Operand {
    uint32_t start, leading, stride;
    uint32_t row_bytes;      // of a swizzled row; 16: no swizzle
    uint32_t swizzled_bits;  // chunk numbers of so many bits are exchanged
    bool mn_major;

    // The 16 bytes that begin at row `row` and byte 16 `chunk` of k; MN-major, at k `row` and the other dimension's byte 16
    // `chunk`. An address within the shared window.
    uint32_t at(uint32_t row, uint32_t chunk) const {
        uint32_t address = start + row % 8 * row_bytes;
        if (!swizzled_bits) {
            address += mn_major ? row / 8 * leading + chunk * stride : row / 8 * stride + chunk * leading;
        } else if (mn_major) {
            const uint32_t chunks = row_bytes / 16;
            address += row / 8 * stride + chunk / chunks * leading + chunk % chunks * 16;
        } else {
            address += row / 8 * stride + chunk * 16;
        }
        address ^= (address >> 7 & ((1u << swizzled_bits) - 1)) << 4;
        return address & (kSharedWindow - 1);
    }
};

static Operand operand(uint64_t descriptor, bool mn_major, const char* name, Loc loc) {
    const auto field = [&](int shift) { return uint32_t(descriptor >> shift & 0x3FFF) << 4; };
    const uint32_t bits[4] = {0, 3, 2, 1}, swizzled_bits = bits[descriptor >> 62];
    const Operand o{field(0), field(16), field(32), 16u << swizzled_bits, swizzled_bits, mn_major};
    if (descriptor >> 14 & 3 || descriptor >> 30 & 3 || descriptor >> 46 & 7 || descriptor >> 52 & 0x3FF) {
        die_with(loc, "wgmma: %#llx is no descriptor of %s", static_cast<unsigned long long>(descriptor), name);
    }
    if (descriptor >> 49 & 7) die_with(loc, "wgmma: the emulator has no base offset, the descriptor of %s has one", name);
    const uint32_t offset = o.start % o.row_bytes;
    if (swizzled_bits && (mn_major ? offset != 0 : offset + 32 > o.row_bytes)) {
        die_with(loc, "wgmma: %s starts at byte %u of a swizzled row of %u, %s", name, offset, o.row_bytes,
                 mn_major ? "MN-major it has whole rows" : "and goes past its end");
    }
    return o;
}

static const char* chunk_of(const Machine& m, const Operand& o, uint32_t row, uint32_t chunk, const char* name, Loc loc) {
    const char* p = m.shared + o.at(row, chunk);
    if (!m.in_shared(p, 16)) {
        die_with(loc, "wgmma: row %u of %s is at shared memory + %u, of which the block has %u bytes", row, name,
                 o.at(row, chunk), m.shared_top);
    }
    return p;
}

// ---- the product ----
//
// d += a b in f32, over k in order: products of two such factors are exact in f32, so each step rounds once, as a sum. (The
// card's own order and rounding of the sum are not documented.) Factors become f32 once, as [k][row] and [k][column].

typedef float Row __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(32)));
typedef int32_t Mask __attribute__((vector_size(32)));
typedef uint16_t Halves __attribute__((vector_size(16)));

template <Factors factors>
static EMU_INLINE void to_f32(const Words& bits, float* out) {
    Words result;
    if constexpr (factors == Factors::Bf16) {
        result = bits << 16;
    } else if constexpr (factors == Factors::F16) {  // as to_f32(f16)
        const Words magnitude = bits & 0x7fffu;
        const Row scaled = Row(magnitude << 13) * 0x1p112f;
        result = Words(scaled) | (Words(Mask(magnitude) >= 0x7c00) & 0x7f800000u) | (bits & 0x8000u) << 16;
    } else {  // 4 bits of exponent with bias 7; no Inf, NaN is 0x7f
        const Words magnitude = bits & 0x7fu;
        const Row scaled = Row(magnitude << 20) * 0x1p120f;
        result = Words(scaled) | (Words(Mask(magnitude) == 0x7f) & 0x7fc00000u) | (bits & 0x80u) << 24;
    }
    memcpy(out, &result, sizeof result);
}

static EMU_INLINE void transpose(Words (&r)[8]) {
    Words pairs[8], fours[8];
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        pairs[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < 8; i += 4) {
        for (int odd = 0; odd < 2; odd++) {
            fours[i + 2 * odd] = __builtin_shufflevector(pairs[i + odd], pairs[i + odd + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            fours[i + 2 * odd + 1] = __builtin_shufflevector(pairs[i + odd], pairs[i + odd + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    }
    for (int i = 0; i < 4; i++) {
        r[i] = __builtin_shufflevector(fours[i], fours[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        r[i + 4] = __builtin_shufflevector(fours[i], fours[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

// Eight rows of 32 bytes along k into out[k][0 .. 8], `pitch` floats from k to k.
template <Factors factors>
static EMU_INLINE void decode_eight(const uint32_t (*rows)[8], float* out, int pitch) {
    Words w[8];
    for (int i = 0; i < 8; i++) memcpy(&w[i], rows[i], 32);
    transpose(w);
    for (int i = 0; i < 8; i++) {
        if constexpr (factors == Factors::E4m3) {
            for (int byte = 0; byte < 4; byte++) to_f32<factors>(w[i] >> (8 * byte) & 0xffu, out + (4 * i + byte) * pitch);
        } else {
            to_f32<factors>(w[i] & 0xffffu, out + 2 * i * pitch);
            to_f32<factors>(w[i] >> 16, out + (2 * i + 1) * pitch);
        }
    }
}

// What a product works on.
struct Tiles {
    uint32_t a[64][8], b[256][8];  // rows of k as they lie in memory
    uint16_t b_transposed[16][256];
    alignas(32) float a_f32[32][64], b_f32[32][256];
};

// Four rows of d and `vectors` times eight columns: the sums stay in registers.
template <int vectors, int depth>
static EMU_INLINE void add_products(const Tiles& t, float* d, int n, int row, int column, bool accumulate) {
    Row sum[4][vectors];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
#pragma GCC unroll 2
        for (int j = 0; j < vectors; j++) sum[i][j] = accumulate ? reinterpret_cast<const Row*>(d + i * n)[j] : Row{};
    }
#pragma GCC unroll 2
    for (int k = 0; k < depth; k++) {
        const Row* b = reinterpret_cast<const Row*>(&t.b_f32[k][column]);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
#pragma GCC unroll 2
            for (int j = 0; j < vectors; j++) sum[i][j] += t.a_f32[k][row + i] * b[j];
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
#pragma GCC unroll 2
        for (int j = 0; j < vectors; j++) reinterpret_cast<Row*>(d + i * n)[j] = sum[i][j];
    }
}

template <Factors factors>
static EMU_INLINE void multiply_tiles(Tiles& t, float* d, int n, bool accumulate, bool b_transposed) {
    constexpr int kDepth = factors == Factors::E4m3 ? 32 : 16;
    for (int row = 0; row < 64; row += 8) decode_eight<factors>(t.a + row, &t.a_f32[0][row], 64);
    if (!b_transposed) {
        for (int column = 0; column < n; column += 8) decode_eight<factors>(t.b + column, &t.b_f32[0][column], 256);
    } else if constexpr (factors != Factors::E4m3) {
        for (int k = 0; k < kDepth; k++) {
            for (int column = 0; column < n; column += 8) {
                Halves halves;
                memcpy(&halves, &t.b_transposed[k][column], sizeof halves);
                to_f32<factors>(__builtin_convertvector(halves, Words), &t.b_f32[k][column]);
            }
        }
    }
    for (int row = 0; row < 64; row += 4) {
        float* sums = d + row * n;
        int column = 0;
        for (; column + 16 <= n; column += 16) add_products<2, kDepth>(t, sums + column, n, row, column, accumulate);
        if (column < n) add_products<1, kDepth>(t, sums + column, n, row, column, accumulate);
    }
}

using Multiply = void (*)(Tiles&, float* d, int n, bool accumulate, bool b_transposed);
template <Factors factors>
static void multiply_plain(Tiles& t, float* d, int n, bool accumulate, bool b_transposed) {
    multiply_tiles<factors>(t, d, n, accumulate, b_transposed);
}
#if defined(__x86_64__)
template <Factors factors>
__attribute__((target("avx2"))) static void multiply_avx2(Tiles& t, float* d, int n, bool accumulate, bool b_transposed) {
    multiply_tiles<factors>(t, d, n, accumulate, b_transposed);
}
template <Factors factors>
static const Multiply multiply_best = __builtin_cpu_supports("avx2") ? multiply_avx2<factors> : multiply_plain<factors>;
#else
template <Factors factors>
static const Multiply multiply_best = multiply_plain<factors>;
#endif

static void multiply(Machine& m, WgmmaRecord& w) {
    if (!m.tiles) m.tiles = new Tiles;
    Tiles& t = *m.tiles;
    const WgmmaCall& call = w.call;
    w.done = true;
    m.stats.wgmma++;
    if (call.a_in_registers) {
        for (int thread = 0; thread < 128; thread++) {
            const uint32_t* held = w.a_place[thread];
            const int row = thread / 32 * 16 + thread % 32 / 4, word = thread % 4;
            t.a[row][word] = held[0];
            t.a[row + 8][word] = held[1];
            t.a[row][word + 4] = held[2];
            t.a[row + 8][word + 4] = held[3];
        }
    } else {
        const Operand a = operand(call.a, false, "a", w.where);
        for (uint32_t row = 0; row < 64; row++) {
            for (uint32_t chunk = 0; chunk < 2; chunk++) {
                memcpy(&t.a[row][chunk * 4], chunk_of(m, a, row, chunk, "a", w.where), 16);
            }
        }
    }
    const Operand b = operand(call.b, call.b_transposed, "b", w.where);
    const uint32_t n = uint32_t(call.n);
    if (call.b_transposed) {
        for (uint32_t k = 0; k < 16; k++) {
            for (uint32_t chunk = 0; chunk < n / 8; chunk++) {
                memcpy(&t.b_transposed[k][chunk * 8], chunk_of(m, b, k, chunk, "b", w.where), 16);
            }
        }
    } else {
        for (uint32_t column = 0; column < n; column++) {
            for (uint32_t chunk = 0; chunk < 2; chunk++) {
                memcpy(&t.b[column][chunk * 4], chunk_of(m, b, column, chunk, "b", w.where), 16);
            }
        }
    }
    const Multiply best[] = {multiply_best<Factors::Bf16>, multiply_best<Factors::F16>, multiply_best<Factors::E4m3>};
    best[unsigned(call.factors)](t, w.accumulators->value, call.n, call.accumulate, call.b_transposed);
}

static void check_reads(Machine& m, const WgmmaCall& call, unsigned index, uint32_t group, Loc loc) {
    const auto read = [&](const Operand& o, uint32_t rows, uint32_t chunks, const char* name) {
        for (uint32_t row = 0; row < rows; row++) {
            for (uint32_t chunk = 0; chunk < chunks; chunk++) {
                race::wgmma_read(chunk_of(m, o, row, chunk, name, loc), 16, index, group, loc);
            }
        }
    };
    if (!call.a_in_registers) read(operand(call.a, false, "a", loc), 64, 2, "a");
    const Operand b = operand(call.b, call.b_transposed, "b", loc);
    const uint32_t n = uint32_t(call.n);
    call.b_transposed ? read(b, 16, n / 8, "b") : read(b, n, 2, "b");
}

// ---- registers of d ----

// Where there is none of the kernel's own values: a NaN.
constexpr uint32_t kUnderWay = 0x7fd0d0d0;

// Calls visit(registers, values, thread) for each two neighbouring columns of a row that a thread holds.
template <class Visit>
static EMU_INLINE void each_pair(Accumulators& d, Visit&& visit) {
    for (unsigned t = 0; t < 128; t++) {
        float* held = d.place[t];
        float* value = d.value + (t / 32 * 16 + t % 32 / 4) * unsigned(d.n) + t % 4 * 2;
        for (int i = 0; i < d.n / 2; i += 4, held += 4, value += 8) {
            visit(held, value, t);
            visit(held + 2, value + 8 * d.n, t);
        }
    }
}
static uint64_t bits(const float* pair) {
    uint64_t two;
    memcpy(&two, pair, 8);
    return two;
}

// At a fence: what the registers hold now is what a product may find. They may be another variable's by now.
__attribute__((no_sanitize("address"))) static void remember(Accumulators& d) {
    each_pair(d, [](const float* held, float* value, unsigned) __attribute__((no_sanitize("address"), always_inline)) {
        value[0] = held[0];
        value[1] = held[1];
    });
    d.fenced = true;
}

// The first product since ordinary code could use the registers.
static void take_over(Accumulators& d, const WgmmaRecord& w, const Warpgroup& group) {
    if (d.is_known ? !d.fenced && !w.call.accumulate : !group.fenced_since_wait) {
        die_with(w.where, "wgmma without wgmma_fence since its accumulators were free for ordinary use");
    }
    unsigned changed = 0;
    if (w.call.accumulate) {
        each_pair(d, [&](const float* held, float* value, unsigned t) {
            if (bits(held) != bits(value)) changed = changed ? changed : t + 1;
            memcpy(value, held, 8);
        });
    }
    if (d.is_known && changed) {
        die_with(w.where, "wgmma: its accumulators in thread %u of the warpgroup were written after the latest %s", changed - 1,
                 d.fenced ? "wgmma_fence" : "wgmma_wait, and no wgmma_fence came in between");
    }
    const uint32_t under_way[2] = {kUnderWay, kUnderWay};
    each_pair(d, [&](float* held, float*, unsigned) { memcpy(held, under_way, 8); });
}

static void hand_back(Accumulators& d, Loc loc) {
    const uint64_t under_way = kUnderWay | uint64_t(kUnderWay) << 32;
    each_pair(d, [&](float* held, float* value, unsigned t) {
        if (bits(held) != under_way) {
            die_with(loc, "wgmma issued at %s:%d: its accumulators in thread %u of the warpgroup were written before wgmma_wait",
                     d.where.file, d.where.line, t);
        }
        memcpy(held, value, 8);
    });
    d.fenced = false;
}

static Accumulators& accumulators_of(Warpgroup& group, const WgmmaRecord& w) {
    const int n = w.call.n;
    constexpr size_t kMostKnown = 8;
    std::vector<std::unique_ptr<Accumulators>>& all = group.accumulators;
    for (size_t i = 0; i < all.size(); i++) {
        Accumulators& d = *all[i];
        if (d.n == n && memcmp(d.place, w.d, sizeof w.d) == 0) return d;
        if (w.d[0] + n / 2 <= d.place[0] || d.place[0] + d.n / 2 <= w.d[0]) continue;
        if (d.under_way) {
            die_with(w.where, "wgmma of n = %d on accumulators of one of n = %d issued at %s:%d and not waited for", n, d.n,
                     d.where.file, d.where.line);
        }
        all.erase(all.begin() + ptrdiff_t(i--));
    }
    const auto idle = std::find_if(all.begin(), all.end(), [](const auto& d) { return !d->under_way; });
    if (all.size() >= kMostKnown && idle != all.end()) all.erase(idle);
    all.push_back(std::make_unique_for_overwrite<Accumulators>());
    Accumulators& d = *all.back();
    memcpy(d.place, w.d, sizeof w.d);
    d.n = n;
    d.under_way = 0;
    d.is_known = d.fenced = false;
    return d;
}

// ---- a warpgroup's steps ----

static void issue(Machine& m, Warpgroup& group, std::unique_ptr<WgmmaRecord> product) {
    WgmmaRecord& w = *product;
    if (w.call.a_in_registers && !group.fenced_since_commit) {
        die_with(w.where, "wgmma with `a` in registers without wgmma_fence since the latest wgmma_commit or wgmma_wait");
    }
    Accumulators& d = accumulators_of(group, w);
    if (!d.under_way) take_over(d, w, group);
    d.is_known = true;
    d.under_way++;
    d.where = w.where;
    w.accumulators = &d;
    w.done = false;
    group.products.push_back(std::move(product));
    group.open++;
    if (m.async == Early || (m.async == Mixed && m.random() % 2)) {
        for (auto& earlier : group.products) {
            if (!earlier->done) multiply(m, *earlier);
        }
    }
}

static void end_oldest(Machine& m, Warpgroup& group, Loc loc) {
    WgmmaRecord& w = *group.products.front();
    for (int t = 0; t < 128 && w.call.a_in_registers; t++) {
        if (memcmp(w.a_place[t], w.a[t], sizeof w.a[t])) {
            die_with(loc, "wgmma issued at %s:%d: its `a` in registers of thread %d of the warpgroup changed before wgmma_wait",
                     w.where.file, w.where.line, t);
        }
    }
    if (!w.done) multiply(m, w);
    if (--w.accumulators->under_way == 0) hand_back(*w.accumulators, loc);
    group.unused.push_back(std::move(group.products.front()));
    group.products.pop_front();
}

static void make_ready(Machine& m, unsigned index) {
    for (unsigned w = index * 4; w < index * 4 + 4; w++) m.make_ready(w, kFullWarp);
}

// Those that wait for registers, in the order of their number; the card's is not documented.
static void give_registers(Machine& m) {
    for (unsigned i = 0; i * 128 < m.threads; i++) {
        Warpgroup& group = m.warpgroup[i];
        if (!group.wanted || group.wanted - group.registers > m.free_registers) continue;
        m.free_registers -= group.wanted - group.registers;
        group.registers = group.wanted;
        group.wanted = 0;
        make_ready(m, i);
    }
}

static void change_registers(Machine& m, Warpgroup& group, unsigned registers, bool increase, Loc loc) {
    if (!group.registers) {
        die_with(loc, "setmaxnreg in a kernel whose launch bounds have no number of blocks: ptxas ignores it");
    }
    if (increase ? registers < group.registers : registers > group.registers) {
        die_with(loc, "setmaxnreg.%s to %u registers per thread, but the warpgroup has %u", increase ? "inc" : "dec", registers,
                 group.registers);
    }
    if (!increase) {
        m.free_registers += group.registers - registers;
        group.registers = registers;
    } else {
        group.wanted = registers;
    }
    give_registers(m);
}

static void execute(Machine& m, Warpgroup& group, unsigned index, std::unique_ptr<WgmmaRecord> record) {
    const WgmmaCall call = record->call;
    const Loc loc = record->where;
    if (call.step == WgmmaStep::Multiply) return issue(m, group, std::move(record));
    group.unused.push_back(std::move(record));
    switch (call.step) {
        case WgmmaStep::Multiply: break;
        case WgmmaStep::Fence:
            for (auto& d : group.accumulators) {
                if (!d->under_way) remember(*d);
            }
            group.fenced_since_wait = group.fenced_since_commit = true;
            break;
        case WgmmaStep::Commit:
            group.groups.push_back(group.open);
            group.open = 0;
            group.committed++;
            group.fenced_since_commit = false;
            break;
        case WgmmaStep::Wait:
            for (; group.groups.size() > size_t(call.n); group.groups.erase(group.groups.begin())) {
                for (uint32_t i = 0; i < group.groups[0]; i++) end_oldest(m, group, loc);
            }
            group.fenced_since_wait = group.fenced_since_commit = false;
            if constexpr (kRace) {
                const uint32_t pending = uint32_t(call.n);
                race::wgmmas_done(index, group.committed > pending ? group.committed - pending : 0);
            }
            make_ready(m, index);
            break;
        case WgmmaStep::Increase: change_registers(m, group, unsigned(call.n), true, loc); break;
        case WgmmaStep::Decrease:
            change_registers(m, group, unsigned(call.n), false, loc);
            make_ready(m, index);
            break;
    }
}

static const char* name_of(WgmmaStep step) {
    static const char* const names[] = {"wgmma.fence",      "wgmma",          "wgmma.commit_group",
                                        "wgmma.wait_group", "setmaxnreg.inc", "setmaxnreg.dec"};
    return names[unsigned(step)];
}

// The thread's next step. It goes on at once but where it has to wait; the step is carried out when all have reached it.
static void reach(const WgmmaCall& call, float* d, const uint32_t* a, Loc loc) {
    Machine& m = *machine;
    Thread& me = self();
    const unsigned index = me.warp / 4, t = me.index % 128;
    if ((index + 1) * 128 > m.threads) die_with(loc, "%s in an incomplete warpgroup", name_of(call.step));
    Warpgroup& group = m.warpgroup[index];
    const uint32_t ahead = group.reached[t]++ - group.executed;
    if (ahead == group.steps.size()) {
        for (unsigned w = index * 4; w < index * 4 + 4; w++) {
            if (m.warp[w].alive != kFullWarp) die_with(loc, "%s, but threads of its warpgroup have left the kernel", name_of(call.step));
        }
        if (group.unused.empty()) group.unused.push_back(std::make_unique_for_overwrite<WgmmaRecord>());
        group.steps.push_back(std::move(group.unused.back()));
        group.unused.pop_back();
        group.steps.back()->call = call;
        group.steps.back()->where = loc;
        group.steps.back()->arrived = 0;
    }
    WgmmaRecord& r = *group.steps[ahead];
    if (r.call.step != call.step || r.where.line != loc.line || r.where.file != loc.file) {
        die_with(loc, "threads of a warpgroup at different wgmma or setmaxnreg instructions: here %s, others in %s at %s:%d",
                 name_of(call.step), name_of(r.call.step), r.where.file, r.where.line);
    }
    if (r.call != call) die_with(loc, "wgmma with different descriptors or another form in the threads of a warpgroup");
    r.d[t] = d;
    r.a_place[t] = a;
    if (a) memcpy(r.a[t], a, sizeof r.a[t]);
    if (t == 0 && call.step == WgmmaStep::Multiply) {
        // What is wrong with an operand is told here, whenever it is read.
        if (!a) operand(call.a, false, "a", loc);
        operand(call.b, call.b_transposed, "b", loc);
        if constexpr (kRace) check_reads(m, call, index, group.committed_by_first + 1, loc);
    }
    if (t == 0 && call.step == WgmmaStep::Commit) group.committed_by_first++;
    const bool waits = call.step >= WgmmaStep::Wait;
    if (++r.arrived == 128) {
        std::unique_ptr<WgmmaRecord> record = std::move(group.steps.front());
        group.steps.pop_front();
        group.executed++;
        me.where = loc;
        execute(m, group, index, std::move(record));
        if (!waits) yield_at_random(m);
    }
    if (waits) wait_for_others(name_of(call.step), loc);
}

void check_wgmma_at_exit(const Machine& m, const Thread& me) {
    const Warpgroup& group = m.warpgroup[me.warp / 4];
    const uint32_t ahead = group.reached[me.index % 128] - group.executed;
    if (ahead >= group.steps.size()) return;
    const WgmmaRecord& r = *group.steps[ahead];
    die_with(r.where, "left the kernel while others of its warpgroup are in %s here", name_of(r.call.step));
}

void wgmma(float* d, int n, Factors factors, const uint32_t* a_registers, uint64_t a, uint64_t b, bool accumulate,
           bool b_transposed, Loc loc) {
    reach({WgmmaStep::Multiply, factors, accumulate, b_transposed, a_registers != nullptr, n, a, b}, d, a_registers, loc);
}
static void reach(WgmmaStep step, int n, Loc loc) {
    reach({step, Factors::Bf16, false, false, false, n, 0, 0}, nullptr, nullptr, loc);
}
void wgmma_fence(Loc loc) { reach(WgmmaStep::Fence, 0, loc); }
void wgmma_commit(Loc loc) { reach(WgmmaStep::Commit, 0, loc); }
void wgmma_wait(int pending, Loc loc) { reach(WgmmaStep::Wait, pending, loc); }
void setmaxnreg(int registers, bool increase, Loc loc) {
    reach(increase ? WgmmaStep::Increase : WgmmaStep::Decrease, registers, loc);
}
}  // namespace emu
