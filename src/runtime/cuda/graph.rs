use std::sync::Arc;

use cudarc::driver::sys::{self, CUgraph, CUgraphExec, CUstreamCaptureMode};

use super::CudaDevice;
use super::device::Context;
use super::driver::check;
use super::memory::Pool;
use crate::error::Result;

/// Work recorded once and replayed as often as wanted: the same kernels on the same addresses, one call of the driver.
#[derive(Debug)]
pub struct Graph {
    context: Arc<Context>,
    executable: CUgraphExec,
    /// Where the recorded work has its intermediate tensors.
    _pool: Arc<Pool>,
    kernels: Vec<String>,
}

// SAFETY: the handle is the driver's, which any thread may use.
unsafe impl Send for Graph {}
unsafe impl Sync for Graph {}

impl CudaDevice {
    /// Records what `work` launches instead of running it. Tensors that `work` makes live in memory that the graph keeps
    /// (`bytes`: how much it will need, as the planner says; more is asked for when needed), so a replay writes to the
    /// same addresses; tensors made before must outlive the graph.
    ///
    /// # Errors
    /// Those of `work`; [`Error::OutOfMemory`](crate::Error::OutOfMemory); [`Error::Driver`](crate::Error::Driver). The
    /// device stays usable.
    pub fn capture(&self, bytes: u64, work: impl FnOnce() -> Result<()>) -> Result<Graph> {
        let context = self.context().clone();
        let name = &context.name;
        context.bind()?;
        let pool = self.graph_pool();
        pool.reserve(bytes, &|| "the memory of a captured step".into())?;
        // Relaxed: the pool may ask the driver for memory while the stream records.
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream is ours and not capturing: begin_capture below holds the only way to it.
        let recording = self.begin_capture(pool.clone())?;
        check(name, "cuStreamBeginCapture", unsafe { sys::cuStreamBeginCapture_v2(context.stream, mode) })?;
        let result = work();
        let mut graph: CUgraph = std::ptr::null_mut();
        // SAFETY: the stream is capturing. The graph is null when the capture was invalidated.
        let ended = check(name, "cuStreamEndCapture", unsafe { sys::cuStreamEndCapture(context.stream, &mut graph) });
        let kernels = recording.end();
        let destroy = |graph: CUgraph| {
            if !graph.is_null() {
                // SAFETY: made by cuStreamEndCapture, destroyed once.
                unsafe { sys::cuGraphDestroy(graph) };
            }
        };
        if let Err(error) = result.and(ended) {
            destroy(graph);
            return Err(error);
        }
        let mut executable: CUgraphExec = std::ptr::null_mut();
        // SAFETY: the graph is complete; it may go once it is instantiated.
        let instantiated = unsafe { sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0) };
        destroy(graph);
        check(name, "cuGraphInstantiate", instantiated)?;
        Ok(Graph { context, executable, _pool: pool, kernels })
    }
}

impl Graph {
    /// Runs the recorded work after what was launched before; does not wait for it.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver)
    pub fn replay(&self) -> Result<()> {
        self.context.bind()?;
        // SAFETY: the executable graph lives as long as self.
        check(&self.context.name, "cuGraphLaunch", unsafe { sys::cuGraphLaunch(self.executable, self.context.stream) })
    }

    /// The kernels in the order they were recorded; copies and fills are listed as `memcpy` and `memset`.
    pub fn kernels(&self) -> &[String] {
        &self.kernels
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: the driver keeps what a replay under way needs, except for memory: wait before the pool goes.
            unsafe {
                sys::cuStreamSynchronize(self.context.stream);
                sys::cuGraphExecDestroy(self.executable);
            }
        }
    }
}
