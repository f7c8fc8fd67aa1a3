use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};

use super::cuda::{Buffer, DevicePtr};
use super::{CpuDevice, CudaDevice, DType, Device, Element, F8E4M3, MetaDevice};
use crate::error::{Error, Result};

/// A dense, contiguous, row-major array on a device.
///
/// Activations are channels-last, `[N, H, W, C]`; tokens `[N, L, C]` with `L = H * W` are the same bytes, so
/// [`reshape`](Tensor::reshape) never copies. Clones share the storage; an op's result is always fresh storage.
#[derive(Clone, Debug)]
pub struct Tensor {
    storage: Arc<Storage>,
    /// First element, counted in elements of `dtype`.
    offset: usize,
    shape: Vec<usize>,
    dtype: DType,
    device: Device,
}

#[derive(Debug)]
enum Storage {
    Cpu { data: CpuData, device: CpuDevice },
    Cuda(Buffer),
    Meta { bytes: u64, device: MetaDevice },
}

/// Host memory of a tensor.
#[derive(Debug)]
pub enum CpuData {
    F32(Vec<f32>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
    U32(Vec<u32>),
    F8E4M3(Vec<F8E4M3>),
}

impl CpuData {
    fn as_bytes(&self) -> &[u8] {
        match self {
            CpuData::F32(v) => bytemuck::cast_slice(v),
            CpuData::F16(v) => bytemuck::cast_slice(v),
            CpuData::BF16(v) => bytemuck::cast_slice(v),
            CpuData::U32(v) => bytemuck::cast_slice(v),
            CpuData::F8E4M3(v) => bytemuck::cast_slice(v),
        }
    }

    fn as_bytes_mut(&mut self) -> &mut [u8] {
        match self {
            CpuData::F32(v) => bytemuck::cast_slice_mut(v),
            CpuData::F16(v) => bytemuck::cast_slice_mut(v),
            CpuData::BF16(v) => bytemuck::cast_slice_mut(v),
            CpuData::U32(v) => bytemuck::cast_slice_mut(v),
            CpuData::F8E4M3(v) => bytemuck::cast_slice_mut(v),
        }
    }
}

impl Drop for Storage {
    fn drop(&mut self) {
        match self {
            Storage::Cpu { data, device } => device.removed(data.as_bytes().len() as u64),
            Storage::Cuda(_) => {}
            Storage::Meta { bytes, device } => device.removed(*bytes),
        }
    }
}

impl Tensor {
    /// Fresh storage with unspecified contents: NaN in builds for tests, so that an element an op forgets is seen.
    ///
    /// # Errors
    /// [`Error::TooLarge`] when the element count overflows, [`Error::OutOfMemory`] when the device has no room.
    pub fn uninit(device: &Device, shape: &[usize], dtype: DType) -> Result<Tensor> {
        // The host's fresh pages are zeros for nothing; a card's memory would have to be filled.
        let fill = cfg!(poison) || matches!(device, Device::Cuda(_));
        Tensor::filled(device, shape, dtype, if fill { f32::NAN } else { 0.0 })
    }

    pub fn zeros(device: &Device, shape: &[usize], dtype: DType) -> Result<Tensor> {
        Tensor::filled(device, shape, dtype, 0.0)
    }

    fn filled(device: &Device, shape: &[usize], dtype: DType, value: f32) -> Result<Tensor> {
        let count = element_count(shape, dtype)?;
        let storage = match device {
            Device::Cpu(cpu) => {
                let data = match dtype {
                    DType::F32 => CpuData::F32(allocate(cpu, count, shape, value)?),
                    DType::F16 => CpuData::F16(allocate(cpu, count, shape, f16::from_f32(value))?),
                    DType::BF16 => CpuData::BF16(allocate(cpu, count, shape, bf16::from_f32(value))?),
                    DType::U32 => CpuData::U32(allocate(cpu, count, shape, 0)?),
                    DType::F8E4M3 => CpuData::F8E4M3(allocate(cpu, count, shape, F8E4M3::from_f32(value))?),
                };
                cpu.added((count * dtype.size_bytes()) as u64);
                Storage::Cpu { data, device: cpu.clone() }
            }
            Device::Cuda(cuda) => {
                let bytes = (count * dtype.size_bytes()) as u64;
                let buffer = cuda.allocate(bytes, &|| format!("a tensor of shape {shape:?}"))?;
                match value {
                    0.0 => cuda.fill(buffer.address(), 0, bytes)?,
                    // All bits set is NaN in every float dtype. A graph holds no fills: they would hide what a replay
                    // forgets.
                    _ if cfg!(poison) && !cuda.is_recording() => cuda.fill(buffer.address(), 0xff, bytes)?,
                    _ => {}
                }
                Storage::Cuda(buffer)
            }
            Device::Meta(meta) => {
                let bytes = (count * dtype.size_bytes()) as u64;
                meta.added(bytes);
                Storage::Meta { bytes, device: meta.clone() }
            }
        };
        Ok(Tensor { storage: Arc::new(storage), offset: 0, shape: shape.to_vec(), dtype, device: device.clone() })
    }

    /// Takes `values` (row-major) to the device, rounding to `dtype` to nearest even.
    ///
    /// # Errors
    /// [`Error::Argument`] when the count is not the product of `shape`; as [`uninit`](Tensor::uninit).
    pub fn from_f32(device: &Device, shape: &[usize], dtype: DType, values: &[f32]) -> Result<Tensor> {
        let count = element_count(shape, dtype)?;
        if values.len() != count {
            let want = format!("the product of {shape:?}");
            return Err(Error::argument("Tensor::from_f32", "values", values.len(), want));
        }
        if !dtype.is_float() {
            let (op, arg, want) = ("Tensor::from_f32", "dtype", "a float type".into());
            return Err(Error::Dtype { op, arg, got: dtype, want });
        }
        let mut tensor = Tensor::uninit(device, shape, dtype)?;
        tensor.write_f32(values)?;
        Ok(tensor)
    }

    /// Overwrites every element of a tensor that nobody else holds: on a card the address stays, and the copy comes after
    /// the work launched before.
    ///
    /// # Errors
    /// [`Error::Argument`] when the count differs; [`Error::Driver`].
    pub fn write_f32(&mut self, values: &[f32]) -> Result<()> {
        if values.len() != self.numel() {
            let want = format!("the product of {:?}", self.shape);
            return Err(Error::argument("Tensor::write_f32", "values", values.len(), want));
        }
        match &self.device {
            Device::Meta(_) => Ok(()),
            Device::Cpu(_) => {
                match self.dtype {
                    DType::F32 => self.cpu_mut::<f32>().copy_from_slice(values),
                    DType::F16 => store(self.cpu_mut::<f16>(), values),
                    DType::BF16 => store(self.cpu_mut::<bf16>(), values),
                    DType::U32 => store(self.cpu_mut::<u32>(), values),
                    DType::F8E4M3 => store(self.cpu_mut::<F8E4M3>(), values),
                }
                Ok(())
            }
            Device::Cuda(cuda) => {
                let to = self.cuda().0;
                match self.dtype {
                    DType::F32 => cuda.upload(to, bytemuck::cast_slice(values)),
                    DType::F16 => upload_as::<f16>(cuda, to, values),
                    DType::BF16 => upload_as::<bf16>(cuda, to, values),
                    DType::U32 => upload_as::<u32>(cuda, to, values),
                    DType::F8E4M3 => upload_as::<F8E4M3>(cuda, to, values),
                }
            }
        }
    }

    /// Token ids and other counts, dtype `U32`. Errors as [`from_f32`](Tensor::from_f32).
    pub fn from_u32(device: &Device, shape: &[usize], values: &[u32]) -> Result<Tensor> {
        let mut tensor = Tensor::filled(device, shape, DType::U32, 0.0)?;
        tensor.write_u32(values)?;
        Ok(tensor)
    }

    /// As [`write_f32`](Tensor::write_f32), for a tensor of dtype `U32`.
    ///
    /// # Errors
    /// [`Error::Argument`] when the count differs; [`Error::Dtype`]; [`Error::Driver`].
    pub fn write_u32(&mut self, values: &[u32]) -> Result<()> {
        const OP: &str = "Tensor::from_u32";
        if values.len() != self.numel() {
            return Err(Error::argument(OP, "values", values.len(), format!("the product of {:?}", self.shape)));
        }
        if self.dtype != DType::U32 {
            return Err(Error::Dtype { op: OP, arg: "self", got: self.dtype, want: "u32".into() });
        }
        match &self.device {
            Device::Cpu(_) => self.cpu_mut::<u32>().copy_from_slice(values),
            Device::Cuda(cuda) => cuda.upload(self.cuda().0, bytemuck::cast_slice(values))?,
            Device::Meta(_) => {}
        }
        Ok(())
    }

    /// The elements as f32 on the host, row-major.
    ///
    /// # Errors
    /// [`Error::DeviceUnavailable`] on the meta device, which has no data; [`Error::Driver`].
    pub fn to_f32_vec(&self) -> Result<Vec<f32>> {
        match &self.device {
            Device::Cpu(_) => {}
            Device::Cuda(_) => return self.to_cpu()?.to_f32_vec(),
            Device::Meta(_) => {
                return Err(Error::DeviceUnavailable {
                    device: "meta".into(),
                    reason: "its tensors hold no data".into(),
                });
            }
        }
        Ok(match self.dtype {
            DType::F32 => self.cpu::<f32>().to_vec(),
            DType::F16 => load(self.cpu::<f16>()),
            DType::BF16 => load(self.cpu::<bf16>()),
            DType::U32 => load(self.cpu::<u32>()),
            DType::F8E4M3 => load(self.cpu::<F8E4M3>()),
        })
    }

    /// A copy in another float dtype (the same tensor when it has it already).
    pub fn to_dtype(&self, dtype: DType) -> Result<Tensor> {
        if dtype == self.dtype {
            return Ok(self.clone());
        }
        match self.device {
            Device::Meta(_) => Tensor::uninit(&self.device, &self.shape, dtype),
            Device::Cpu(_) | Device::Cuda(_) => Tensor::from_f32(&self.device, &self.shape, dtype, &self.to_f32_vec()?),
        }
    }

    /// The same elements on another device (the same tensor where it is there already).
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; [`Error::Driver`]; [`Error::DeviceUnavailable`] from the meta device.
    pub fn to_device(&self, device: &Device) -> Result<Tensor> {
        if self.device.same(device) {
            return Ok(self.clone());
        }
        match (&self.device, device) {
            (_, Device::Meta(_)) => Tensor::uninit(device, &self.shape, self.dtype),
            (Device::Cpu(_), Device::Cuda(cuda)) => {
                let tensor = Tensor::uninit(device, &self.shape, self.dtype)?;
                cuda.upload(tensor.cuda().0, self.cpu_bytes())?;
                Ok(tensor)
            }
            (_, Device::Cpu(_)) => self.to_cpu(),
            (_, Device::Cuda(_)) => self.to_cpu()?.to_device(device),
        }
    }

    fn to_cpu(&self) -> Result<Tensor> {
        match &self.device {
            Device::Cpu(_) => Ok(self.clone()),
            Device::Cuda(cuda) => {
                let mut tensor = Tensor::uninit(&Device::cpu(), &self.shape, self.dtype)?;
                match Arc::get_mut(&mut tensor.storage) {
                    Some(Storage::Cpu { data, .. }) => cuda.download(self.cuda().0, data.as_bytes_mut())?,
                    _ => unreachable!("just made, on the cpu"),
                }
                Ok(tensor)
            }
            Device::Meta(_) => {
                Err(Error::DeviceUnavailable { device: "meta".into(), reason: "its tensors hold no data".into() })
            }
        }
    }

    /// The same bytes under another shape.
    ///
    /// # Errors
    /// [`Error::Shape`] when the element counts differ.
    pub fn reshape(&self, shape: &[usize]) -> Result<Tensor> {
        if shape.iter().product::<usize>() != self.numel() {
            return Err(Error::shape("reshape", "self", self, format!("as many elements as {shape:?}")));
        }
        Ok(Tensor { shape: shape.to_vec(), ..self.clone() })
    }

    /// Rows `range` of the first dimension, sharing the storage: `[N, ...]` to `[range.len(), ...]`.
    ///
    /// # Errors
    /// [`Error::Shape`] when there is no first dimension, [`Error::Argument`] when the range is not within it.
    pub fn rows(&self, range: Range<usize>) -> Result<Tensor> {
        let Some(&first) = self.shape.first() else {
            return Err(Error::shape("rows", "x", self, "a first dimension"));
        };
        if range.start > range.end || range.end > first {
            return Err(Error::argument("rows", "range", format!("{range:?}"), format!("within 0..{first}")));
        }
        let row: usize = self.shape[1..].iter().product();
        let mut shape = self.shape.clone();
        shape[0] = range.len();
        Ok(Tensor { offset: self.offset + range.start * row, shape, ..self.clone() })
    }

    /// A tensor with the same elements and storage of its own.
    ///
    /// # Errors
    /// As [`uninit`](Tensor::uninit); [`Error::Driver`].
    pub fn duplicate(&self) -> Result<Tensor> {
        Tensor::concat(std::slice::from_ref(self))
    }

    /// Tensors of one device, dtype and trailing shape, one after the other on the first dimension.
    ///
    /// # Errors
    /// [`Error::Argument`]: no parts; [`Error::Shape`], [`Error::Dtype`], [`Error::Device`]: a part that does not fit the
    /// first; as [`uninit`](Tensor::uninit).
    pub fn concat(parts: &[Tensor]) -> Result<Tensor> {
        const OP: &str = "concat";
        let Some(first) = parts.first() else {
            return Err(Error::argument(OP, "parts", 0, "at least one"));
        };
        let Some((_, rest)) = first.shape.split_first() else {
            return Err(Error::shape(OP, "parts", first, "at least one dimension"));
        };
        let mut rows = 0;
        for part in parts {
            let own = part.shape.first().copied().unwrap_or(0);
            part.expect(OP, "parts", &[&[own], rest].concat(), first.dtype, &first.device)?;
            rows += own;
        }
        let mut y = Tensor::uninit(&first.device, &[&[rows], rest].concat(), first.dtype)?;
        let mut at = 0;
        for part in parts {
            y.copy_into(at, part)?;
            at += part.numel();
        }
        Ok(y)
    }

    /// `[..., A]` and `[..., B]` of one device, dtype and leading shape side by side: `[..., A + B]`. A copy for each row of
    /// each, for what is made once per prompt.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Dtype`], [`Error::Device`]: `b` does not fit `a`; as [`uninit`](Tensor::uninit).
    pub fn concat_channels(a: &Tensor, b: &Tensor) -> Result<Tensor> {
        const OP: &str = "concat_channels";
        let (Some((&width_a, leading)), Some(&width_b)) = (a.shape.split_last(), b.shape.last()) else {
            return Err(Error::shape(OP, "a", a, "at least one dimension"));
        };
        b.expect(OP, "b", &[leading, &[width_b]].concat(), a.dtype, &a.device)?;
        let rows: usize = leading.iter().product();
        let (flat_a, flat_b) = (a.reshape(&[rows, width_a])?, b.reshape(&[rows, width_b])?);
        let mut y = Tensor::uninit(&a.device, &[leading, &[width_a + width_b]].concat(), a.dtype)?;
        for row in 0..rows {
            let at = row * (width_a + width_b);
            y.copy_into(at, &flat_a.rows(row..row + 1)?)?;
            y.copy_into(at + width_a, &flat_b.rows(row..row + 1)?)?;
        }
        Ok(y)
    }

    /// Overwrites every element with those of `from`, of the same shape, dtype and device: on a card the address stays,
    /// and the copy comes after the work launched before. A tensor that others hold changes for them too, on a card.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Dtype`], [`Error::Device`]: `from`; [`Error::Driver`].
    pub fn copy_from(&mut self, from: &Tensor) -> Result<()> {
        from.expect("copy_from", "from", &self.shape, self.dtype, &self.device)?;
        self.copy_into(0, from)
    }

    /// Overwrites the rows of the first dimension from `first` on with those of `from`, whose other dimensions, dtype and
    /// device are this tensor's. As [`copy_from`](Tensor::copy_from) otherwise.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Dtype`], [`Error::Device`]: `from`; [`Error::Argument`]: `first`, or on the cpu a tensor
    /// that others hold; [`Error::Driver`].
    pub fn copy_rows_from(&mut self, first: usize, from: &Tensor) -> Result<()> {
        const OP: &str = "copy_rows_from";
        let Some((&all, rest)) = self.shape.split_first() else {
            return Err(Error::shape(OP, "self", self, "a first dimension"));
        };
        let rows = from.shape.first().copied().unwrap_or(0);
        from.expect(OP, "from", &[&[rows], rest].concat(), self.dtype, &self.device)?;
        if first > all || rows > all - first {
            return Err(Error::argument(OP, "first", first, format!("{rows} rows from there on within {all}")));
        }
        self.copy_into(first * rest.iter().product::<usize>(), from)
    }

    /// The elements of `from` to those from `at` on; checked: one device and dtype, and there is room.
    fn copy_into(&mut self, at: usize, from: &Tensor) -> Result<()> {
        match self.device.clone() {
            Device::Meta(_) => Ok(()),
            Device::Cpu(_) => {
                let size = self.dtype.size_bytes();
                let bytes = from.cpu_bytes();
                let first = (self.offset + at) * size;
                match Arc::get_mut(&mut self.storage) {
                    Some(Storage::Cpu { data, .. }) => {
                        data.as_bytes_mut()[first..first + bytes.len()].copy_from_slice(bytes);
                        Ok(())
                    }
                    _ => Err(Error::argument("copy_from", "self", "shared", "a tensor that nobody else holds")),
                }
            }
            Device::Cuda(cuda) => {
                let to = self.cuda().0 + (at * self.dtype.size_bytes()) as u64;
                cuda.copy(to, from.cuda().0, from.bytes())
            }
        }
    }

    /// Do both have the same elements of one storage?
    pub fn is_same(&self, other: &Tensor) -> bool {
        let place = |tensor: &Tensor| (tensor.offset, tensor.shape.clone(), tensor.dtype);
        Arc::ptr_eq(&self.storage, &other.storage) && place(self) == place(other)
    }

    /// Does nobody else hold the storage?
    pub fn is_unshared(&self) -> bool {
        Arc::strong_count(&self.storage) == 1
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes of the elements.
    pub fn bytes(&self) -> u64 {
        (self.numel() * self.dtype.size_bytes()) as u64
    }

    /// The shape as an array, for destructuring: `let [n, h, w, c] = x.dims(OP, "x")?;`
    ///
    /// # Errors
    /// [`Error::Shape`] when the rank is not `R`.
    pub fn dims<const R: usize>(&self, op: &'static str, arg: &'static str) -> Result<[usize; R]> {
        self.shape.as_slice().try_into().map_err(|_| Error::shape(op, arg, self, format!("{R} dimensions")))
    }

    /// Checks that an argument has exactly this shape and dtype and lives with `with`.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Dtype`], [`Error::Device`], naming `arg`.
    pub fn expect(
        &self,
        op: &'static str,
        arg: &'static str,
        shape: &[usize],
        dtype: DType,
        with: &Device,
    ) -> Result<()> {
        if self.shape != shape {
            return Err(Error::shape(op, arg, self, format!("{shape:?}")));
        }
        if self.dtype != dtype {
            return Err(Error::Dtype { op, arg, got: self.dtype, want: dtype.to_string() });
        }
        if !self.device.same(with) {
            return Err(Error::Device { op, arg, got: self.device.to_string(), want: with.to_string() });
        }
        Ok(())
    }

    /// The elements in host memory. The op has checked device and dtype; a mismatch is a bug in the op.
    pub(crate) fn cpu<T: Element>(&self) -> &[T] {
        assert_eq!(self.dtype, T::DTYPE, "op read a tensor as the wrong type");
        match &*self.storage {
            Storage::Cpu { data, .. } => {
                &bytemuck::cast_slice(data.as_bytes())[self.offset..self.offset + self.numel()]
            }
            Storage::Cuda(_) | Storage::Meta { .. } => unreachable!("the tensor is not in host memory"),
        }
    }

    pub(crate) fn cpu_bytes(&self) -> &[u8] {
        let size = self.dtype.size_bytes();
        match &*self.storage {
            Storage::Cpu { data, .. } => &data.as_bytes()[self.offset * size..][..self.numel() * size],
            Storage::Cuda(_) | Storage::Meta { .. } => unreachable!("the tensor is not in host memory"),
        }
    }

    /// Where the first element lies on the card.
    pub(crate) fn cuda(&self) -> DevicePtr {
        match &*self.storage {
            Storage::Cuda(buffer) => DevicePtr(buffer.address() + (self.offset * self.dtype.size_bytes()) as u64),
            Storage::Cpu { .. } | Storage::Meta { .. } => unreachable!("the tensor is not on a card"),
        }
    }

    /// The elements of a tensor nobody else holds yet: the output of the op that calls this.
    pub(crate) fn cpu_mut<T: Element>(&mut self) -> &mut [T] {
        assert_eq!(self.dtype, T::DTYPE, "op wrote a tensor as the wrong type");
        let range = self.offset..self.offset + self.numel();
        match Arc::get_mut(&mut self.storage).expect("an output is not shared while it is written") {
            Storage::Cpu { data, .. } => &mut bytemuck::cast_slice_mut(data.as_bytes_mut())[range],
            Storage::Cuda(_) | Storage::Meta { .. } => unreachable!("the tensor is not in host memory"),
        }
    }
}

fn upload_as<T: Element>(cuda: &CudaDevice, to: u64, values: &[f32]) -> Result<()> {
    let values: Vec<T> = values.iter().map(|&value| T::from_f32(value)).collect();
    cuda.upload(to, bytemuck::cast_slice(&values))
}

fn element_count(shape: &[usize], dtype: DType) -> Result<usize> {
    let bytes =
        shape.iter().try_fold(dtype.size_bytes() as u128, |n, &d| n.checked_mul(d as u128)).unwrap_or(u128::MAX);
    let limit = isize::MAX as u128;
    if bytes > limit {
        return Err(Error::TooLarge { op: "Tensor", what: "bytes of the shape", got: bytes, limit });
    }
    Ok(shape.iter().product())
}

fn allocate<T: bytemuck::Pod>(cpu: &CpuDevice, count: usize, shape: &[usize], value: T) -> Result<Vec<T>> {
    // Zeroed pages come from the system for nothing; anything else is written once.
    let zero = bytemuck::bytes_of(&value).iter().all(|&byte| byte == 0);
    let result = if zero {
        bytemuck::allocation::try_zeroed_vec(count).map_err(drop)
    } else {
        let mut data = Vec::new();
        data.try_reserve_exact(count).map_err(drop).map(|()| {
            data.resize(count, value);
            data
        })
    };
    result.map_err(|()| Error::OutOfMemory {
        device: "cpu".into(),
        what: format!("a tensor of shape {shape:?}"),
        requested_bytes: (count * size_of::<T>()) as u64,
        in_use_bytes: cpu.in_use_bytes(),
        hint: "a smaller shape or a type of two bytes (bf16) needs less".into(),
    })
}

fn store<T: Element>(to: &mut [T], from: &[f32]) {
    to.iter_mut().zip(from).for_each(|(to, &from)| *to = T::from_f32(from));
}

fn load<T: Element>(from: &[T]) -> Vec<f32> {
    from.iter().map(|&value| value.to_f32()).collect()
}
