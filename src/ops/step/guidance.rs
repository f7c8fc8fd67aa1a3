use super::output::{Output, place};
use super::per_image;
use crate::error::{Error, Result};
use crate::ops::{by_dtype, cuda, profile};
use crate::runtime::{DType, Device, Element, OpKind, Tensor, Work};

/// Classifier-free guidance of every image of a batch, on the device: recorded work reads what is there at its replay.
#[derive(Clone, Debug)]
pub struct Guidance {
    /// `[N, 2]`, f32: scale, rescale
    table: Tensor,
    rescales: bool,
}

/// Of one image.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GuidanceScale {
    /// e = e_uncond + scale (e_cond - e_uncond). Ho & Salimans 2022, arXiv:2207.12598.
    pub scale: f32,
    /// phi of Lin et al. 2023, arXiv:2305.08891, eqs. (15), (16): e becomes phi std(e_cond) / std(e) e + (1 - phi) e,
    /// with standard deviations over the image; 0 leaves e alone.
    pub rescale: f32,
}

impl Guidance {
    /// One per image of the batch.
    ///
    /// # Errors
    /// [`Error::Argument`]: a `rescale` outside 0 to 1; [`Error::OutOfMemory`].
    pub fn new(device: &Device, images: &[GuidanceScale]) -> Result<Guidance> {
        if let Some(bad) = images.iter().find(|image| !(0.0..=1.0).contains(&image.rescale)) {
            return Err(Error::argument("Guidance", "rescale", bad.rescale, "0 to 1"));
        }
        let values: Vec<f32> = images.iter().flat_map(|image| [image.scale, image.rescale]).collect();
        let table = Tensor::from_f32(device, &[images.len(), 2], DType::F32, &values)?;
        Ok(Guidance { table, rescales: images.iter().any(|image| image.rescale != 0.0) })
    }

    /// The same scale for `images`, without rescaling.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]
    pub fn uniform(device: &Device, images: usize, scale: f32) -> Result<Guidance> {
        Guidance::new(device, &vec![GuidanceScale { scale, rescale: 0.0 }; images])
    }

    /// Other images' guidance in the same place, where a recorded step reads it.
    ///
    /// # Errors
    /// [`Error::Shape`]: another number of images; [`Error::Argument`]: one rescales and the other does not;
    /// [`Error::Driver`].
    pub fn rewrite(&mut self, from: &Guidance) -> Result<()> {
        if self.rescales != from.rescales {
            return Err(Error::argument("Guidance", "rescale", from.rescales, "as it was recorded"));
        }
        self.table.copy_from(&from.table)
    }

    /// Does any image rescale?
    pub fn rescales(&self) -> bool {
        self.rescales
    }

    pub(in crate::ops) fn tensor(&self) -> &Tensor {
        &self.table
    }
}

/// `[N]`, f32: what the guided output of each image is multiplied by: arXiv:2305.08891, eqs. (15), (16). 1 for an image
/// that does not rescale. A predicted variance is not part of the output.
pub(in crate::ops) fn rescale_factors(output: &Output, guidance: &Guidance, n: usize) -> Result<Tensor> {
    const OP: &str = "guidance_rescale";
    let values = output.values;
    per_image(OP, values)?;
    let count = output.count() / n.max(1);

    let mut factors = Tensor::uninit(values.device(), &[n], DType::F32)?;
    let _timed = profile::scope(OP, factors.shape());
    match values.device() {
        Device::Meta(meta) => {
            let (flops, bytes) = (10 * (n * count) as u64, 2 * values.bytes() + factors.bytes());
            meta.record(OP, OpKind::Elementwise, factors.shape(), Work { macs: 0, flops, bytes, launches: 1 });
        }
        Device::Cpu(_) | Device::Cuda(_) if factors.numel() == 0 => {}
        Device::Cpu(_) => {
            by_dtype!(values.dtype(), T => rescale_factors_cpu::<T>(output, guidance, count, &mut factors))
        }
        Device::Cuda(card) => cuda::step::guidance_rescale(card, output, guidance, count, &mut factors)?,
    }
    Ok(factors)
}

fn rescale_factors_cpu<T: Element>(output: &Output, guidance: &Guidance, count: usize, factors: &mut Tensor) {
    let scales = guidance.tensor().cpu::<f32>();
    let (uncond, cond) = output.values.cpu::<T>().split_at(output.values.numel() / 2);
    for (image, factor) in factors.cpu_mut::<f32>().iter_mut().enumerate() {
        let (scale, rescale) = (scales[2 * image], scales[2 * image + 1]);
        let places = (image * count..(image + 1) * count).map(|i| place(i, output.variance_channels));
        let cond = || places.clone().map(|i| cond[i].to_f32());
        let guided = || {
            places.clone().zip(cond()).map(|(i, cond)| {
                let e = uncond[i].to_f32();
                e + scale * (cond - e)
            })
        };
        *factor = match rescale {
            0.0 => 1.0,
            _ => rescale * (deviation(cond) / deviation(guided)) + (1.0 - rescale),
        };
    }
}

/// Times the root of the count, which the ratio of two deviations does not see.
fn deviation<I: Iterator<Item = f32>>(values: impl Fn() -> I) -> f32 {
    let (sum, count) = values().fold((0.0, 0.0), |(sum, count), v| (sum + f64::from(v), count + 1.0));
    let mean = sum / count;
    values().map(|v| (f64::from(v) - mean).powi(2)).sum::<f64>().sqrt() as f32
}
