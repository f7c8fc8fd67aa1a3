//! Named ranges for NVIDIA's profilers (Nsight Systems, Nsight Compute), as NVTX 3 has them, without a library of NVIDIA's.
//!
//! NVTX is headers and a protocol: a profiler names a library of its own in `NVTX_INJECTION64_PATH`; the program loads it and
//! calls its `InitializeInjectionNvtx2` with a function that hands out tables, into which the library writes what is to be
//! called. This is that protocol, of which two calls are used: push and pop of a range of the calling thread. Where no profiler
//! is attached a range costs one load, and its name is not made.

use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::marker::PhantomData;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

/// A range of this thread, from its making until it is dropped. Ranges nest: the last made is the first dropped.
#[must_use = "the range ends where it is dropped"]
pub struct Range {
    tool: Tool,
    /// A thread's own.
    not_send: PhantomData<*const ()>,
}

/// Begins a range, where a profiler is attached; `name` is asked for then alone.
pub fn range(name: impl FnOnce() -> String) -> Option<Range> {
    let tool = tool()?;
    // A name with a zero in it ends there.
    let name = name().split('\0').next().map(CString::new)?.ok()?;
    // SAFETY: the profiler's function with NVTX's signature; the text lives for the call.
    unsafe { (tool.push)(name.as_ptr()) };
    Some(Range { tool, not_send: PhantomData })
}

/// Whether a profiler that takes ranges is attached to this process.
pub fn attached() -> bool {
    tool().is_some()
}

impl Drop for Range {
    fn drop(&mut self) {
        // SAFETY: as for push; the range was pushed by this thread, as it is not Send.
        unsafe { (self.tool.pop)() };
    }
}

/// `nvtxRangePushA` and `nvtxRangePop` of the profiler.
#[derive(Clone, Copy)]
struct Tool {
    push: RangePushA,
    pop: RangePop,
}

type RangePushA = unsafe extern "C" fn(*const c_char) -> c_int;
type RangePop = unsafe extern "C" fn() -> c_int;

fn tool() -> Option<Tool> {
    static TOOL: OnceLock<Option<Tool>> = OnceLock::new();
    *TOOL.get_or_init(attach)
}

/// What nvtxDetail/nvtxInit.h does. Any failure means that nobody listens, as there.
fn attach() -> Option<Tool> {
    type Initialize = unsafe extern "C" fn(unsafe extern "C" fn(u32) -> *const c_void) -> c_int;
    let path = std::env::var_os("NVTX_INJECTION64_PATH").filter(|path| !path.is_empty())?;
    // SAFETY: a library that the user's environment names for this purpose.
    let library = unsafe { libloading::Library::new(path) }.ok()?;
    // SAFETY: the symbol has this type by the protocol.
    let initialized = unsafe {
        let initialize = library.get::<Initialize>(b"InitializeInjectionNvtx2\0").ok()?;
        initialize(export_table)
    };
    // Stays for the life of the process: its functions are called until the end.
    std::mem::forget(library);
    if initialized == 0 {
        return None;
    }
    let [push, pop] = [RANGE_PUSH_A, RANGE_POP].map(|index| SLOTS[CORE][index].load(Ordering::Acquire));
    if push.is_null() || pop.is_null() {
        return None;
    }
    // SAFETY: what the profiler left in these places has these types by the protocol.
    Some(unsafe {
        Tool {
            push: std::mem::transmute::<*mut c_void, RangePushA>(push),
            pop: std::mem::transmute::<*mut c_void, RangePop>(pop),
        }
    })
}

// Numbers and types of nvtxDetail/nvtxTypes.h.

const ETID_CALLBACKS: u32 = 1;
const ETID_VERSION_INFO: u32 = 3;
const NVTX_VERSION: u32 = 3;
const RANGE_PUSH_A: usize = 9;
const RANGE_POP: usize = 11;

/// Places for functions per module: invalid, core, CUDA, OpenCL, CUDA runtime, core of version 2, sync.
const MODULES: [usize; 7] = [0, 16, 9, 15, 7, 16, 7];
const CORE: usize = 1;
const MOST: usize = 16;

/// What the profiler writes to. Only two of them are ever called, but it may refuse a program that lacks any.
static SLOTS: [[AtomicPtr<c_void>; MOST]; MODULES.len()] =
    [const { [const { AtomicPtr::new(ptr::null_mut()) }; MOST] }; MODULES.len()];

/// Of each module the addresses of its places; the first is none, as no function has the number 0.
struct Tables([[*const AtomicPtr<c_void>; MOST]; MODULES.len()]);
// SAFETY: addresses of a static, written once.
unsafe impl Send for Tables {}
unsafe impl Sync for Tables {}

static TABLES: OnceLock<Tables> = OnceLock::new();

#[repr(C)]
struct Callbacks {
    struct_size: usize,
    get_module_function_table: unsafe extern "C" fn(c_uint, *mut *const *const AtomicPtr<c_void>, *mut c_uint) -> c_int,
}

#[repr(C)]
struct VersionInfo {
    struct_size: usize,
    version: u32,
    reserved: u32,
    set_injection_version: unsafe extern "C" fn(u32),
}

static CALLBACKS: Callbacks =
    Callbacks { struct_size: size_of::<Callbacks>(), get_module_function_table: module_function_table };
static VERSION_INFO: VersionInfo = VersionInfo {
    struct_size: size_of::<VersionInfo>(),
    version: NVTX_VERSION,
    reserved: 0,
    set_injection_version: ignore_version,
};

unsafe extern "C" fn export_table(id: u32) -> *const c_void {
    match id {
        ETID_CALLBACKS => ptr::from_ref(&CALLBACKS).cast(),
        ETID_VERSION_INFO => ptr::from_ref(&VERSION_INFO).cast(),
        _ => ptr::null(),
    }
}

/// The table of a module and how many places it has; 0: there is no such module.
///
/// # Safety
/// The pointers are null or valid for a write.
unsafe extern "C" fn module_function_table(
    module: c_uint,
    table: *mut *const *const AtomicPtr<c_void>,
    size: *mut c_uint,
) -> c_int {
    let module = module as usize;
    let Some(&places) = MODULES.get(module).filter(|&&places| places > 0) else { return 0 };
    let tables = TABLES.get_or_init(|| {
        let mut tables = [[ptr::null(); MOST]; MODULES.len()];
        for (table, slots) in tables.iter_mut().zip(&SLOTS) {
            for (place, slot) in table.iter_mut().zip(slots).skip(1) {
                *place = ptr::from_ref(slot);
            }
        }
        Tables(tables)
    });
    // SAFETY: the caller's.
    unsafe {
        if !table.is_null() {
            *table = tables.0[module].as_ptr();
        }
        if !size.is_null() {
            *size = places as c_uint;
        }
    }
    1
}

unsafe extern "C" fn ignore_version(_version: u32) {}
