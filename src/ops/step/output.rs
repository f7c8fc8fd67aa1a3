use super::Guidance;
use crate::error::{Error, Result};
use crate::ops::float;
use crate::runtime::{DType, Device, Element, Tensor};

/// What an evaluation left: the network's output, guided where it is read.
pub(in crate::ops) struct Output<'a> {
    /// `[N, H, W, C]`, or `[N, H, W, 2C]` of a network that also predicts the variance: of each pixel C values of the output,
    /// then C of the variance. With guidance 2N, unconditional rows first.
    pub values: &'a Tensor,
    pub guidance: Option<&'a Guidance>,
    /// `[N]`, f32: what the guided output is multiplied by, where any image rescales.
    pub factors: Option<&'a Tensor>,
    /// The variance's of a pixel: C, or 0 where the network predicts none.
    pub variance_channels: usize,
}

impl<'a> Output<'a> {
    /// Of samples `[N, H, W, C]` on `device`, not rescaled yet. `learns`: the variance is read, so it has to be there.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Dtype`], [`Error::Device`]: `model_output` or `guidance`.
    pub fn new(
        op: &'static str,
        values: &'a Tensor,
        guidance: Option<&'a Guidance>,
        [n, h, w, c]: [usize; 4],
        learns: bool,
        device: &Device,
    ) -> Result<Output<'a>> {
        const ARG: &str = "model_output";
        float(op, ARG, values)?;
        let rows = if guidance.is_some() { 2 * n } else { n };
        let wide = [rows, h, w, 2 * c];
        let channels = match values.shape() == wide {
            true => 2 * c,
            false if learns => {
                return Err(Error::shape(op, ARG, values, format!("{wide:?}, the second half the predicted variance")));
            }
            false if values.shape() != [rows, h, w, c] => {
                let want = format!("{:?}, or {wide:?} with a predicted variance", [rows, h, w, c]);
                return Err(Error::shape(op, ARG, values, want));
            }
            false => c,
        };
        values.expect(op, ARG, &[rows, h, w, channels], values.dtype(), device)?;
        if let Some(guidance) = guidance {
            guidance.tensor().expect(op, "guidance", &[n, 2], DType::F32, device)?;
        }
        Ok(Output { values, guidance, factors: None, variance_channels: channels - c })
    }

    /// The values of the samples that it is for.
    pub fn count(&self) -> usize {
        let halves = if self.guidance.is_some() { 2 } else { 1 };
        self.values.numel() / if self.variance_channels == 0 { halves } else { 2 * halves }
    }
}

/// The output on the host, guided.
pub(in crate::ops) struct CpuOutput<'a, T> {
    uncond: &'a [T],
    /// The other half, and scale and rescale per image.
    guided: Option<(&'a [T], &'a [f32])>,
    factors: Option<&'a [f32]>,
    variance_channels: usize,
}

impl<'a, T: Element> CpuOutput<'a, T> {
    pub fn new(output: &Output<'a>) -> CpuOutput<'a, T> {
        let values = output.values.cpu::<T>();
        let (uncond, guided) = match output.guidance {
            None => (values, None),
            Some(guidance) => {
                let (uncond, cond) = values.split_at(values.len() / 2);
                (uncond, Some((cond, guidance.tensor().cpu())))
            }
        };
        let factors = output.factors.map(|factors| factors.cpu());
        CpuOutput { uncond, guided, factors, variance_channels: output.variance_channels }
    }

    /// For value `i` of the samples, which is of this image.
    pub fn at(&self, i: usize, image: usize) -> f32 {
        let place = self.place(i);
        let mut e = self.uncond[place].to_f32();
        if let Some((cond, scales)) = self.guided {
            e += scales[2 * image] * (cond[place].to_f32() - e);
        }
        if let Some(factors) = self.factors {
            e *= factors[image];
        }
        e
    }

    /// What the network says of the variance of value `i`, with its condition: the unconditional half is not read.
    pub fn variance(&self, i: usize) -> f32 {
        let values = self.guided.map_or(self.uncond, |(cond, _)| cond);
        values[self.place(i) + self.variance_channels].to_f32()
    }

    fn place(&self, i: usize) -> usize {
        place(i, self.variance_channels)
    }
}

/// Where the output of value `i` of the samples is: the pixels before it have a variance each.
pub(super) fn place(i: usize, variance_channels: usize) -> usize {
    match variance_channels {
        0 => i,
        channels => i + i / channels * channels,
    }
}
