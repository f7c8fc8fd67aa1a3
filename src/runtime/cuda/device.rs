use std::collections::HashMap;
use std::ffi::{CStr, CString, c_void};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use cudarc::driver::sys::{
    self, CUdevice_attribute, CUfunction, CUfunction_attribute, CUlaunchAttribute, CUlaunchAttributeID,
    CUlaunchAttributeValue, CUlaunchAttributeValue_union__bindgen_ty_1 as ClusterDim, CUmodule, CUresult,
};

use super::driver::{self, check};
use super::isa::Isa;
use super::kernels::{BUILT, KERNELS, KernelFile};
use super::launch::{Arg, Launch};
use super::memory::{Buffer, Counters, Layout, Pool};
use super::staging::Staging;
use crate::error::{Error, Result};

/// A card, one stream of work on it, and the kernels loaded there. Cheap to clone; clones are the same device.
///
/// Everything is launched on the one stream, so ops run in the order they are called and wait for nothing.
#[derive(Clone)]
pub struct CudaDevice(Arc<Inner>);

/// How to open a card.
#[derive(Clone, Copy, Debug, Default)]
pub struct CudaOptions {
    /// Which card, as the driver counts them.
    pub ordinal: usize,
    /// Every tensor is an allocation of its own, of exactly its size. For tests that look for accesses beyond it.
    pub separate_allocations: bool,
    /// Every launch by itself, also where work repeats: no graphs.
    pub eager: bool,
}

/// Bytes on the card.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryReport {
    /// Of live tensors.
    pub in_use_bytes: u64,
    /// Largest `in_use_bytes` so far.
    pub peak_bytes: u64,
    /// Taken from the driver, for these and the next tensors.
    pub reserved_bytes: u64,
    /// What the driver could still give, and what the card has.
    pub free_bytes: u64,
    pub total_bytes: u64,
}

struct Inner {
    // Dropped in this order: what needs the context before the context.
    staging: Mutex<Staging>,
    state: Mutex<State>,
    functions: Mutex<HashMap<String, Function>>,
    /// By the file's name, each since a kernel of it was first launched.
    modules: Mutex<HashMap<&'static str, CUmodule>>,
    counters: Arc<Counters>,
    eager: bool,
    card: Card,
    context: Arc<Context>,
}

// SAFETY: the handles are the driver's, which any thread may use; what changes is behind mutexes.
unsafe impl Send for Inner {}
unsafe impl Sync for Inner {}

struct State {
    /// Where new tensors go.
    pool: Arc<Pool>,
    /// Where graphs have their intermediate tensors, as long as there is a graph. All share it: they run one after the
    /// other, and none reads what another has left.
    graph_pool: Weak<Pool>,
    /// While a graph is recorded: its kernels so far.
    recorded: Option<Vec<String>>,
}

#[derive(Clone, Debug)]
struct Card {
    name: String,
    capability: (i32, i32),
    multiprocessors: usize,
    /// Shared memory a block can ask for.
    shared_bytes: usize,
}

#[derive(Clone)]
struct Function {
    handle: CUfunction,
    /// Where the parameters lie and their sizes, in bytes.
    parameters: Arc<[Parameter]>,
    /// Compiled for an architecture that has `wait_for_previous()`.
    can_depend: bool,
    /// Dynamic shared memory it may be launched with.
    shared_bytes: usize,
}

#[derive(Clone, Copy)]
struct Parameter {
    offset: usize,
    bytes: usize,
}

/// The primary context of a card and our stream.
#[derive(Debug)]
pub struct Context {
    /// `cuda:0`
    pub name: String,
    device: sys::CUdevice,
    handle: sys::CUcontext,
    pub stream: sys::CUstream,
}

// SAFETY: as Inner.
unsafe impl Send for Context {}
unsafe impl Sync for Context {}

impl Context {
    fn open(name: &str, ordinal: usize) -> Result<Context> {
        let (mut device, mut handle, mut stream) = (0, std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: the driver is initialised and has that card; the pointers are valid for the calls.
        unsafe {
            check(name, "cuDeviceGet", sys::cuDeviceGet(&mut device, ordinal as i32))?;
            check(name, "cuDevicePrimaryCtxRetain", sys::cuDevicePrimaryCtxRetain(&mut handle, device))?;
            let made = check(name, "cuCtxSetCurrent", sys::cuCtxSetCurrent(handle)).and_then(|()| {
                let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
                check(name, "cuStreamCreate", sys::cuStreamCreate(&mut stream, flags))
            });
            if let Err(error) = made {
                sys::cuDevicePrimaryCtxRelease_v2(device);
                return Err(error);
            }
        }
        Ok(Context { name: name.into(), device, handle, stream })
    }

    /// Makes the context that of this thread, as every call of the driver wants it.
    pub fn bind(&self) -> Result<()> {
        // SAFETY: the context is retained.
        check(&self.name, "cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.handle) })
    }

    /// Free and total bytes.
    pub fn memory(&self) -> Result<(u64, u64)> {
        self.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: the pointers are valid for the call.
        check(&self.name, "cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) })?;
        Ok((free as u64, total as u64))
    }

    fn attribute(&self, attribute: CUdevice_attribute) -> Result<i32> {
        let mut value = 0;
        // SAFETY: the pointer is valid for the call.
        let result = unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, self.device) };
        check(&self.name, "cuDeviceGetAttribute", result)?;
        Ok(value)
    }

    fn card(&self) -> Result<Card> {
        use CUdevice_attribute as A;
        let mut text = [0; 256];
        // SAFETY: the driver writes at most the length, with a terminating 0.
        let name = unsafe {
            let result = sys::cuDeviceGetName(text.as_mut_ptr(), text.len() as i32, self.device);
            check(&self.name, "cuDeviceGetName", result)?;
            CStr::from_ptr(text.as_ptr()).to_string_lossy().into_owned()
        };
        Ok(Card {
            name,
            capability: (
                self.attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                self.attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            multiprocessors: self.attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?.max(1) as usize,
            shared_bytes: self.attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?.max(0) as usize,
        })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: nothing of ours is left in the context; both are given back once.
        unsafe {
            if self.bind().is_ok() {
                sys::cuStreamDestroy_v2(self.stream);
            }
            sys::cuDevicePrimaryCtxRelease_v2(self.device);
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: the stream is waited for, so no kernel of the modules runs.
            unsafe {
                sys::cuStreamSynchronize(self.context.stream);
                let modules = self.modules.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner());
                modules.values().for_each(|&module| {
                    sys::cuModuleUnload(module);
                });
            }
        }
    }
}

/// The kernels use instructions that older cards lack.
const OLDEST_CAPABILITY: (i32, i32) = (8, 0);

const FIRST_WITH_CLUSTERS: (i32, i32) = (9, 0);

/// Dynamic shared memory that every kernel may have unasked.
const DEFAULT_SHARED_BYTES: usize = 48 << 10;

impl CudaDevice {
    /// Opens a card. Of the kernels one file is loaded, to see that this card takes what this program has, rather than
    /// when a model is in its memory; the others when they are first used.
    ///
    /// # Errors
    /// [`Error::DeviceUnavailable`], each with what to do: no driver, too old a driver, no (such) card, too old a card, no
    /// kernels in this program. [`Error::Kernel`]: kernels that the driver does not load. [`Error::Driver`]: what the
    /// driver said.
    pub fn open(options: CudaOptions) -> Result<CudaDevice> {
        let name = format!("cuda:{}", options.ordinal);
        let refuse = |reason: String| Err(Error::DeviceUnavailable { device: name.clone(), reason });
        let cards = driver::start(&name)?;
        if options.ordinal >= cards {
            return refuse(format!(
                "the driver finds {cards} card{}, counted from 0",
                if cards == 1 { "" } else { "s" }
            ));
        }
        let context = Arc::new(Context::open(&name, options.ordinal)?);
        let card = context.card()?;
        if card.capability < OLDEST_CAPABILITY {
            let (major, minor) = card.capability;
            return refuse(format!(
                "{} has compute capability {major}.{minor}; 8.0 or newer is needed (Ampere); use the cpu",
                card.name
            ));
        }
        let counters = Arc::new(Counters::default());
        let layout = if options.separate_allocations { Layout::Separate } else { Layout::Shared };
        let pool = Pool::new(context.clone(), counters.clone(), layout);
        if !BUILT && !driver::is_emulated() {
            return refuse(
                "this program holds no kernels: it was built without nvcc; run tools/nvcc (or install CUDA 12.8 or newer \
                 and set CUDA_HOME), build again, or use the cpu"
                    .into(),
            );
        }
        let device = CudaDevice(Arc::new(Inner {
            staging: Mutex::new(Staging::new(context.clone())),
            state: Mutex::new(State { pool, graph_pool: Weak::new(), recorded: None }),
            functions: Mutex::new(HashMap::new()),
            modules: Mutex::new(HashMap::new()),
            counters,
            eager: options.eager,
            card,
            context,
        }));
        let portable = KERNELS.iter().filter(|file| file.isa == Isa::Sm80);
        if let Some(smallest) = portable.min_by_key(|file| file.image.map_or(0, <[u8]>::len)) {
            device.module(smallest)?;
        }
        Ok(device)
    }

    /// How many cards the driver finds.
    ///
    /// # Errors
    /// As [`open`](CudaDevice::open).
    pub fn count() -> Result<usize> {
        driver::start("cuda")
    }

    pub fn same(&self, other: &CudaDevice) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// The card's name, as the driver has it.
    pub fn card(&self) -> &str {
        &self.0.card.name
    }

    /// Major and minor version of the instruction set.
    pub fn compute_capability(&self) -> (i32, i32) {
        self.0.card.capability
    }

    /// Whether kernels of this instruction set can be launched: the card has the instructions, and this program was built
    /// with kernels for them (`MEGAFUSE_CUDA_ARCHS`).
    pub fn has(&self, isa: Isa) -> bool {
        isa.runs_on(self.0.card.capability) && KERNELS.iter().any(|file| file.isa == isa && file.image.is_some())
    }

    /// The newest instruction set of which kernels can be launched.
    pub fn isa(&self) -> Isa {
        Isa::ALL.into_iter().rev().find(|&isa| self.has(isa)).unwrap_or(Isa::Sm80)
    }

    pub fn multiprocessors(&self) -> usize {
        self.0.card.multiprocessors
    }

    /// Shared memory that a block may have, static and dynamic together.
    pub fn shared_bytes(&self) -> usize {
        self.0.card.shared_bytes
    }

    /// Of the second-level cache.
    ///
    /// # Errors
    /// [`Error::Driver`]
    pub fn l2_bytes(&self) -> Result<u64> {
        self.0.context.bind()?;
        Ok(self.0.context.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?.max(0) as u64)
    }

    /// Where the card is on the bus, `0000:17:00.0`: the name by which other libraries find the same card.
    ///
    /// # Errors
    /// [`Error::Driver`]
    pub fn pci_bus_id(&self) -> Result<String> {
        let context = &self.0.context;
        context.bind()?;
        let mut text = [0; 32];
        // SAFETY: the driver writes at most the length, with a terminating 0.
        unsafe {
            let result = sys::cuDeviceGetPCIBusId(text.as_mut_ptr(), text.len() as i32, context.device);
            check(&context.name, "cuDeviceGetPCIBusId", result)?;
            Ok(CStr::from_ptr(text.as_ptr()).to_string_lossy().into_owned())
        }
    }

    /// The driver's handle of the stream that all work goes through, for a library that launches on this card; the card's
    /// context becomes the calling thread's current one.
    ///
    /// # Errors
    /// [`Error::Driver`]
    pub fn raw_stream(&self) -> Result<*mut c_void> {
        let context = &self.0.context;
        context.bind()?;
        Ok(context.stream.cast())
    }

    pub(super) fn context(&self) -> &Arc<Context> {
        &self.0.context
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// # Errors
    /// [`Error::Driver`]
    pub fn memory(&self) -> Result<MemoryReport> {
        let (free_bytes, total_bytes) = self.0.context.memory()?;
        let counters = &self.0.counters;
        Ok(MemoryReport {
            in_use_bytes: counters.in_use(),
            peak_bytes: counters.peak(),
            reserved_bytes: counters.reserved(),
            free_bytes,
            total_bytes,
        })
    }

    /// Is repeated work recorded?
    pub fn graphs(&self) -> bool {
        !self.0.eager
    }

    /// Does `work`; the largest number of bytes that its tensors had at once.
    pub(in crate::runtime) fn high_water(&self, work: impl FnOnce() -> Result<()>) -> Result<u64> {
        let before = self.0.counters.begin_high_water();
        work()?;
        Ok(self.0.counters.high_water().saturating_sub(before))
    }

    /// Takes `bytes` from the driver at once, for the tensors of the run to come.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]
    pub fn reserve(&self, bytes: u64) -> Result<()> {
        let pool = self.state().pool.clone();
        pool.reserve(bytes, &|| "the run's tensors, as planned".into())
    }

    pub(in crate::runtime) fn allocate(&self, bytes: u64, what: &dyn Fn() -> String) -> Result<Buffer> {
        let pool = self.state().pool.clone();
        pool.allocate(bytes, what)
    }

    /// Waits until all work is done.
    ///
    /// # Errors
    /// [`Error::Driver`]: also those of the work.
    pub fn synchronize(&self) -> Result<()> {
        let context = &self.0.context;
        context.bind()?;
        // SAFETY: the stream lives as long as the context.
        check(&context.name, "cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(context.stream) })
    }

    /// Sets `bytes` bytes at `to`.
    pub(in crate::runtime) fn fill(&self, to: u64, value: u8, bytes: u64) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.record("memset");
        let context = &self.0.context;
        context.bind()?;
        // SAFETY: the range is a buffer's.
        let result = unsafe { sys::cuMemsetD8Async(to, value, bytes as usize, context.stream) };
        check(&context.name, "cuMemsetD8Async", result)
    }

    pub(in crate::runtime) fn upload(&self, to: u64, bytes: &[u8]) -> Result<()> {
        self.not_recording("a copy from the host")?;
        self.0.staging.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).upload(to, bytes)
    }

    pub(in crate::runtime) fn download(&self, from: u64, bytes: &mut [u8]) -> Result<()> {
        self.not_recording("a copy to the host")?;
        self.0.staging.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).download(from, bytes)
    }

    /// Copies `bytes` bytes within the card's memory.
    pub(in crate::runtime) fn copy(&self, to: u64, from: u64, bytes: u64) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.record("memcpy");
        let context = &self.0.context;
        context.bind()?;
        // SAFETY: both ranges are buffers', which do not overlap.
        let result = unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes as usize, context.stream) };
        check(&context.name, "cuMemcpyDtoDAsync", result)
    }

    fn not_recording(&self, what: &str) -> Result<()> {
        match self.is_recording() {
            true => Err(Error::config("graph", format!("{what} cannot be recorded: do it before or after"))),
            false => Ok(()),
        }
    }

    pub(in crate::runtime) fn is_recording(&self) -> bool {
        self.state().recorded.is_some()
    }

    fn record(&self, what: &str) {
        if let Some(recorded) = &mut self.state().recorded {
            recorded.push(what.into());
        }
    }

    pub(super) fn graph_pool(&self) -> Arc<Pool> {
        let mut state = self.state();
        if let Some(pool) = state.graph_pool.upgrade() {
            return pool;
        }
        let pool = state.pool.for_graph();
        state.graph_pool = Arc::downgrade(&pool);
        pool
    }

    /// New tensors go to `pool` and launches are listed, until the recording ends.
    pub(super) fn begin_capture(&self, pool: Arc<Pool>) -> Result<Recording<'_>> {
        self.not_recording("another graph")?;
        let mut state = self.state();
        state.recorded = Some(Vec::new());
        let before = std::mem::replace(&mut state.pool, pool);
        Ok(Recording { device: self, before: Some(before) })
    }

    /// Launches a kernel of kernels/`file`.cu: `linear`, `sm90/linear`.
    ///
    /// # Safety
    /// The arguments are those of the kernel's declaration, in order and type (count and sizes are checked), and what the
    /// kernel reads and writes through them lies within live tensors of this device.
    ///
    /// # Errors
    /// [`Error::Kernel`]: no such kernel, one of an instruction set that the card or this program lacks
    /// ([`has`](CudaDevice::has)), other parameters, a launch beyond the card's limits; [`Error::Driver`].
    pub unsafe fn launch(&self, file: &'static str, entry: &str, launch: Launch, args: &[Arg]) -> Result<()> {
        if launch.grid.contains(&0) {
            return Ok(());
        }
        let refuse = |reason: String| Err(Error::Kernel { kernel: entry.into(), reason });
        if let Some(refusal) = launch.refusal() {
            return refuse(refusal);
        }
        let Card { name: card, capability: (major, minor), .. } = &self.0.card;
        let clusters = launch.cluster != [1; 3];
        if clusters && (*major, *minor) < FIRST_WITH_CLUSTERS {
            let [a, b, c] = launch.cluster;
            return refuse(format!(
                "a launch in clusters of {a} x {b} x {c} blocks; {card} (compute capability {major}.{minor}) has none, 9.0 \
                 and later have"
            ));
        }
        let context = &self.0.context;
        context.bind()?;
        let function = self.function(file, entry, launch.shared_bytes)?;
        let parameters = &function.parameters;
        if !parameters.iter().map(|parameter| parameter.bytes).eq(args.iter().map(|arg| arg.bytes)) {
            let got: Vec<usize> = args.iter().map(|arg| arg.bytes).collect();
            let want: Vec<usize> = parameters.iter().map(|parameter| parameter.bytes).collect();
            return refuse(format!("called with arguments of {got:?} bytes, it has parameters of {want:?}"));
        }
        for (index, (parameter, arg)) in parameters.iter().zip(args).enumerate() {
            if !parameter.offset.is_multiple_of(arg.align) {
                return refuse(format!(
                    "parameter {index} lies at byte {}, where its argument's type wants a multiple of {}: the kernel \
                     declares another type",
                    parameter.offset, arg.align
                ));
            }
        }
        let mut attributes = Vec::new();
        if clusters {
            let [x, y, z] = launch.cluster.map(|blocks| blocks as u32);
            let value = CUlaunchAttributeValue { clusterDim: ClusterDim { x, y, z } };
            attributes.push(attribute(CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, value));
        }
        if function.can_depend {
            let value = CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 };
            attributes
                .push(attribute(CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, value));
        }
        if let Some(percent) = launch.carveout {
            let value = CUlaunchAttributeValue { sharedMemCarveout: percent as u32 };
            attributes
                .push(attribute(CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, value));
        }
        let [x, y, z] = launch.grid.map(|blocks| blocks as u32);
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: launch.block as u32,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared_bytes as u32,
            hStream: context.stream,
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
        };
        let mut values: Vec<*mut c_void> = args.iter().map(|arg| arg.value.cast_mut()).collect();
        // SAFETY: the caller's promise; the driver copies arguments and attributes before it returns.
        let result =
            unsafe { sys::cuLaunchKernelEx(&config, function.handle, values.as_mut_ptr(), std::ptr::null_mut()) };
        match result {
            CUresult::CUDA_ERROR_INVALID_VALUE
            | CUresult::CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES
            | CUresult::CUDA_ERROR_INVALID_CLUSTER_SIZE => {
                let in_clusters = if clusters { format!(", in clusters of {:?},", launch.cluster) } else { "".into() };
                refuse(format!(
                    "the card refuses a launch of {:?} blocks{in_clusters} of {} threads with {} bytes of shared memory: \
                     {result:?}",
                    launch.grid, launch.block, launch.shared_bytes
                ))
            }
            result => {
                check(&context.name, "cuLaunchKernelEx", result)?;
                self.record(entry);
                Ok(())
            }
        }
    }

    /// The kernel, allowed to use that much dynamic shared memory.
    fn function(&self, file: &'static str, entry: &str, shared_bytes: usize) -> Result<Function> {
        let mut functions = self.0.functions.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut function = match functions.get(entry) {
            Some(function) if shared_bytes <= function.shared_bytes => return Ok(function.clone()),
            Some(function) => function.clone(),
            None => self.find(file, entry)?,
        };
        if shared_bytes > function.shared_bytes {
            let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is loaded.
            let result = unsafe { sys::cuFuncSetAttribute(function.handle, attribute, shared_bytes as i32) };
            if result == CUresult::CUDA_ERROR_INVALID_VALUE {
                let limit = self.0.card.shared_bytes;
                let reason = format!("needs {shared_bytes} bytes of shared memory, a block of this card has {limit}");
                return Err(Error::Kernel { kernel: entry.into(), reason });
            }
            check(&self.0.context.name, "cuFuncSetAttribute", result)?;
            function.shared_bytes = shared_bytes;
        }
        functions.insert(entry.into(), function.clone());
        Ok(function)
    }

    /// What kernels/`file`.cu was compiled to, loaded now if it was not yet.
    fn module(&self, file: &KernelFile) -> Result<CUmodule> {
        let refuse = |reason: String| Err(Error::Kernel { kernel: format!("kernels/{}.cu", file.name), reason });
        let Card { name, capability: (major, minor), .. } = &self.0.card;
        if !file.isa.runs_on((*major, *minor)) {
            let isa = file.isa;
            return refuse(format!("is for {isa}, which {name} (compute capability {major}.{minor}) does not have"));
        }
        let archs = env!("MEGAFUSE_CUDA_ARCHS");
        let Some(image) = file.image else {
            let arch = file.isa.arch();
            return refuse(format!(
                "was left out when this program was built: MEGAFUSE_CUDA_ARCHS={archs} does not name {arch}"
            ));
        };
        let mut modules = self.0.modules.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(&module) = modules.get(file.name) {
            return Ok(module);
        }
        self.0.context.bind()?;
        let mut module = std::ptr::null_mut();
        // SAFETY: the image is a whole fatbin; or a text, and the driver is the emulated card's, which does not look at it.
        match unsafe { sys::cuModuleLoadData(&mut module, image.as_ptr().cast()) } {
            result @ (CUresult::CUDA_ERROR_INVALID_IMAGE
            | CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU
            | CUresult::CUDA_ERROR_INVALID_PTX
            | CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION) => {
                return refuse(format!(
                    "cuModuleLoadData: {result:?}: compiled for {archs}, it does not load on {name} (compute capability \
                     {major}.{minor}); set MEGAFUSE_CUDA_ARCHS and build again"
                ));
            }
            result => check(&self.0.context.name, "cuModuleLoadData", result)?,
        }
        modules.insert(file.name, module);
        Ok(module)
    }

    /// Loads kernels that are not this program's own: a cubin or fat binary, or on the emulated card, where they register
    /// themselves, a text that ends in 0. [`launch`](CudaDevice::launch) finds them as those of a file `name`.
    ///
    /// # Errors
    /// [`Error::Kernel`]: the name is taken, by one of this program's files or an earlier call; [`Error::Driver`].
    pub fn load(&self, name: &'static str, image: &[u8]) -> Result<()> {
        let mut modules = self.0.modules.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if modules.contains_key(name) || KERNELS.iter().any(|file| file.name == name) {
            return Err(Error::Kernel { kernel: name.into(), reason: "there are kernels of that name already".into() });
        }
        self.0.context.bind()?;
        let mut module = std::ptr::null_mut();
        // SAFETY: the image is whole; the driver says what it does not take.
        let result = unsafe { sys::cuModuleLoadData(&mut module, image.as_ptr().cast()) };
        check(&self.0.context.name, "cuModuleLoadData", result)?;
        modules.insert(name, module);
        Ok(())
    }

    fn find(&self, file: &'static str, entry: &str) -> Result<Function> {
        let refuse = |reason: String| Err(Error::Kernel { kernel: entry.into(), reason });
        let kernels = KERNELS.iter().find(|kernels| kernels.name == file);
        let loaded = self.0.modules.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).get(file).copied();
        let module = match (kernels, loaded) {
            (None, None) => return refuse(format!("there is no kernels/{file}.cu in this program")),
            (None, Some(module)) => module,
            (Some(kernels), _) => match self.module(kernels) {
                Err(Error::Kernel { kernel, reason }) => return refuse(format!("{kernel} {reason}")),
                module => module?,
            },
        };
        let name = CString::new(entry).map_err(|_| Error::argument("launch", "entry", entry, "a kernel's name"))?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: the module is loaded; the pointers are valid for the call.
        match unsafe { sys::cuModuleGetFunction(&mut handle, module, name.as_ptr()) } {
            CUresult::CUDA_ERROR_NOT_FOUND => return refuse(format!("kernels/{file}.cu has no such kernel")),
            result => check(&self.0.context.name, "cuModuleGetFunction", result)?,
        }
        // Asking beyond the last parameter is an error, which compute-sanitizer reports; so the number comes from the
        // build. Only the emulated card runs a program that was built without nvcc, and there is no harm in asking it.
        let counted = kernels.and_then(|kernels| {
            let at = kernels.parameters.binary_search_by_key(&entry, |&(name, _)| name).ok()?;
            Some(kernels.parameters[at].1)
        });
        let mut parameters = Vec::new();
        while counted.is_none_or(|count| parameters.len() < count) {
            let (mut offset, mut bytes) = (0, 0);
            // SAFETY: the function is loaded; past the last parameter the driver answers with an error.
            match unsafe { sys::cuFuncGetParamInfo(handle, parameters.len(), &mut offset, &mut bytes) } {
                CUresult::CUDA_SUCCESS => parameters.push(Parameter { offset, bytes }),
                _ if counted.is_none() => break,
                result => check(&self.0.context.name, "cuFuncGetParamInfo", result)?,
            }
        }
        // The architecture of the PTX, not of the card: code for an older one, compiled at load, does not wait. That this
        // program's own kernels wait, the build has seen; of others nobody knows.
        let mut compiled_for = 0;
        let ptx_version = CUfunction_attribute::CU_FUNC_ATTRIBUTE_PTX_VERSION;
        // SAFETY: the function is loaded; the pointer is valid for the call.
        let result = unsafe { sys::cuFuncGetAttribute(&mut compiled_for, ptx_version, handle) };
        check(&self.0.context.name, "cuFuncGetAttribute", result)?;
        let can_depend = kernels.is_some() && compiled_for >= 90;
        Ok(Function { handle, parameters: parameters.into(), can_depend, shared_bytes: DEFAULT_SHARED_BYTES })
    }
}

fn attribute(id: CUlaunchAttributeID, value: CUlaunchAttributeValue) -> CUlaunchAttribute {
    CUlaunchAttribute { id, pad: [0; 4], value }
}

/// While it lives, the device's work is recorded.
pub(super) struct Recording<'a> {
    device: &'a CudaDevice,
    before: Option<Arc<Pool>>,
}

impl Recording<'_> {
    /// The names of what was recorded.
    pub fn end(mut self) -> Vec<String> {
        self.stop()
    }

    fn stop(&mut self) -> Vec<String> {
        let Some(before) = self.before.take() else { return Vec::new() };
        let mut state = self.device.state();
        state.pool = before;
        state.recorded.take().unwrap_or_default()
    }
}

impl Drop for Recording<'_> {
    fn drop(&mut self) {
        self.stop();
    }
}

impl fmt::Debug for CudaDevice {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "CudaDevice({}, {})", self.0.context.name, self.0.card.name)
    }
}

impl fmt::Display for CudaDevice {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.0.context.name)
    }
}
