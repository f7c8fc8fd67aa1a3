use std::fmt;

use cudarc::driver::sys::{
    self, CUresult, CUtensorMapDataType, CUtensorMapFloatOOBfill, CUtensorMapInterleave, CUtensorMapL2promotion,
    CUtensorMapSwizzle,
};

use super::driver::check;
use super::{CudaDevice, DevicePtr};
use crate::error::{Error, Result};
use crate::runtime::DType;

/// How TMA exchanges the 16-byte chunks of rows in shared memory, so that a column of them lies in different banks: by the
/// row's number modulo 2, 4 or 8. The span is the widest row of a box that it allows, and the pitch of its rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Swizzle {
    None,
    Bytes32,
    Bytes64,
    Bytes128,
}

impl Swizzle {
    fn span_bytes(self) -> Option<usize> {
        match self {
            Swizzle::None => None,
            Swizzle::Bytes32 => Some(32),
            Swizzle::Bytes64 => Some(64),
            Swizzle::Bytes128 => Some(128),
        }
    }

    fn code(self) -> CUtensorMapSwizzle {
        match self {
            Swizzle::None => CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
            Swizzle::Bytes32 => CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_32B,
            Swizzle::Bytes64 => CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_64B,
            Swizzle::Bytes128 => CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
        }
    }
}

/// A tensor in the card's memory as TMA goes over it. Unlike everywhere else the innermost dimension comes first, as in the
/// driver and in the coordinates that a kernel gives.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    /// The first element, aligned to 16 bytes.
    pub base: DevicePtr,
    pub dtype: DType,
    /// Elements of each dimension, 1 to 2^32; 1 to 5 dimensions (3 to 5 in im2col mode).
    pub dims: &'a [usize],
    /// Bytes from one element to the next of each dimension but the first, whose elements are neighbours: multiples of 16
    /// below 2^40.
    pub strides_bytes: &'a [usize],
}

/// What TMA loads in im2col mode: the pixels that a convolution's filter meets at one of its taps, in the order of the
/// output's pixels, across rows and images. Dimensions are `C, W, N`, `C, W, H, N` or `C, W, H, D, N`.
#[derive(Clone, Copy, Debug)]
pub struct Im2col<'a> {
    /// The first place of the filter's corner in each spatial dimension, W first: minus the padding.
    pub lower_corner: &'a [i32],
    /// The last one, from the last pixel: the padding minus the reach of the filter, `dilation * (k - 1)`.
    pub upper_corner: &'a [i32],
    /// Channels of a box, 1 to 256.
    pub channels: usize,
    /// Pixels of a box, 1 to 1024.
    pub pixels: usize,
    /// The convolution's stride in each spatial dimension, 1 to 8.
    pub strides: &'a [usize],
}

/// What TMA must know of a tensor to copy boxes of it: an argument by value, for a kernel's `GRID_CONST TensorMap`. It holds
/// the tensor's address, which has to outlive the launches.
#[derive(Clone, Copy, PartialEq, Eq, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
pub struct TensorMap {
    words: [u64; 16],
}

/// The driver's own limits (CUDA driver API, tensor map object management).
const MOST_DIMS: usize = 5;
const LONGEST_DIM: usize = 1 << 32;
const STRIDE_END: usize = 1 << 40;
const LARGEST_BOX: usize = 256;
const MOST_PIXELS: usize = 1024;
const LARGEST_STEP: usize = 8;

impl TensorMap {
    /// Boxes of `boxes` elements, 1 to 256 in each dimension; a row of 16 bytes or a multiple, not longer than the swizzle's
    /// span. What lies outside the tensor is 0 in a load and left out of a store.
    ///
    /// # Errors
    /// [`Error::DeviceUnavailable`]: the card has no TMA. [`Error::Argument`]: which one, its value, and what is wanted.
    /// [`Error::Driver`]
    pub fn tiled(device: &CudaDevice, tensor: TensorView, boxes: &[usize], swizzle: Swizzle) -> Result<TensorMap> {
        const OP: &str = "TensorMap::tiled";
        let Checked { dims, strides, .. } = tensor.check(OP, device, 1)?;
        let rank = dims.len();
        same_length(OP, "boxes", boxes.len(), rank)?;
        for (i, &elements) in boxes.iter().enumerate() {
            within(OP, "boxes", i, elements, 1, LARGEST_BOX)?;
        }
        check_row(OP, "boxes[0]", boxes[0], tensor.dtype, swizzle)?;
        let boxes: Vec<u32> = boxes.iter().map(|&elements| elements as u32).collect();
        let steps = vec![1u32; rank];
        // SAFETY: every array has as many elements as the driver reads.
        tensor.encode(device, "cuTensorMapEncodeTiled", |map, data_type, address| unsafe {
            sys::cuTensorMapEncodeTiled(
                map,
                data_type,
                rank as u32,
                address,
                dims.as_ptr(),
                strides.as_ptr(),
                boxes.as_ptr(),
                steps.as_ptr(),
                CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle.code(),
                tensor.l2_promotion(),
                CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        })
    }

    /// Boxes of `channels` of `pixels` pixels of a convolution; the innermost dimension is that of the channels, the last
    /// that of the images. What lies outside the tensor is 0.
    ///
    /// # Errors
    /// As [`tiled`](TensorMap::tiled).
    pub fn im2col(device: &CudaDevice, tensor: TensorView, im2col: Im2col, swizzle: Swizzle) -> Result<TensorMap> {
        const OP: &str = "TensorMap::im2col";
        let Checked { dims, strides, .. } = tensor.check(OP, device, 3)?;
        let rank = dims.len();
        let spatial = rank - 2;
        let Im2col { lower_corner, upper_corner, channels, pixels, strides: steps } = im2col;
        same_length(OP, "lower_corner", lower_corner.len(), spatial)?;
        same_length(OP, "upper_corner", upper_corner.len(), spatial)?;
        same_length(OP, "strides", steps.len(), spatial)?;
        // The map has 16 bits for all of them together.
        let range = [1 << 15, 1 << 7, 1 << 4][spatial - 1];
        for i in 0..spatial {
            within(OP, "lower_corner", i, lower_corner[i], -range, range - 1)?;
            within(OP, "upper_corner", i, upper_corner[i], -range, range - 1)?;
            within(OP, "strides", i, steps[i], 1, LARGEST_STEP)?;
            let (lower, upper, pixels) = (i64::from(lower_corner[i]), i64::from(upper_corner[i]), dims[i + 1]);
            if pixels as i64 + upper - lower <= 0 {
                let want = format!("more than {} with {pixels} pixels and lower_corner {lower}", lower - pixels as i64);
                return Err(Error::argument(OP, "upper_corner", format!("{upper} in dimension {i}"), want));
            }
        }
        if !(1..=LARGEST_BOX).contains(&channels) {
            return Err(Error::argument(OP, "channels", channels, format!("1 to {LARGEST_BOX}")));
        }
        if !(1..=MOST_PIXELS).contains(&pixels) {
            return Err(Error::argument(OP, "pixels", pixels, format!("1 to {MOST_PIXELS}")));
        }
        check_row(OP, "channels", channels, tensor.dtype, swizzle)?;
        let mut element_strides = vec![1u32; rank];
        for (element_stride, &step) in element_strides[1..].iter_mut().zip(steps) {
            *element_stride = step as u32;
        }
        // SAFETY: every array has as many elements as the driver reads.
        tensor.encode(device, "cuTensorMapEncodeIm2col", |map, data_type, address| unsafe {
            sys::cuTensorMapEncodeIm2col(
                map,
                data_type,
                rank as u32,
                address,
                dims.as_ptr(),
                strides.as_ptr(),
                lower_corner.as_ptr(),
                upper_corner.as_ptr(),
                channels as u32,
                pixels as u32,
                element_strides.as_ptr(),
                CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle.code(),
                tensor.l2_promotion(),
                CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        })
    }
}

/// Dimensions and strides as the driver takes them.
struct Checked {
    dims: Vec<u64>,
    strides: Vec<u64>,
}

impl TensorView<'_> {
    fn check(&self, op: &'static str, device: &CudaDevice, fewest_dims: usize) -> Result<Checked> {
        let (major, minor) = device.compute_capability();
        if major < 9 {
            let reason = format!("{op}: {} (compute capability {major}.{minor}) has no TMA", device.card());
            return Err(Error::DeviceUnavailable { device: device.to_string(), reason });
        }
        let TensorView { base, dtype: _, dims, strides_bytes } = *self;
        if !(fewest_dims..=MOST_DIMS).contains(&dims.len()) {
            let got = format!("{} dimensions", dims.len());
            return Err(Error::argument(op, "dims", got, format!("{fewest_dims} to {MOST_DIMS}")));
        }
        if base == DevicePtr::NULL || !base.0.is_multiple_of(16) {
            return Err(Error::argument(op, "base", format!("{:#x}", base.0), "an address aligned to 16"));
        }
        for (i, &elements) in dims.iter().enumerate() {
            within(op, "dims", i, elements, 1, LONGEST_DIM)?;
        }
        same_length(op, "strides_bytes", strides_bytes.len(), dims.len() - 1)?;
        for (i, &bytes) in strides_bytes.iter().enumerate() {
            if !bytes.is_multiple_of(16) || bytes >= STRIDE_END {
                let got = format!("{bytes} in place {i}");
                return Err(Error::argument(op, "strides_bytes", got, "a multiple of 16 below 2^40"));
            }
        }
        let as_u64 = |values: &[usize]| values.iter().map(|&value| value as u64).collect();
        Ok(Checked { dims: as_u64(dims), strides: as_u64(strides_bytes) })
    }

    /// How much of DRAM a miss in L2 fetches: what a row of the tensor has in one piece, up to the most there is.
    fn l2_promotion(&self) -> CUtensorMapL2promotion {
        match self.dims[0] * self.dtype.size_bytes() {
            ..128 => CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_64B,
            128..256 => CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            256.. => CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        }
    }

    /// The map that `call` fills, given the data type's number and the address.
    fn encode(
        &self,
        device: &CudaDevice,
        name: &'static str,
        call: impl FnOnce(*mut sys::CUtensorMap, CUtensorMapDataType, *mut std::ffi::c_void) -> CUresult,
    ) -> Result<TensorMap> {
        let data_type = match self.dtype {
            DType::F32 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
            DType::F16 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            DType::BF16 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            DType::U32 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT32,
            // TMA moves bytes and has no name for 8-bit floats.
            DType::F8E4M3 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT8,
        };
        let context = device.context();
        context.bind()?;
        // The driver's type has a larger alignment than what a kernel needs.
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        check(&context.name, name, call(&mut map, data_type, self.base.0 as *mut std::ffi::c_void))?;
        Ok(TensorMap { words: map.opaque })
    }
}

fn same_length(op: &'static str, arg: &'static str, got: usize, want: usize) -> Result<()> {
    if got == want { Ok(()) } else { Err(Error::argument(op, arg, format!("{got} values"), format!("{want}"))) }
}

fn within<T: PartialOrd + fmt::Display>(
    op: &'static str,
    arg: &'static str,
    i: usize,
    got: T,
    least: T,
    most: T,
) -> Result<()> {
    if got >= least && got <= most {
        return Ok(());
    }
    Err(Error::argument(op, arg, format!("{got} in place {i}"), format!("{least} to {most}")))
}

/// The bytes of a box's row.
fn check_row(op: &'static str, arg: &'static str, elements: usize, dtype: DType, swizzle: Swizzle) -> Result<()> {
    let bytes = elements * dtype.size_bytes();
    let got = || format!("{elements} of {dtype}, {bytes} bytes");
    if !bytes.is_multiple_of(16) {
        return Err(Error::argument(op, arg, got(), "a multiple of 16 bytes"));
    }
    match swizzle.span_bytes() {
        Some(span) if bytes > span => {
            Err(Error::argument(op, arg, got(), format!("at most {span} bytes, the swizzle's span")))
        }
        _ => Ok(()),
    }
}

impl fmt::Debug for TensorMap {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("TensorMap")
    }
}
