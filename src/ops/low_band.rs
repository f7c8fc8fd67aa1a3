use super::cuda::resize::SmoothingPasses;
use super::resize::{Filter, Image};
use super::{RelayNoise, Tensor, bytes_of, profile};
use crate::error::{Error, Result};
use crate::runtime::{DType, Device, OpKind, Work};

/// A filter of both axes that keeps the size.
#[derive(Clone, Copy, Debug)]
pub(super) enum Smoothing {
    /// Three taps of a Gaussian, the picture mirrored about its border pixels.
    Blur { sigma: f32 },
    /// What the low band of one level of db4 holds of the picture, mirrored about its border pixels, which are repeated.
    LowBand,
}

impl Smoothing {
    fn filter(self, length: usize) -> Filter {
        match self {
            Smoothing::Blur { sigma } => Filter::gaussian(1, f64::from(sigma), length),
            Smoothing::LowBand => Filter::low_band(length),
        }
    }

    fn taps(self) -> usize {
        match self {
            Smoothing::Blur { .. } => 3,
            Smoothing::LowBand => 14,
        }
    }
}

/// `2 x - blur(x)`, the blur being a Gaussian of 3x3 taps and standard deviation `sigma`, in pixels, with the picture mirrored
/// about its border pixels. `x: [N, H, W, C]`, f32.
///
/// # Errors
/// [`Error::Argument`]: `sigma` is not above 0 or infinite; [`Error::Shape`], [`Error::Dtype`].
pub fn sharpen(x: &Tensor, sigma: f32) -> Result<Tensor> {
    const OP: &str = "sharpen";
    if !(sigma > 0.0 && sigma.is_finite()) {
        return Err(Error::argument(OP, "sigma", sigma, "a number of pixels above 0"));
    }
    smoothed(OP, x, Smoothing::Blur { sigma }, RelayNoise { noise: x, signal: -1.0, sigma: 2.0 })
}

/// `x` with the low band of `guide` in place of its own: one level of a two-dimensional discrete wavelet transform by db4
/// (Daubechies 1988, doi:10.1002/cpa.3160410705) with symmetric borders, the approximation exchanged, transformed back. The
/// transform is linear and loses nothing, so this is `x` and what the low band holds of `guide - x`. Both `[N, H, W, C]`, f32.
///
/// # Errors
/// [`Error::Shape`], [`Error::Dtype`], [`Error::Device`]: which argument.
pub fn exchange_low_band(x: &Tensor, guide: &Tensor) -> Result<Tensor> {
    const OP: &str = "exchange_low_band";
    x.dims::<4>(OP, "x")?;
    x.expect(OP, "x", x.shape(), DType::F32, x.device())?;
    guide.expect(OP, "guide", x.shape(), DType::F32, x.device())?;
    let difference = super::add_scaled(guide, x, -1.0)?;
    smoothed(OP, &difference, Smoothing::LowBand, RelayNoise { noise: x, signal: 1.0, sigma: 1.0 })
}

/// `signal * smoothed x + sigma * noise`, as `added` has them.
fn smoothed(op: &'static str, x: &Tensor, smoothing: Smoothing, added: RelayNoise) -> Result<Tensor> {
    let [_, h, w, c] = x.dims(op, "x")?;
    x.expect(op, "x", x.shape(), DType::F32, x.device())?;
    if h == 0 || w == 0 || c == 0 {
        return Err(Error::shape(op, "x", x, "a height, a width and channels"));
    }

    let mut y = Tensor::uninit(x.device(), x.shape(), DType::F32)?;
    let _timed = profile::scope(op, y.shape());
    match x.device() {
        Device::Meta(meta) => {
            let _passes = SmoothingPasses::uninit(x, smoothing)?;
            let flops = (4 * smoothing.taps() + 3) as u64 * y.numel() as u64;
            let read = if std::ptr::eq(x, added.noise) { None } else { Some(added.noise) };
            let bytes = bytes_of(&[Some(x), read, Some(&y)]);
            meta.record(
                op,
                OpKind::Resize,
                y.shape(),
                Work { macs: 0, flops, bytes, launches: SmoothingPasses::LAUNCHES },
            );
        }
        Device::Cpu(_) | Device::Cuda(_) if y.numel() == 0 => {}
        Device::Cpu(_) => smoothed_cpu(x, smoothing, added, &mut y),
        Device::Cuda(card) => SmoothingPasses::uninit(x, smoothing)?.launch(card, x, added, &mut y)?,
    }
    Ok(y)
}

fn smoothed_cpu(x: &Tensor, smoothing: Smoothing, RelayNoise { noise, signal, sigma }: RelayNoise, y: &mut Tensor) {
    let &[_, h, w, c] = x.shape() else { unreachable!("checked") };
    let [rows, columns] = [h, w].map(|length| smoothing.filter(length));
    let per_image = h * w * c;
    let of_images = y.cpu_mut::<f32>().chunks_exact_mut(per_image).zip(x.cpu::<f32>().chunks_exact(per_image));
    for ((y, x), noise) in of_images.zip(noise.cpu::<f32>().chunks_exact(per_image)) {
        let image = Image { values: x.to_vec(), h, w, c };
        let image = image.horizontal(&columns, |sum| sum as f32).vertical(&rows, |sum| sum as f32);
        y.iter_mut().zip(&image.values).zip(noise).for_each(|((y, value), noise)| *y = signal * value + sigma * noise);
    }
}
