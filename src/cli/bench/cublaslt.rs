//! NVIDIA's own linear, cuBLASLt's, beside ours and a reader's: `y = x W^T + b` by `cublasLtMatmul` with the algorithm that its
//! heuristic puts first.
//!
//! The library is no part of this program. It is loaded by the name that `MEGAFUSE_CUBLASLT` has, else where the system has it;
//! where there is none, the bench says so and goes without. On the emulated card, whose memory the real one cannot reach, only
//! a library that is named is loaded: a stand-in.

use std::ffi::c_void;
use std::rc::Rc;

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use megafuse::runtime::CudaDevice;
use megafuse::runtime::cuda::{self, DevicePtr};
use megafuse::{DType, Device, Error, Result, Tensor};

/// Of cublasOperation_t, which cudarc leaves to cuBLAS.
const CUBLAS_OP_T: i32 = 1;

/// What NVIDIA's documentation advises for Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;

/// The library, open on a card.
pub struct CublasLt(Rc<Handle>);

struct Handle {
    handle: sys::cublasLtHandle_t,
    card: CudaDevice,
    workspace: Tensor,
}

impl CublasLt {
    /// `Err`: why there is none, for a line of the table.
    pub fn open(device: &Device, card: &CudaDevice) -> std::result::Result<CublasLt, String> {
        const NAME: &str = "MEGAFUSE_CUBLASLT";
        match std::env::var_os(NAME).filter(|path| !path.is_empty()) {
            // SAFETY: a library that the user names for this.
            Some(path) => match unsafe { libloading::Library::new(&path) } {
                // Found by its name from now on.
                Ok(library) => std::mem::forget(library),
                Err(error) => return Err(format!("{NAME}={} does not load: {error}", path.display())),
            },
            None if cuda::is_emulated() => return Err("the real one cannot reach an emulated card's memory".into()),
            None => {}
        }
        // SAFETY: looks for a library by its name.
        if !unsafe { sys::is_culib_present() } {
            return Err(format!("libcublasLt.so.13 and .12 are not to be found; {NAME} names one"));
        }
        let open = || -> Result<CublasLt> {
            card.raw_stream()?;
            let workspace = Tensor::uninit(device, &[WORKSPACE_BYTES / 4], DType::F32)?;
            let handle = result::create_handle().map_err(|error| failure("cublasLtCreate", error))?;
            Ok(CublasLt(Rc::new(Handle { handle, card: card.clone(), workspace })))
        };
        open().map_err(|error| error.to_string())
    }

    /// `y[m, n] = x[m, k] weight[n, k]^T + bias[n]`, ready to be launched. `tensors`: x, weight, bias.
    ///
    /// # Errors
    /// [`Error::Kernel`]: the call that failed, with cuBLASLt's name of the error; also where it has no algorithm for these
    /// sizes. [`Error::Driver`]
    pub fn linear(&self, [m, n, k]: [usize; 3], tensors: &[Tensor], y: &Tensor) -> Result<Product> {
        let [x, weight, bias] = tensors else { return Err(Error::config("cuBLASLt", "a linear without its tensors")) };
        let of_dtype = match y.dtype() {
            DType::F32 => sys::cudaDataType::CUDA_R_32F,
            DType::F16 => sys::cudaDataType::CUDA_R_16F,
            DType::BF16 => sys::cudaDataType::CUDA_R_16BF,
            other => return Err(Error::config("cuBLASLt", format!("no linear of {other}"))),
        };
        self.0.card.raw_stream()?;
        let mut product = Product {
            library: self.0.clone(),
            descriptor: std::ptr::null_mut(),
            layouts: [std::ptr::null_mut(); 3],
            algorithm: None,
            tensors: [x, weight, bias, y].map(Clone::clone),
        };
        // Its matrices go down columns, so it sees all of ours transposed: y^T [n, m] = weight [n, k] x^T [k, m].
        let layout = |rows: usize, columns: usize| {
            let made = result::create_matrix_layout(of_dtype, rows as u64, columns as u64, rows as i64);
            made.map_err(|error| failure("cublasLtMatrixLayoutCreate", error))
        };
        product.layouts = [layout(k, n)?, layout(k, m)?, layout(n, m)?];
        // Sums in f32; of f32 no TF32.
        let (compute, scale) = (sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType::CUDA_R_32F);
        product.descriptor =
            result::create_matmul_desc(compute, scale).map_err(|error| failure("cublasLtMatmulDescCreate", error))?;
        let [a, b, d] = product.layouts;
        let transposed = CUBLAS_OP_T;
        let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
        let bias = DevicePtr::or_null(Some(bias));
        type Attribute = sys::cublasLtMatmulDescAttributes_t;
        product.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &transposed)?;
        product.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
        product.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias)?;

        let preference =
            result::create_matmul_pref().map_err(|error| failure("cublasLtMatmulPreferenceCreate", error))?;
        let most = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        let bytes = std::ptr::from_ref(&WORKSPACE_BYTES).cast();
        // SAFETY: all handles were made above and live; the preference is destroyed once, here.
        let found = unsafe {
            let found = result::set_matmul_pref_attribute(preference, most, bytes, size_of::<usize>()).and_then(|()| {
                let handle = self.0.handle;
                result::get_matmul_algo_heuristic(handle, product.descriptor, a, b, d, d, preference)
            });
            let _ = result::destroy_matmul_pref(preference);
            found
        };
        let found = found.map_err(|error| failure("cublasLtMatmulAlgoGetHeuristic", error))?;
        product.algorithm = Some(found.algo);
        Ok(product)
    }
}

/// A product and its operands.
pub struct Product {
    library: Rc<Handle>,
    descriptor: sys::cublasLtMatmulDesc_t,
    /// Of weight, x and y.
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    algorithm: Option<sys::cublasLtMatmulAlgo_t>,
    /// x, weight, bias, y.
    tensors: [Tensor; 4],
}

impl Product {
    fn set<T>(&self, attribute: sys::cublasLtMatmulDescAttributes_t, value: &T) -> Result<()> {
        let value = std::ptr::from_ref(value).cast();
        // SAFETY: the descriptor lives; the library copies as many bytes as the attribute's type has.
        let set = unsafe { result::set_matmul_desc_attribute(self.descriptor, attribute, value, size_of::<T>()) };
        set.map_err(|error| failure("cublasLtMatmulDescSetAttribute", error))
    }

    /// Into the card's stream, behind all that was launched.
    ///
    /// # Errors
    /// [`Error::Kernel`], [`Error::Driver`]
    pub fn launch(&self) -> Result<Tensor> {
        let [x, weight, _, y] = &self.tensors;
        let Handle { handle, card, workspace } = &*self.library;
        let stream = card.raw_stream()?;
        let [a, b, d] = self.layouts;
        let (alpha, beta) = (1f32, 0f32);
        let address = |tensor: &Tensor| DevicePtr::or_null(Some(tensor)).0 as *mut c_void;
        let algorithm = self.algorithm.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        // SAFETY: operands, layouts and workspace live and have the sizes that they were made for.
        let done = unsafe {
            result::matmul(
                *handle,
                self.descriptor,
                std::ptr::from_ref(&alpha).cast(),
                std::ptr::from_ref(&beta).cast(),
                address(weight),
                a,
                address(x),
                b,
                address(y),
                d,
                address(y),
                d,
                algorithm,
                address(workspace),
                WORKSPACE_BYTES,
                stream.cast(),
            )
        };
        done.map_err(|error| failure("cublasLtMatmul", error))?;
        Ok(y.clone())
    }
}

impl Drop for Product {
    fn drop(&mut self) {
        // SAFETY: made by linear, destroyed once; those that were not made are null.
        unsafe {
            for layout in self.layouts.into_iter().filter(|layout| !layout.is_null()) {
                let _ = result::destroy_matrix_layout(layout);
            }
            if !self.descriptor.is_null() {
                let _ = result::destroy_matmul_desc(self.descriptor);
            }
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if self.card.raw_stream().is_ok() {
            // SAFETY: made by open, destroyed once, behind all products.
            let _ = unsafe { result::destroy_handle(self.handle) };
        }
    }
}

fn failure(call: &str, CublasError(status): CublasError) -> Error {
    Error::Kernel { kernel: call.into(), reason: format!("cuBLASLt says {status:?}") }
}
