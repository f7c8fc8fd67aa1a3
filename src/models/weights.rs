//! Weights by key: safetensors files (one, or shards with an index) checked, converted, repacked and brought to a device;
//! or, for the meta device, a manifest of what a model asks for.

use std::path::Path;

use crate::error::Result;
use crate::runtime::{DType, Device, Tensor};

/// All tensors of one model. Every key is consumed exactly once: [`finish`](WeightStore::finish) reports what is left.
pub struct WeightStore {}

impl WeightStore {
    /// Opens `dir/stem.safetensors`, or the shards named by `dir/stem.safetensors.index.json`; for `stem`
    /// `diffusion_pytorch_model` also `.fp16.` variants when the plain name is absent. Tensors will be `dtype` on `device`.
    ///
    /// # Errors
    /// [`Error::File`](crate::Error::File): missing, truncated, not safetensors, two shards with one key, an index that
    /// names a file or key that is not there. Always with what to do.
    pub fn open(_dir: &Path, _stem: &str, _device: &Device, _dtype: DType) -> Result<WeightStore> {
        unimplemented!()
    }

    /// The bytes of one safetensors file that is already in memory (the embedded model); `name` stands in errors.
    pub fn from_bytes(_name: &str, _bytes: &'static [u8], _device: &Device, _dtype: DType) -> Result<WeightStore> {
        unimplemented!()
    }

    /// No data: hands out meta tensors of the shapes asked for and remembers key and shape of each.
    pub fn meta(_device: &Device, _dtype: DType) -> WeightStore {
        unimplemented!()
    }

    /// Keys and checkpoint shapes asked for so far, in order.
    pub fn manifest(&self) -> Vec<(String, Vec<usize>)> {
        unimplemented!()
    }

    pub fn root(&self) -> Weights<'_> {
        Weights { store: self, prefix: String::new() }
    }

    /// Renames keys before anybody asks: `rename(key)` is the key under which a stored tensor will be found, `None`
    /// drops it (`position_ids`).
    ///
    /// # Errors
    /// [`Error::Weight`](crate::Error::Weight): two keys become one.
    pub fn rename(&mut self, _rename: impl Fn(&str) -> Option<String>) -> Result<()> {
        unimplemented!()
    }

    /// Does the file hold a tensor with this full key? (Always true for a manifest.)
    pub fn contains(&self, _key: &str) -> bool {
        unimplemented!()
    }

    /// # Errors
    /// [`Error::Weight`](crate::Error::Weight) naming the tensors that no layer asked for.
    pub fn finish(self) -> Result<()> {
        unimplemented!()
    }
}

/// A place in the key tree: `weights.at("conv1").conv("weight", ...)`.
#[derive(Clone)]
pub struct Weights<'a> {
    store: &'a WeightStore,
    prefix: String,
}

impl<'a> Weights<'a> {
    /// The sub-tree `name` (a dot is put between).
    pub fn at(&self, name: impl AsRef<str>) -> Weights<'a> {
        let name = name.as_ref();
        let prefix = if self.prefix.is_empty() { name.to_string() } else { format!("{}.{name}", self.prefix) };
        Weights { store: self.store, prefix }
    }

    /// Is there a tensor `name` here? For parts that a file may lack.
    pub fn contains(&self, name: &str) -> bool {
        self.store.contains(&self.at(name).prefix)
    }

    /// Full key, for messages.
    pub fn path(&self) -> &str {
        &self.prefix
    }

    pub fn device(&self) -> &Device {
        unimplemented!()
    }

    pub fn dtype(&self) -> DType {
        unimplemented!()
    }

    /// The tensor `name` with exactly this shape.
    ///
    /// # Errors
    /// [`Error::Weight`](crate::Error::Weight): missing, taken twice, another shape, a dtype other than
    /// f32/f16/bf16 (f64 is accepted and rounded), a value that is not finite (also after rounding to the dtype).
    pub fn tensor(&self, _name: &str, _shape: &[usize]) -> Result<Tensor> {
        unimplemented!()
    }

    /// A conv weight, `[O, I, kh, kw]` in the file, as `[O, kh, kw, I]`.
    pub fn conv(&self, _name: &str, _out: usize, _in: usize, _kernel: usize) -> Result<Tensor> {
        unimplemented!()
    }

    /// A linear weight `[N, K]`; a file may hold it as a 1x1 conv `[N, K, 1, 1]` as well.
    pub fn matrix(&self, _name: &str, _n: usize, _k: usize) -> Result<Tensor> {
        unimplemented!()
    }

    /// Several tensors of equal trailing shape stacked on the first dimension: fused QKV, `names` in order, `rows` each.
    pub fn stacked(&self, _names: &[&str], _rows: usize, _columns: Option<usize>) -> Result<Tensor> {
        unimplemented!()
    }

    /// A GEGLU projection, rows `[values; gates]` in the file, as interleaved rows value 0, gate 0, value 1, ...
    pub fn geglu(&self, _name: &str, _n: usize, _columns: Option<usize>) -> Result<Tensor> {
        unimplemented!()
    }
}
