//! The first half of a group norm, for a map that is never whole in memory: its statistics from stripes. The second half is a
//! convolution of a stripe with [`Stripe`](super::Stripe), which normalises its input by them.

use super::cpu::norm::{self, Moments, SourceRows};
use super::cuda::norm::{Form, Statistics};
use super::{ConvNorm, GroupNorm, Source, Tensor, by_dtype, bytes_of, profile};
use crate::error::{Error, Result};
use crate::runtime::cuda::CudaDevice;
use crate::runtime::{DType, Device, MetaDevice, OpKind, Work};

const OP: &str = "group_norm_statistics";

/// Mean and variance of every group of one image, for a [`Stripe`](super::Stripe) of it.
#[derive(Clone, Debug)]
pub struct GroupStatistics {
    channels: usize,
    groups: usize,
    dtype: DType,
    device: Device,
    values: Values,
}

#[derive(Clone, Debug)]
enum Values {
    /// Mean and 1 / sqrt(var + eps) of every group.
    Cpu(Vec<[f64; 2]>),
    /// The same, `[1, groups, 2]`, f32.
    Card(Tensor),
}

impl GroupStatistics {
    /// They are those of a map like the norm's input.
    pub(super) fn check(&self, op: &'static str, norm: &GroupNorm) -> Result<()> {
        let x = norm.x.first();
        let [_, _, _, channels] = norm.x.dims(op)?;
        let form = |channels: usize, groups: usize, dtype: DType, device: &Device| {
            format!("{channels} channels of {dtype} in {groups} groups on {device}")
        };
        if (channels, norm.groups, x.dtype()) != (self.channels, self.groups, self.dtype)
            || !x.device().same(&self.device)
        {
            let got = form(self.channels, self.groups, self.dtype, &self.device);
            return Err(Error::argument(op, "statistics", got, form(channels, norm.groups, x.dtype(), x.device())));
        }
        Ok(())
    }

    /// On the cpu; none elsewhere.
    pub(super) fn cpu(&self) -> Option<&[[f64; 2]]> {
        match &self.values {
            Values::Cpu(values) => Some(values),
            Values::Card(_) => None,
        }
    }

    /// On a card and the meta device; none on the cpu.
    pub(super) fn card(&self) -> Option<&Tensor> {
        match &self.values {
            Values::Cpu(_) => None,
            Values::Card(values) => Some(values),
        }
    }
}

/// Gathers the [`GroupStatistics`] of one image from its rows, as they come: the same bits as of the whole image at once,
/// wherever it is cut.
///
/// A device sums an image up in chunks of pixels that follow from its size. Pixels that do not fill a chunk wait in a buffer for
/// the next stripe.
#[derive(Debug)]
pub struct GroupMoments<'a> {
    norm: ConvNorm<'a>,
    /// Of the whole image: `[1, H, W, C]`.
    dims: [usize; 4],
    dtype: DType,
    device: Device,
    /// Pixels that the device sums up at once.
    chunk: usize,
    /// Pixels summed up.
    done: usize,
    /// `[chunk, C]`, from the first time that a stripe does not fill a chunk.
    buffer: Option<Tensor>,
    /// Pixels in the buffer.
    waiting: usize,
    sums: Sums,
}

/// What was summed up so far, where the image is.
#[derive(Debug)]
enum Sums {
    Meta(MetaDevice, Statistics),
    /// Of every group.
    Cpu(Vec<Moments>),
    Cuda(CudaDevice, Statistics),
}

impl<'a> GroupMoments<'a> {
    /// For an image `[1, H, W, C]` of `dims`, of gamma's dtype and device.
    ///
    /// # Errors
    /// [`Error::Shape`]: more than one image, none, or groups that do not divide C; as
    /// [`group_norm`](super::group_norm); [`Error::OutOfMemory`].
    pub fn new(norm: ConvNorm<'a>, dims: [usize; 4]) -> Result<GroupMoments<'a>> {
        let [n, h, w, c] = dims;
        let (dtype, device) = (norm.gamma.dtype(), norm.gamma.device().clone());
        if n != 1 || h * w * c == 0 {
            let want = "one image with pixels and channels".to_string();
            return Err(Error::Shape { op: OP, arg: "dims", got: dims.to_vec(), want });
        }
        norm.of(Source::One(&Tensor::uninit(&device, &[1, 0, w, c], dtype)?)).check(OP)?;
        let form = Form::of(&device, dims, norm.groups, dtype);
        let room = || Statistics::uninit(&device, &form);
        let (chunk, sums) = match &device {
            Device::Meta(meta) => (Statistics::chunk(&form), Sums::Meta(meta.clone(), room()?)),
            Device::Cpu(_) => (norm::block_rows(c, h * w), Sums::Cpu(vec![Moments::default(); norm.groups])),
            Device::Cuda(card) => (Statistics::chunk(&form), Sums::Cuda(card.clone(), room()?)),
        };
        Ok(GroupMoments { norm, dims, dtype, device, chunk, done: 0, buffer: None, waiting: 0, sums })
    }

    /// The next rows of the image, `[1, rows, W, C]`.
    ///
    /// # Errors
    /// [`Error::Shape`]: not of this image, or more rows than are left of it; [`Error::Dtype`], [`Error::Device`];
    /// [`Error::OutOfMemory`]; [`Error::Driver`].
    pub fn add(&mut self, x: &Tensor) -> Result<()> {
        let [_, h, w, c] = self.dims;
        let [_, rows, _, _] = x.dims(OP, "x")?;
        x.expect(OP, "x", &[1, rows, w, c], self.dtype, &self.device)?;
        let left = h - (self.done + self.waiting) / w;
        if rows > left {
            return Err(Error::shape(OP, "x", x, format!("at most the {left} rows that are left of {h}")));
        }
        let (pixels, x) = (rows * w, x.reshape(&[rows * w, c])?);
        let mut at = 0;
        while at < pixels {
            let (given, left) = (pixels - at, h * w - self.done);
            let chunk = self.chunk.min(left);
            if self.waiting == 0 && given >= chunk {
                // Whole chunks from where they lie; the last chunk of the image may be a short one.
                let count = if given == left { given } else { given / self.chunk * self.chunk };
                self.sum(&x.rows(at..at + count)?)?;
                at += count;
                continue;
            }
            let count = given.min(chunk - self.waiting);
            let mut buffer = match self.buffer.take() {
                Some(buffer) => buffer,
                None => Tensor::uninit(&self.device, &[self.chunk, c], self.dtype)?,
            };
            buffer.copy_rows_from(self.waiting, &x.rows(at..at + count)?)?;
            at += count;
            self.waiting += count;
            if self.waiting == chunk {
                self.waiting = 0;
                self.sum(&buffer.rows(0..chunk)?)?;
            }
            self.buffer = Some(buffer);
        }
        Ok(())
    }

    /// `x`: `[pixels, C]`, whole chunks, or the image's last.
    fn sum(&mut self, x: &Tensor) -> Result<()> {
        let &[pixels, c] = x.shape() else { unreachable!("pixels of channels") };
        let x = x.reshape(&[1, 1, pixels, c])?;
        let norm = self.norm.of(Source::One(&x));

        let _timed = profile::scope(OP, x.shape());
        match &mut self.sums {
            Sums::Meta(meta, _) => {
                let (flops, bytes) = (4 * x.numel() as u64, bytes_of(&[Some(&x)]));
                meta.record(OP, OpKind::Norm, x.shape(), Work { macs: 0, flops, bytes, launches: 1 });
            }
            Sums::Cpu(moments) => by_dtype!(self.dtype, T => {
                norm::add_moments(&SourceRows::<T>::new(&norm.x, [1, 1, pixels, c]), 0, pixels, self.chunk, moments);
            }),
            Sums::Cuda(card, statistics) => statistics.add(card, &norm, self.dims, self.done)?,
        }
        self.done += pixels;
        Ok(())
    }

    /// The statistics, once all rows were added.
    ///
    /// # Errors
    /// [`Error::Argument`]: rows are missing; [`Error::Driver`].
    pub fn finish(self) -> Result<GroupStatistics> {
        let [_, h, w, channels] = self.dims;
        let rows = (self.done + self.waiting) / w;
        if self.done != h * w {
            return Err(Error::argument(OP, "rows", rows, format!("all {h} rows of the image")));
        }
        let (groups, dtype, device) = (self.norm.groups, self.dtype, self.device);

        let _timed = profile::scope(OP, &[1, groups, 2]);
        let values = match self.sums {
            Sums::Meta(meta, statistics) => {
                let (bytes, launches) = (statistics.values.bytes(), statistics.finish_launches());
                if launches > 0 {
                    let work = Work { macs: 0, flops: 0, bytes, launches };
                    meta.record(OP, OpKind::Norm, statistics.values.shape(), work);
                }
                Values::Card(statistics.values)
            }
            Sums::Cpu(moments) => {
                Values::Cpu(moments.into_iter().map(|moments| moments.finished(self.norm.eps)).collect())
            }
            Sums::Cuda(card, mut statistics) => {
                statistics.finish(&card, self.norm.eps, self.dims)?;
                Values::Card(statistics.values)
            }
        };
        Ok(GroupStatistics { channels, groups, dtype, device, values })
    }
}
