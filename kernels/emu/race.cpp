// Link this into the race build: kernels compiled with -fsanitize=thread (instrumentation only), NOT linked against libtsan.
#ifdef EMU_RACE
#include <cstddef>
#include <cstdint>
#include <cstring>
namespace emu { extern bool race_on; void race_hook(const void*, size_t, bool, uint64_t); }
static struct On { On() { emu::race_on = true; } } on;
#define PC ((uint64_t)__builtin_return_address(0))
#define RW(n) extern "C" void __tsan_read##n(void* p) { emu::race_hook(p, n, false, PC); } extern "C" void __tsan_write##n(void* p) { emu::race_hook(p, n, true, PC); } \
  extern "C" void __tsan_unaligned_read##n(void* p) { emu::race_hook(p, n, false, PC); } extern "C" void __tsan_unaligned_write##n(void* p) { emu::race_hook(p, n, true, PC); } \
  extern "C" void __tsan_volatile_read##n(void* p) { emu::race_hook(p, n, false, PC); } extern "C" void __tsan_volatile_write##n(void* p) { emu::race_hook(p, n, true, PC); }
RW(1) RW(2) RW(4) RW(8) RW(16)
extern "C" {
void __tsan_read_range(void* p, size_t n) { emu::race_hook(p, n, false, PC); }
void __tsan_write_range(void* p, size_t n) { emu::race_hook(p, n, true, PC); }
void __tsan_init() {} void __tsan_func_entry(void*) {} void __tsan_func_exit(void*) {}
void __tsan_vptr_update(void**, void*) {} void __tsan_vptr_read(void**) {}
}
#endif
