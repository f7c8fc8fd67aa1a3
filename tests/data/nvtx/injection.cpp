// A profiler, as far as tests/nvtx.rs needs one: writes every range's push and pop to the file that NVTX_TEST_LOG names. The
// types are those of NVTX 3's nvtxDetail/nvtxTypes.h. NVTX_TEST_REFUSE: it does not want to be attached.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

typedef void (*Function)();
struct Callbacks {
    size_t struct_size;
    int (*module_function_table)(unsigned module, Function*** table, unsigned* size);
};
struct VersionInfo {
    size_t struct_size;
    uint32_t version;
    uint32_t reserved;
    void (*set_injection_version)(uint32_t);
};

static FILE* file;

static int push(const char* name) {
    fprintf(file, "push %s\n", name);
    return 0;
}
static int pop() {
    fprintf(file, "pop\n");
    return 0;
}

extern "C" int InitializeInjectionNvtx2(const void* (*export_table)(uint32_t)) {
    file = fopen(getenv("NVTX_TEST_LOG"), "w");
    if (!file) return 0;
    setvbuf(file, nullptr, _IOLBF, 0);
    auto* version = static_cast<const VersionInfo*>(export_table(3));
    auto* callbacks = static_cast<const Callbacks*>(export_table(1));
    if (export_table(2) || !version || !callbacks) return fprintf(file, "no tables\n"), 0;
    if (version->struct_size != sizeof(VersionInfo) || version->version != 3) return fprintf(file, "no version 3\n"), 0;
    if (callbacks->struct_size != sizeof(Callbacks)) return fprintf(file, "another table of callbacks\n"), 0;
    version->set_injection_version(3);
    const unsigned sizes[7] = {0, 16, 9, 15, 7, 16, 7};
    for (unsigned module = 0; module < 9; module++) {
        Function** table = nullptr;
        unsigned size = 0;
        const bool known = module > 0 && module < 7;
        if (callbacks->module_function_table(module, &table, &size) != int(known)) return fprintf(file, "module %u\n", module), 0;
        if (!known) continue;
        if (size != sizes[module] || table[0]) return fprintf(file, "module %u has %u places\n", module, size), 0;
        for (unsigned i = 1; i < size; i++) {
            if (!table[i]) return fprintf(file, "module %u has no place %u\n", module, i), 0;
        }
        if (module == 1) {
            *table[9] = reinterpret_cast<Function>(push);
            *table[11] = reinterpret_cast<Function>(pop);
        }
    }
    fprintf(file, "attached\n");
    return getenv("NVTX_TEST_REFUSE") ? 0 : 1;
}
