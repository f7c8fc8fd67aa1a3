// CPU SIMT emulator: fiber scheduler, collectives, async-copy engine, Hopper pieces, race detector.
#include "emu.h"
#include <atomic>
#include <cstdarg>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>
#include <dlfcn.h>
#include <sys/mman.h>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define ASAN 1
#endif
#ifndef EMU_STACK
#define EMU_STACK (64 * 1024)
#endif
namespace emu {
Config config; Stats stats; __thread Ctx* cur;
bool race_on = false;                       // set by the race build (emu_race.cpp)
static Reg* regs; static std::mutex out_mu; static std::atomic<int> n_errors;
Reg::Reg(const char* n, Thunk f, const Param* p, unsigned count, unsigned threads) : name(n), fn(f), params(p), param_count(count), max_threads(threads), next(regs) { regs = this; }
const Reg* find_registered(const char* n) { for (Reg* r = regs; r; r = r->next) if (!strcmp(r->name, n)) return r; return nullptr; }
Thunk find(const char* n) { const Reg* r = find_registered(n); return r ? r->fn : nullptr; }

// ---------------- context switch ----------------
#if defined(__x86_64__) && !defined(EMU_UCONTEXT)
extern "C" void emu_switch(void** save, void* to);
asm(R"(
.text
.globl emu_switch
.type emu_switch,@function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch,.-emu_switch
)");
static void* make_stack(char* top, void (*entry)()) { void** s = (void**)((uintptr_t)top & ~(uintptr_t)15); *--s = nullptr; *--s = (void*)entry; for (int i = 0; i < 6; i++) *--s = nullptr; return s; }
#elif defined(__aarch64__) && !defined(EMU_UCONTEXT)
extern "C" void emu_switch(void** save, void* to);
asm(R"(
.text
.globl emu_switch
emu_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
static void* make_stack(char* top, void (*entry)()) { char* s = (char*)((uintptr_t)top & ~(uintptr_t)15) - 160; memset(s, 0, 160); ((void**)s)[11] = (void*)entry; return s; }
#else
#include <ucontext.h>
static void emu_switch(void** save, void* to) { ucontext_t u; *save = &u; swapcontext(&u, (ucontext_t*)to); }
static void* make_stack(char* top, void (*entry)()) { auto* u = (ucontext_t*)(((uintptr_t)top - sizeof(ucontext_t)) & ~(uintptr_t)63); getcontext(u); u->uc_stack.ss_sp = top - EMU_STACK / 2; u->uc_stack.ss_size = (char*)u - (char*)u->uc_stack.ss_sp - 64; u->uc_link = nullptr; makecontext(u, entry, 0); return u; }
#endif

// ---------------- state ----------------
constexpr int MAXT = 1024; constexpr size_t SMEM = 256 * 1024, SMEM_MAX = 227 * 1024;
struct Cp { void* s; const void* g; int n, src; };
struct Fiber : Ctx {
  void* sp; char* lo; void* fake; const char* what; Loc loc; bool done;
  std::vector<Cp> cps; std::vector<uint32_t> cp_groups; uint32_t cp_committed; // cp_groups[i] = number of cps in i-th outstanding group
};
enum OpKind { OpSync, OpShfl, OpBallot, OpLd, OpMma };
struct Pend { uint32_t mask, arrived; OpKind op; Loc loc; void* pay[32]; void (*exec)(Pend&); };
struct Warp { uint32_t ready, alive; Pend p[4]; };
struct WgMma { float* d[128]; int n; uint64_t da, db; bool scale, bf, tb; Loc loc; };
struct Wg { int arrived; int op; Loc loc; void* pay[128]; std::vector<WgMma> q; std::vector<uint32_t> groups; uint32_t open, committed; };
struct Bar { int arrived, need; Loc loc; std::vector<uint16_t> waiters; std::vector<uint32_t> vc; };
struct Tma { char* s; TensorMap m; uint64_t* bar; int c[5]; uint32_t bytes; uint32_t clk; int comp; Loc loc; };
struct MbarInfo { std::vector<uint16_t> waiters; std::vector<uint32_t> acc, snap; int comp; uint32_t clk; };
struct Cell { const char* wfile; uint64_t wwhere; uint32_t wc; int16_t wt; bool init, watom, fenced; std::vector<std::tuple<int16_t, uint32_t, const char*, uint64_t>> rd; };
struct StaticSm { const void* key; void* p; };
struct Block {
  char* smem = nullptr; char* stacks = nullptr; void* main_sp; void* main_fake; const void* main_lo; size_t main_sz;
  Fiber f[MAXT]; Warp w[32]; Wg wg[8]; Bar bar[16]; uint32_t ready_warps; int nt, alive; bool failed;
  unsigned dyn, static_top; std::vector<StaticSm> statics; std::vector<Tma> tmas; std::unordered_map<uint64_t*, MbarInfo> mbars;
  Thunk fn; void* const* params; uint64_t rng; uint8_t order[32]; int last_warp; unsigned block_lin;
  Stats st{};
  // race detector
  int W; std::vector<uint32_t> C; std::vector<Cell> cells; std::vector<uint32_t> fenced;
  uint32_t rnd() { rng ^= rng << 13; rng ^= rng >> 7; rng ^= rng << 17; return (uint32_t)(rng >> 11); }
  uint32_t* vc(int t) { return &C[(size_t)t * W]; }
};
static thread_local Block* tB;
static __thread Block* B;
static inline Fiber* self() { return static_cast<Fiber*>(cur); }
static void report(const char* kind, const char* fmt, ...) {
  char buf[1024]; va_list ap; va_start(ap, fmt); vsnprintf(buf, sizeof buf, fmt, ap); va_end(ap);
  int n = n_errors++; std::lock_guard<std::mutex> g(out_mu);
  if (n < 8) fprintf(stderr, "[emu] %s: block %u: %s\n", kind, B ? B->block_lin : 0, buf); }
static void set_ready(int t) { Block& b = *B; b.w[t >> 5].ready |= 1u << (t & 31); b.ready_warps |= 1u << (t >> 5); }
static inline int nth_bit(uint32_t m, int n) { while (n--) m &= m - 1; return __builtin_ctz(m); }
static void run_tma(size_t i);
static Fiber* pick() {
  Block& b = *B;
  for (;;) {
    if (!b.tmas.empty() && (!b.ready_warps || (config.async == Mixed && (b.rnd() & 3) == 0))) { run_tma(config.async == Mixed ? b.rnd() % b.tmas.size() : 0); continue; }
    if (!b.ready_warps) return nullptr;
    int w; uint32_t r = b.ready_warps;
    switch (config.sched) {
      case InOrder: if (r >> b.last_warp & 1) w = b.last_warp; else { uint32_t hi = r & ~((2u << b.last_warp) - 1); w = __builtin_ctz(hi ? hi : r); } break;
      case Reverse: w = 31 - __builtin_clz(r); break;
      case Random: w = nth_bit(r, b.rnd() % __builtin_popcount(r)); break;
      default: { int i = 0; while (!(r >> b.order[i] & 1)) i++; w = b.order[i]; }
    }
    b.last_warp = w; uint32_t l = b.w[w].ready; int lane = config.sched == InOrder ? __builtin_ctz(l) : config.sched == Reverse ? 31 - __builtin_clz(l) : nth_bit(l, b.rnd() % __builtin_popcount(l));
    b.w[w].ready &= ~(1u << lane); if (!b.w[w].ready) b.ready_warps &= ~(1u << w);
    return &b.f[w * 32 + lane];
  }
}
static void to_main(Fiber* f) {
#ifdef ASAN
  __sanitizer_start_switch_fiber(nullptr, B->main_lo, B->main_sz);
#endif
  emu_switch(&f->sp, B->main_sp); __builtin_unreachable(); }
static void switch_to(Fiber* from, Fiber* to, bool dying) {
  if (from == to) return;
  cur = to; B->st.switches++;
#ifdef ASAN
  __sanitizer_start_switch_fiber(dying ? nullptr : &from->fake, to->lo, EMU_STACK);
#endif
  emu_switch(&from->sp, to->sp);
#ifdef ASAN
  __sanitizer_finish_switch_fiber(from->fake, nullptr, nullptr);
#endif
}
static void deadlock() {
  Block& b = *B; std::string s = "deadlock:";
  for (int w = 0; w * 32 < b.nt; w++) for (int l = 0; l < 32 && w * 32 + l < b.nt; l++) { Fiber& f = b.f[w * 32 + l]; if (f.done) continue;
    bool first = l == 0 || b.f[w * 32 + l - 1].done || b.f[w * 32 + l - 1].loc.line != f.loc.line; if (!first) continue; char t[256]; snprintf(t, sizeof t, "\n    warp %d lane %d.. in %s at %s:%d", w, l, f.what, f.loc.file, f.loc.line); s += t; }
  report("ERROR", "%s", s.c_str()); b.failed = true; to_main(self()); }
[[noreturn]] void die(const char* what, Loc loc) { report("ERROR", "thread %u: %s (%s:%d)", cur->lin, what, loc.file, loc.line); B->failed = true; to_main(self()); __builtin_unreachable(); }
static void block_me(const char* what, Loc loc) { Fiber* f = self(); f->what = what; f->loc = loc; Fiber* n = pick(); if (!n) deadlock(); switch_to(f, n, false); }
static void check_pend(Warp& w, Pend& p) {
  if (p.arrived && p.arrived == (p.mask & w.alive)) { uint32_t m = p.arrived; p.exec(p); p.arrived = 0; int base = (int)(&w - B->w) * 32; for (; m; m &= m - 1) set_ready(base + __builtin_ctz(m)); } }
static void check_bar(Bar& b);
static void fiber_main() {
#ifdef ASAN
  if (B->main_sz) __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
  else __sanitizer_finish_switch_fiber(nullptr, &B->main_lo, &B->main_sz);
#endif
  B->fn(B->params);
  Fiber* f = self(); Block& b = *B; f->done = true; b.alive--; Warp& w = b.w[f->warp]; w.alive &= ~(1u << f->lane);
  if (!f->cps.empty() || !f->cp_groups.empty()) for (auto& c : f->cps) { memcpy(c.s, c.g, c.src); memset((char*)c.s + c.src, 0, c.n - c.src); }
  for (auto& p : w.p) check_pend(w, p);
  if (b.alive) check_bar(b.bar[0]);
  Fiber* n = pick(); if (!n) { if (b.alive) deadlock(); to_main(f); } switch_to(f, n, true); __builtin_unreachable(); }

// ---------------- race detector ----------------
static std::string sym(uint64_t pc);
constexpr int G = 2; // shadow granule in bytes
static void where(char* out, size_t n, const char* file, uint64_t w) { if (file) snprintf(out, n, "%s:%d", file, (int)w); else snprintf(out, n, "%s", sym(w).c_str()); }
static void comp_name(char* o, size_t n, int c) { int T = B->nt; if (c < T) snprintf(o, n, "thread %d (warp %d)", c, c >> 5); else if (c < 2 * T) snprintf(o, n, "cp.async of thread %d", c - T); else if (c < 2 * T + 32) snprintf(o, n, "TMA"); else snprintf(o, n, "wgmma of warpgroup %d", c - 2 * T - 32); }
static void race(const char* kind, int c1, const char* f1, uint64_t w1, int c2, const char* f2, uint64_t w2, size_t off) {
  char a[256], b[256], n1[64], n2[64]; where(a, 256, f1, w1); where(b, 256, f2, w2); comp_name(n1, 64, c1); comp_name(n2, 64, c2); B->st.races++;
  report("RACE", "%s on smem+%#zx: %s at %s, unordered with %s at %s", kind, off, n1, a, n2, b); }
void sm_access(const void* p, size_t n, bool write, int comp, uint32_t clk, const uint32_t* V, bool async, bool atom, const char* file, uint64_t w) {
  Block& b = *B; size_t off = (const char*)p - b.smem; bool done = false;
  for (size_t g = off / G; g <= (off + n - 1) / G && g < b.cells.size(); g++) {
    Cell& c = b.cells[g];
    if (!write && !c.init) { if (!done) { char a[256]; where(a, 256, file, w); b.st.races++; report("RACE", "read of uninitialised smem+%#zx by thread %d at %s", g * G, comp, a); } done = true; c.init = true; }
    if (c.wt >= 0 && c.wt != comp && V[c.wt] < c.wc && !(atom && c.watom)) { if (!done) race(write ? "write-write" : "read-after-write", comp, file, w, c.wt, c.wfile, c.wwhere, g * G); done = true; }
    if (async && !write && c.wt >= 0 && c.wt < b.nt && b.fenced[c.wt] < c.wc) { if (!done) race("async-proxy read without fence.proxy.async", comp, file, w, c.wt, c.wfile, c.wwhere, g * G); done = true; }
    if (write) {
      for (auto& [rt, rc, rf, rw] : c.rd) if (rt != comp && V[rt] < rc) { if (!done) race("write-after-read", comp, file, w, rt, rf, rw, g * G); done = true; break; }
      c.rd.clear(); c.wt = (int16_t)comp; c.wc = clk; c.wfile = file; c.wwhere = w; c.init = true; c.watom = atom;
    } else { bool put = false; for (auto& r : c.rd) if (std::get<0>(r) == comp || V[std::get<0>(r)] >= std::get<1>(r)) { r = {(int16_t)comp, clk, file, w}; put = true; break; } if (!put) c.rd.push_back({(int16_t)comp, clk, file, w}); }
  }
}
static inline bool in_smem(const void* p) { return B && (size_t)((const char*)p - B->smem) < SMEM; }
static inline void acc(const void* p, size_t n, bool write, Loc loc, bool atom = false) { if (race_on && in_smem(p)) { int t = (int)cur->lin; uint32_t* V = B->vc(t); sm_access(p, n, write, t, V[t], V, false, atom, loc.file, loc.line); } }
static thread_local std::unordered_map<uint64_t, std::string>* syms;
static std::string sym(uint64_t pc) { // addr2line -i: innermost inlined frame outside emu/
  if (!syms) syms = new std::unordered_map<uint64_t, std::string>; auto& s = (*syms)[pc]; if (!s.empty()) return s;
  Dl_info di{}; dladdr((void*)pc, &di); char cmd[512], line[512]; snprintf(cmd, sizeof cmd, "addr2line -i -e '%s' %#llx 2>/dev/null", di.dli_fname ? di.dli_fname : "", (unsigned long long)(pc - 1 - (uint64_t)di.dli_fbase));
  if (FILE* p = popen(cmd, "r")) { while (fgets(line, sizeof line, p)) { line[strcspn(line, "\n (")] = 0; s = line; if (!strstr(line, "/emu/")) break; } pclose(p); } if (s.empty()) s = "?"; return s; }
void race_hook(const void* p, size_t n, bool write, uint64_t pc) { // from __tsan_* callbacks
  if (!B || !cur || !in_smem(p)) return; int t = (int)cur->lin; uint32_t* V = B->vc(t); sm_access(p, n, write, t, V[t], V, false, false, nullptr, pc); }
static void join(std::vector<uint32_t>& a, const uint32_t* v) { if (a.empty()) a.assign(B->W, 0); for (int i = 0; i < B->W; i++) if (v[i] > a[i]) a[i] = v[i]; }
static void join(uint32_t* a, const std::vector<uint32_t>& v) { for (size_t i = 0; i < v.size(); i++) if (v[i] > a[i]) a[i] = v[i]; }

// ---------------- barriers and warp collectives ----------------
static void check_bar(Bar& b) {
  int need = b.need ? b.need : B->alive;
  if (!b.arrived || b.arrived < need) return;
  B->st.barriers++;
  for (uint16_t t : b.waiters) { if (race_on) join(B->vc(t), b.vc), B->vc(t)[t]++; set_ready(t); }
  b.arrived = 0; b.waiters.clear(); b.vc.clear(); }
void barrier(int id, int count, bool wait, Loc loc) {
  Bar& b = B->bar[id]; int t = (int)cur->lin;
  if (b.arrived && b.need != count) die("barrier used with different counts", loc);
  if (!b.arrived) { b.need = count; b.loc = loc; }
  else if (id == 0 && b.loc.line != loc.line) report("WARNING", "divergent __syncthreads: %s:%d and %s:%d", b.loc.file, b.loc.line, loc.file, loc.line);
  b.arrived++; if (race_on) join(b.vc, B->vc(t));
  if (wait) b.waiters.push_back((uint16_t)t); else if (race_on) B->vc(t)[t]++;
  check_bar(b);
  if (wait) block_me("barrier", loc); }
static void warp_op(uint32_t mask, OpKind op, bool aligned, void* pay, Loc loc, void (*exec)(Pend&)) {
  Fiber* f = self(); Warp& w = B->w[f->warp]; uint32_t bit = 1u << f->lane; B->st.warp_ops++;
  if (!(mask & bit)) die("calling lane is not in the mask", loc);
  if (aligned && (mask & w.alive) != ~0u) die("warp-aligned instruction with exited lanes", loc);
  Pend* p = nullptr; for (auto& q : w.p) if (q.arrived && q.mask == mask) { p = &q; break; } else if (q.arrived && (q.mask & mask)) die("overlapping masks of divergent warp collectives", loc);
  if (!p) { for (auto& q : w.p) if (!q.arrived) { p = &q; break; } p->mask = mask; p->op = op; p->loc = loc; p->exec = exec; }
  else if (p->op != op || (aligned && p->loc.line != loc.line)) die("lanes of a warp reached different collectives", loc);
  p->pay[f->lane] = pay; p->arrived |= bit;
  if (p->arrived == (mask & w.alive)) { p->exec(*p); uint32_t m = p->arrived & ~bit; p->arrived = 0; for (; m; m &= m - 1) set_ready(f->warp * 32 + __builtin_ctz(m)); }
  else block_me("warp collective", loc); }
void syncwarp(uint32_t mask, Loc loc) { warp_op(mask, OpSync, false, nullptr, loc, [](Pend& p) {
  if (!race_on) return; std::vector<uint32_t> v; int base = (int)cur->warp * 32;
  for (uint32_t m = p.arrived; m; m &= m - 1) join(v, B->vc(base + __builtin_ctz(m)));
  for (uint32_t m = p.arrived; m; m &= m - 1) { int t = base + __builtin_ctz(m); join(B->vc(t), v); B->vc(t)[t]++; } }); }
struct ShflPay { uint64_t v, out; Shfl mode; int arg, width; Loc loc; };
uint64_t shfl(uint32_t mask, uint64_t v, Shfl mode, int arg, int width, Loc loc) {
  ShflPay y{v, 0, mode, arg, width, loc};
  warp_op(mask, OpShfl, false, &y, loc, [](Pend& p) { for (uint32_t m = p.arrived; m; m &= m - 1) {
    int l = __builtin_ctz(m); auto& y = *(ShflPay*)p.pay[l]; int seg = l & ~(y.width - 1), s = l;
    switch (y.mode) { case Idx: s = seg | (y.arg & (y.width - 1)); break; case Up: s = l - y.arg < seg ? l : l - y.arg; break; case Down: s = l + y.arg >= seg + y.width ? l : l + y.arg; break; case Xor: s = l ^ y.arg; if (s >= seg + y.width) s = l; break; }
    if (!(p.arrived >> s & 1)) report("ERROR", "shfl reads lane %d which is not participating (%s:%d)", s, y.loc.file, y.loc.line); else y.out = ((ShflPay*)p.pay[s])->v; } });
  return y.out; }
uint32_t ballot(uint32_t mask, bool pr, Loc loc) {
  struct P { bool p; uint32_t out; } y{pr, 0};
  warp_op(mask, OpBallot, false, &y, loc, [](Pend& p) { uint32_t r = 0; for (uint32_t m = p.arrived; m; m &= m - 1) { int l = __builtin_ctz(m); r |= (uint32_t)((P*)p.pay[l])->p << l; } for (uint32_t m = p.arrived; m; m &= m - 1) ((P*)p.pay[__builtin_ctz(m)])->out = r; });
  return y.out; }
struct LdPay { uint32_t* r; int n; bool tr; const void* row; Loc loc; };
void ldmatrix(uint32_t* r, int n, bool tr, const void* row, Loc loc) {
  if ((uintptr_t)row & 15) die("ldmatrix row address not 16-byte aligned", loc);
  if (!in_smem(row)) die("ldmatrix address is not in shared memory", loc);
  LdPay y{r, n, tr, row, loc};
  warp_op(~0u, OpLd, true, &y, loc, [](Pend& p) { int n = ((LdPay*)p.pay[0])->n; bool tr = ((LdPay*)p.pay[0])->tr;
    for (int i = 0; i < n; i++) {
      uint16_t m[8][8]; uint8_t cnt[8] = {}; int wf = 0; B->st.ldsm++;
      for (int k = 0; k < 8; k++) { const void* a = ((LdPay*)p.pay[i * 8 + k])->row; memcpy(m[k], a, 16); int g = (uintptr_t)a >> 4 & 7; if (++cnt[g] > wf) wf = cnt[g]; }
      B->st.ldsm_wavefronts += wf;
      if (race_on) for (int l = 0; l < 32; l++) { // a read is attributed to the lane that receives the element, not to the one that supplied the row address
        int t = (int)cur->warp * 32 + l, a = l / 4, c = l % 4 * 2; uint32_t* V = B->vc(t); Loc lc = ((LdPay*)p.pay[l])->loc; auto R = [&](int r, int col, int n) { sm_access((const char*)((LdPay*)p.pay[i * 8 + r])->row + col * 2, n, false, t, V[t], V, false, false, lc.file, lc.line); };
        if (tr) R(c, a, 2), R(c + 1, a, 2); else R(a, c, 4); }
      for (int l = 0; l < 32; l++) { int a = l / 4, c = l % 4 * 2; ((LdPay*)p.pay[l])->r[i] = tr ? m[c][a] | (uint32_t)m[c + 1][a] << 16 : m[a][c] | (uint32_t)m[a][c + 1] << 16; } } }); }
static inline float cvt(uint16_t u, bool bf) { return bf ? __builtin_bit_cast(float, (uint32_t)u << 16) : (float)__builtin_bit_cast(_Float16, u); }
struct MmaPay { float* d; const uint32_t *a, *b; const float* c; bool bf; };
void mma16816(float* d, const uint32_t* a, const uint32_t* b, const float* c, bool bf, Loc loc) {
  MmaPay y{d, a, b, c, bf};
  warp_op(~0u, OpMma, true, &y, loc, [](Pend& p) { bool bf = ((MmaPay*)p.pay[0])->bf; float A[16][16], Bm[16][8], Cm[16][8]; B->st.mma++;
    for (int l = 0; l < 32; l++) { auto& y = *(MmaPay*)p.pay[l]; int g = l >> 2, t = l & 3 ;
      for (int i = 0; i < 4; i++) for (int h = 0; h < 2; h++) A[g + (i & 1) * 8][t * 2 + h + (i >> 1) * 8] = cvt((uint16_t)(y.a[i] >> 16 * h), bf);
      for (int i = 0; i < 2; i++) for (int h = 0; h < 2; h++) Bm[t * 2 + h + i * 8][g] = cvt((uint16_t)(y.b[i] >> 16 * h), bf);
      for (int i = 0; i < 4; i++) Cm[g + (i >> 1) * 8][t * 2 + (i & 1)] = y.c[i]; }
    for (int i = 0; i < 16; i++) for (int k = 0; k < 16; k++) for (int j = 0; j < 8; j++) Cm[i][j] += A[i][k] * Bm[k][j];
    for (int l = 0; l < 32; l++) { auto& y = *(MmaPay*)p.pay[l]; int g = l >> 2, t = l & 3; for (int i = 0; i < 4; i++) y.d[i] = Cm[g + (i >> 1) * 8][t * 2 + (i & 1)]; } }); }

// ---------------- shared memory ----------------
void* dyn_smem(size_t need, Loc loc) { if (need > B->dyn) die("kernel needs more dynamic shared memory than the launch gave it", loc); return B->smem; }
void* static_smem(const void* key, size_t bytes, size_t align) {
  for (auto& s : B->statics) if (s.key == key) return s.p;
  B->static_top = (B->static_top + align - 1) & ~(align - 1); void* p = B->smem + B->static_top; B->static_top += bytes; if (B->static_top > SMEM_MAX) die("too much shared memory", {"static_smem", 0});
#ifdef ASAN
  __asan_unpoison_memory_region(p, bytes);
#endif
  B->statics.push_back({key, p}); return p; }
uint32_t smem_addr(const void* p, Loc loc) { if (!in_smem(p)) die("not a shared memory address", loc); return (uint32_t)((const char*)p - B->smem); }
uint32_t atomic32(uint32_t* p, uint32_t (*f)(uint32_t, uint32_t), uint32_t v, Loc loc) { acc(p, 4, true, loc, true); uint32_t o = __atomic_load_n(p, __ATOMIC_RELAXED); while (!__atomic_compare_exchange_n(p, &o, f(o, v), true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {} return o; }

// ---------------- cp.async ----------------
void cp_async(void* s, const void* g, int n, int src, Loc loc) {
  Fiber* f = self(); if (((uintptr_t)s | (src ? (uintptr_t)g : 0)) & (n - 1)) die("cp.async address not aligned to its size", loc);
  if (!in_smem(s)) die("cp.async destination is not in shared memory", loc);
#ifdef ASAN
  if (void* bad = __asan_region_is_poisoned((void*)s, n)) { (void)bad; die("cp.async writes outside the shared memory of the launch", loc); }
  if (src && __asan_region_is_poisoned((void*)g, src)) die("cp.async reads outside a global buffer", loc);
#endif
  if (race_on) { int t = (int)cur->lin; sm_access(s, n, true, B->nt + t, f->cp_committed + 1, B->vc(t), false, false, loc.file, loc.line); }
  if (config.async == Early || (config.async == Mixed && (B->rnd() & 1))) { memcpy(s, g, src); memset((char*)s + src, 0, n - src); }
  else f->cps.push_back({s, g, n, src}); }
void cp_async_commit(Loc) { Fiber* f = self(); uint32_t in = 0; for (uint32_t x : f->cp_groups) in += x; f->cp_groups.push_back((uint32_t)f->cps.size() - in); f->cp_committed++; }
void cp_async_wait(int pending, Loc) {
  Fiber* f = self(); size_t k = 0;
  while ((int)f->cp_groups.size() > pending) { for (uint32_t i = 0; i < f->cp_groups[0]; i++) { Cp& c = f->cps[k++]; memcpy(c.s, c.g, c.src); memset((char*)c.s + c.src, 0, c.n - c.src); } f->cp_groups.erase(f->cp_groups.begin()); }
  f->cps.erase(f->cps.begin(), f->cps.begin() + (long)k);
  if (race_on) { uint32_t& v = B->vc(cur->lin)[B->nt + cur->lin]; uint32_t d = f->cp_committed > (uint32_t)pending ? f->cp_committed - pending : 0; if (d > v) v = d; } }

// ---------------- mbarrier / TMA ----------------
// 64-bit state in smem: [0] phase, [1..20] pending arrivals, [21..40] initial count, [41..63] signed pending tx bytes
struct MB { uint32_t phase, pend, init; int32_t tx; };
static MB mb_get(uint64_t* b) { uint64_t u = *b; return {(uint32_t)(u & 1), (uint32_t)(u >> 1 & 0xFFFFF), (uint32_t)(u >> 21 & 0xFFFFF), (int32_t)((int64_t)u >> 41)}; }
static void mb_put(uint64_t* b, MB m) { *b = m.phase | (uint64_t)m.pend << 1 | (uint64_t)m.init << 21 | (uint64_t)(int64_t)m.tx << 41; }
static void mb_check(uint64_t* bar, MB m) {
  if (m.pend == 0 && m.tx == 0) { m.phase ^= 1; m.pend = m.init; auto& i = B->mbars[bar]; if (race_on) { i.snap = i.acc; i.acc.clear(); } for (uint16_t t : i.waiters) set_ready(t); i.waiters.clear(); }
  mb_put(bar, m); }
static MbarInfo& mb_info(uint64_t* b, Loc loc) { if (!in_smem(b) || ((uintptr_t)b & 7)) die("bad mbarrier address", loc); auto it = B->mbars.find(b); if (it == B->mbars.end()) die("mbarrier used before init", loc); return it->second; }
void mbar_init(uint64_t* b, uint32_t count, Loc loc) { if (!in_smem(b) || ((uintptr_t)b & 7)) die("bad mbarrier address", loc); int k = (int)B->mbars.size(); auto& i = B->mbars[b]; i.waiters.clear(); i.acc.clear(); i.snap.clear(); i.comp = 2 * B->nt + k % 32; i.clk = 0; mb_put(b, {0, count, count, 0}); acc(b, 8, true, loc); }
void mbar_arrive(uint64_t* b, uint32_t tx, Loc loc) { auto& i = mb_info(b, loc); MB m = mb_get(b); acc(b, 8, false, loc); if (!m.pend) die("mbarrier arrival count overflow", loc); int t = (int)cur->lin; if (race_on) { join(i.acc, B->vc(t)); B->vc(t)[t]++; } m.pend--; m.tx += (int32_t)tx; mb_check(b, m); }
bool mbar_try_wait(uint64_t* b, uint32_t parity, bool block, Loc loc) {
  for (;;) { auto& i = mb_info(b, loc); acc(b, 8, false, loc); if ((mb_get(b).phase & 1) != (parity & 1)) { if (race_on) join(B->vc(cur->lin), i.snap); return true; } if (!block) return false; i.waiters.push_back((uint16_t)cur->lin); block_me("mbarrier wait", loc); } }
int tensor_map_encode(TensorMap* m, int esize, int rank, void* base, const uint64_t* dim, const uint64_t* stride, const uint32_t* box, int swz) {
  memset(m, 0, sizeof *m); m->base = (uint64_t)base; m->rank = rank; m->esize = esize; m->swizzle = swz; if (m->base & 15) return 1; uint64_t bytes = esize;
  for (int i = 0; i < rank; i++) { m->dim[i] = dim[i]; m->stride[i] = i ? stride[i - 1] : (uint64_t)esize; if (i && (stride[i - 1] & 15)) return 1; m->box[i] = box[i]; if (!box[i] || box[i] > 256) return 1; }
  bytes *= box[0]; if (bytes & 15) return 1; if (swz && bytes > (16u << swz)) return 1; return 0; }
static inline uintptr_t swizzle(uintptr_t a, int s) { return s ? a ^ ((a >> 7 & ((1u << s) - 1)) << 4) : a; }
static void run_tma(size_t idx) {
  Block& b = *B; Tma t = b.tmas[idx]; b.tmas.erase(b.tmas.begin() + (long)idx); const TensorMap& m = t.m; uint32_t row = m.box[0] * m.esize; uint32_t rows = t.bytes / row; b.st.tma++;
  for (uint32_t r = 0; r < rows; r++) {
    uint32_t q = r; const char* g = (const char*)m.base; bool ok = true;
    for (uint32_t d = 1; d < m.rank; d++) { int64_t c = t.c[d] + (int64_t)(q % m.box[d]); q /= m.box[d]; if (c < 0 || c >= (int64_t)m.dim[d]) ok = false; else g += c * (int64_t)m.stride[d]; }
    for (uint32_t o = 0; o < row; o += 16) { char tmp[16] = {}; for (uint32_t e = 0; e < 16; e += m.esize) { int64_t c = t.c[0] + (int64_t)((o + e) / m.esize); if (ok && c >= 0 && c < (int64_t)m.dim[0]) memcpy(tmp + e, g + c * m.esize, m.esize); } memcpy((void*)(b.smem + swizzle((uintptr_t)(t.s - b.smem) + r * row + o, (int)m.swizzle)), tmp, 16); } }
  MB mb = mb_get(t.bar); mb.tx -= (int32_t)t.bytes; auto& i = b.mbars[t.bar]; if (race_on) { if (i.acc.empty()) i.acc.assign(b.W, 0); uint32_t& v = i.acc[i.comp]; if (t.clk > v) v = t.clk; } mb_check(t.bar, mb); }
void tma_load(void* s, const TensorMap* m, uint64_t* bar, const int* c, int rank, Loc loc) {
  if ((int)m->rank != rank) die("TMA rank differs from the tensor map", loc); auto& i = mb_info(bar, loc);
  if (!in_smem(s) || ((uintptr_t)s & 127)) die("TMA destination must be 128-byte aligned shared memory", loc);
  Tma t{(char*)s, *m, bar, {}, m->esize, 0, i.comp, loc}; for (int k = 0; k < rank; k++) { t.c[k] = c[k]; t.bytes *= m->box[k]; }
#ifdef ASAN
  if (__asan_region_is_poisoned(s, t.bytes)) die("TMA writes outside the shared memory of the launch", loc);
#endif
  if (m->swizzle && m->box[0] * m->esize != (16u << m->swizzle)) die("emulator: inner box must span the swizzle", loc);
  if (race_on) { t.clk = ++i.clk; sm_access(s, t.bytes, true, i.comp, t.clk, B->vc(cur->lin), false, false, loc.file, loc.line); }
  B->tmas.push_back(t); if (config.async == Early) run_tma(B->tmas.size() - 1); }

// ---------------- wgmma ----------------
enum { WgFence, WgMmaOp, WgCommit, WgWait };
struct WgPay { float* d; int n; uint64_t da, db; bool scale, bf, tb; int pending; Loc loc; };
static inline const char* desc_row(uint64_t d, uint32_t r, uint32_t k, bool mn) { uint32_t s = (uint32_t)(d & 0x3FFF) << 4, lbo = (uint32_t)(d >> 16 & 0x3FFF) << 4, sbo = (uint32_t)(d >> 32 & 0x3FFF) << 4; uintptr_t a = mn ? s + r / 64 * lbo + k / 8 * sbo + k % 8 * 128 + r % 64 * 2 : s + r / 8 * sbo + r % 8 * 128 + k * 2; return B->smem + (swizzle(a, 3) & 0x3FFFF); }
static void wg_exec(const WgMma& q) {
  static thread_local float A[64][16], Bm[16][256], D[64][256]; B->st.wgmma++;
  for (int r = 0; r < 64; r++) for (int k = 0; k < 16; k++) { uint16_t u; memcpy(&u, desc_row(q.da, r, k, false), 2); A[r][k] = cvt(u, q.bf); }
  for (int c = 0; c < q.n; c++) for (int k = 0; k < 16; k++) { uint16_t u; memcpy(&u, desc_row(q.db, c, k, q.tb), 2); Bm[k][c] = cvt(u, q.bf); }
  for (int t = 0; t < 128; t++) { int r = t / 32 * 16 + t % 32 / 4, c = t % 4 * 2; for (int j = 0; j < q.n / 8; j++) for (int i = 0; i < 4; i++) D[r + (i >> 1) * 8][j * 8 + c + (i & 1)] = q.scale ? q.d[t][j * 4 + i] : 0.f; }
  for (int r = 0; r < 64; r++) for (int k = 0; k < 16; k++) { float a = A[r][k]; for (int c = 0; c < q.n; c++) D[r][c] += a * Bm[k][c]; }
  for (int t = 0; t < 128; t++) { int r = t / 32 * 16 + t % 32 / 4, c = t % 4 * 2; for (int j = 0; j < q.n / 8; j++) for (int i = 0; i < 4; i++) q.d[t][j * 4 + i] = D[r + (i >> 1) * 8][j * 8 + c + (i & 1)]; } }
static void wg_done(Wg& g, int op) {
  WgPay& p0 = *(WgPay*)g.pay[0]; int wgi = (int)(&g - B->wg), comp = 2 * B->nt + 32 + wgi;
  if (op == WgMmaOp) {
    for (int t = 1; t < 128; t++) { auto& p = *(WgPay*)g.pay[t]; if (p.da != p0.da || p.db != p0.db || p.scale != p0.scale) die("wgmma operands differ between the threads of a warpgroup", p.loc); }
    if ((p0.da >> 62) != 1 || (p0.db >> 62) != 1) die("emulator: only 128B-swizzle descriptors", p0.loc);
    WgMma q{{}, p0.n, p0.da, p0.db, p0.scale, p0.bf, p0.tb, p0.loc}; for (int t = 0; t < 128; t++) q.d[t] = ((WgPay*)g.pay[t])->d;
    if (race_on) { uint32_t* V = B->vc(wgi * 128); for (int r = 0; r < 64; r++) for (int k = 0; k < 16; k += 8) sm_access(desc_row(q.da, r, k, false), 16, false, comp, g.committed + 1, V, true, false, p0.loc.file, p0.loc.line);
      if (!q.tb) { for (int r = 0; r < q.n; r++) for (int k = 0; k < 16; k += 8) sm_access(desc_row(q.db, r, k, false), 16, false, comp, g.committed + 1, V, true, false, p0.loc.file, p0.loc.line); }
      else for (int r = 0; r < q.n; r += 8) for (int k = 0; k < 16; k++) sm_access(desc_row(q.db, r, k, true), 16, false, comp, g.committed + 1, V, true, false, p0.loc.file, p0.loc.line); }
    if (config.async == Early) wg_exec(q); else { g.q.push_back(q); g.open++; }
  } else if (op == WgCommit) { g.groups.push_back(g.open); g.open = 0; g.committed++; }
  else if (op == WgWait) { while ((int)g.groups.size() > p0.pending) { for (uint32_t i = 0; i < g.groups[0]; i++) wg_exec(g.q[i]); g.q.erase(g.q.begin(), g.q.begin() + g.groups[0]); g.groups.erase(g.groups.begin()); }
    if (race_on) for (int t = 0; t < 128; t++) { uint32_t& v = B->vc(wgi * 128 + t)[comp]; uint32_t d = g.committed > (uint32_t)p0.pending ? g.committed - p0.pending : 0; if (d > v) v = d; } } }
static void wg_op(int op, WgPay* pay, const char* what, Loc loc) {
  Fiber* f = self(); int i = f->warp / 4; Wg& g = B->wg[i]; if ((i + 1) * 128 > B->nt) die("wgmma in an incomplete warpgroup", loc);
  if (g.arrived && (g.op != op || g.loc.line != loc.line)) die("threads of a warpgroup reached different wgmma instructions", loc);
  g.op = op; g.loc = loc; pay->loc = loc; g.pay[f->lin % 128] = pay;
  if (++g.arrived == 128) { g.arrived = 0; wg_done(g, op); for (int t = i * 128; t < i * 128 + 128; t++) if (t != (int)f->lin) set_ready(t); } else block_me(what, loc); }
void wgmma(float* d, int n, uint64_t da, uint64_t db, bool s, bool bf, bool tb, Loc loc) { WgPay p{d, n, da, db, s, bf, tb, 0, loc}; wg_op(WgMmaOp, &p, "wgmma", loc); }
void wgmma_fence(Loc loc) { WgPay p{}; wg_op(WgFence, &p, "wgmma.fence", loc); }
void wgmma_commit(Loc loc) { WgPay p{}; wg_op(WgCommit, &p, "wgmma.commit", loc); }
void wgmma_wait(int n, Loc loc) { WgPay p{}; p.pending = n; wg_op(WgWait, &p, "wgmma.wait", loc); }
void fence_proxy_async(Loc) { if (race_on) B->fenced[cur->lin] = B->vc(cur->lin)[cur->lin]; }

// ---------------- launch ----------------
static void run_block(Block& b, dim3 grid, dim3 bd, uint3 bid, unsigned smem) {
  int nt = (int)(bd.x * bd.y * bd.z); b.nt = b.alive = nt; b.failed = false; b.dyn = smem; b.static_top = (smem + 127) & ~127u; b.statics.clear(); b.tmas.clear(); b.mbars.clear(); b.ready_warps = 0; b.last_warp = 0;
  b.block_lin = bid.x + grid.x * (bid.y + grid.y * bid.z); b.rng = (config.seed * 0x9E3779B97F4A7C15ull) ^ (b.block_lin * 0xD1B54A32D192ED03ull) ^ 0x1234567ull; if (!b.rng) b.rng = 1; b.rnd(); b.rnd();
#ifdef ASAN
  __asan_unpoison_memory_region(b.smem, SMEM);
#endif
  memset(b.smem, config.fill, smem + (smem ? 0 : 0)); memset(b.smem + smem, config.fill, 48 * 1024 < SMEM - smem ? 48 * 1024 : SMEM - smem);
#ifdef ASAN
  __asan_poison_memory_region(b.smem + smem, SMEM - smem); __asan_unpoison_memory_region(b.stacks, (size_t)nt * EMU_STACK);
#endif
  for (int i = 0; i < 32; i++) b.order[i] = (uint8_t)i; for (int i = 31; i > 0; i--) std::swap(b.order[i], b.order[b.rnd() % (i + 1)]);
  for (auto& x : b.bar) { x.arrived = 0; x.waiters.clear(); x.vc.clear(); } for (auto& x : b.wg) { x.arrived = 0; x.q.clear(); x.groups.clear(); x.open = x.committed = 0; }
  for (int w = 0; w * 32 < nt; w++) { int n = nt - w * 32 < 32 ? nt - w * 32 : 32; b.w[w].ready = b.w[w].alive = n == 32 ? ~0u : (1u << n) - 1; b.ready_warps |= 1u << w; for (auto& p : b.w[w].p) p.arrived = 0; }
  if (race_on) { b.W = 2 * nt + 40; b.C.assign((size_t)nt * b.W, 0); for (int t = 0; t < nt; t++) b.vc(t)[t] = 1; b.fenced.assign(nt, 0); b.cells.clear(); b.cells.resize(SMEM / G > (smem + 49152) / G ? (smem + 49152) / G : SMEM / G, Cell{nullptr, 0, 0, -1, false, false, false, {}}); }
  for (int t = 0; t < nt; t++) { Fiber& f = b.f[t]; f.tid = {t % bd.x, t / bd.x % bd.y, t / (bd.x * bd.y)}; f.bid = bid; f.bdim = bd; f.gdim = grid; f.lin = t; f.lane = t & 31; f.warp = t >> 5; f.done = false; f.cps.clear(); f.cp_groups.clear(); f.cp_committed = 0; f.what = "start"; f.loc = {"", 0};
    f.lo = b.stacks + (size_t)t * EMU_STACK; f.sp = make_stack(f.lo + EMU_STACK - 64 - (t % 61) * 192, fiber_main); } // stagger stack tops: equal offsets would alias in L1
  b.main_sz = 0; Fiber* f = pick(); cur = f;
#ifdef ASAN
  __sanitizer_start_switch_fiber(&b.main_fake, f->lo, EMU_STACK);
#endif
  emu_switch(&b.main_sp, f->sp);
#ifdef ASAN
  __sanitizer_finish_switch_fiber(b.main_fake, nullptr, nullptr); __asan_unpoison_memory_region(b.smem, SMEM);
#endif
  cur = nullptr; }
static std::mutex st_mu;
int launch(Thunk fn, dim3 grid, dim3 block, unsigned smem, void* const* params) {
  if (block.x * block.y * block.z > MAXT || smem > SMEM_MAX || !fn) { fprintf(stderr, "[emu] bad launch\n"); return 1; }
  uint64_t nb = (uint64_t)grid.x * grid.y * grid.z; std::atomic<uint64_t> next{0}; n_errors = 0;
  auto work = [&] {
    if (!tB) { tB = new Block; tB->smem = (char*)mmap(nullptr, SMEM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      size_t page = 4096; tB->stacks = (char*)mmap(nullptr, (size_t)MAXT * EMU_STACK + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0); mprotect(tB->stacks, page, PROT_NONE); tB->stacks += page; }
    B = tB; B->fn = fn; B->params = params; B->st = Stats{};
    for (uint64_t i; (i = next++) < nb && !n_errors;) run_block(*B, grid, block, {(unsigned)(i % grid.x), (unsigned)(i / grid.x % grid.y), (unsigned)(i / ((uint64_t)grid.x * grid.y))}, smem);
    std::lock_guard<std::mutex> g(st_mu); uint64_t* d = (uint64_t*)&stats; uint64_t* s = (uint64_t*)&B->st; for (size_t k = 0; k < sizeof(Stats) / 8; k++) d[k] += s[k]; B = nullptr; };
  int nw = config.threads; if (nw <= 1 || nb == 1) work(); else { std::vector<std::thread> v; for (int i = 0; i < nw && (uint64_t)i < nb; i++) v.emplace_back([&] { work(); Block* b = tB; if (b) { munmap(b->smem, SMEM); munmap(b->stacks - 4096, (size_t)MAXT * EMU_STACK + 4096); delete b; tB = nullptr; } }); for (auto& t : v) t.join(); }
  return n_errors; }
}  // namespace emu
