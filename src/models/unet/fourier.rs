use std::collections::BTreeSet;
use std::sync::Arc;

use super::{ConvPlace, ConvRole, UnetBlock, UnetConfig};
use crate::error::{Error, Result};
use crate::models::layers::{MapFilter, Redilation};

/// Convolutions that see a larger map as they saw the trained one: dilated, and before that low-pass filtered. FouriScale (Huang et
/// al., ECCV 2024, arXiv:2403.12963). Clones share the places.
///
/// Of a call with [`twins`](super::UnetCall::twins) these have a gentler filter, and a dilation of their own.
#[derive(Clone, Debug, PartialEq)]
pub struct FourierConvs {
    /// Upsamplers among them are dilated and not filtered.
    pub places: Arc<BTreeSet<ConvPlace>>,
    /// How many times the trained reach; the dilation is this, rounded up. Above 1, at most [`Redilation::MOST`].
    pub factor: f64,
    /// What the twins' dilation is rounded up from, 1 or more.
    pub twin_factor: f64,
    /// What passes of the highest frequencies, 0 to 1.
    pub floor: f64,
    /// Height and width of the samples that the network was trained on.
    pub base: [usize; 2],
}

impl FourierConvs {
    /// Dilations of the samples and of the twins.
    pub(super) fn dilations(&self) -> [usize; 2] {
        [self.factor, self.twin_factor].map(|factor| factor.ceil() as usize)
    }

    /// What goes before the convolution at this place of a network of `levels` levels.
    pub(super) fn filter(&self, place: ConvPlace, levels: usize) -> Option<MapFilter> {
        let halved = match (place.block, place.role) {
            (UnetBlock::Up(_), ConvRole::Sampler) => return None,
            (UnetBlock::Down(level), _) => level,
            (UnetBlock::Mid, _) => levels - 1,
            (UnetBlock::Up(i), _) => levels - 1 - i,
        };
        let base = self.base.map(|side| (0..halved).fold(side, |side, _| side.div_ceil(2)));
        Some(MapFilter { base, floor: self.floor })
    }

    /// # Errors
    /// [`Error::Argument`]: what the network has no place for, a number out of its range.
    pub(super) fn check(&self, config: &UnetConfig) -> Result<()> {
        let refuse = |got: String, want: &str| Err(Error::argument("unet", "fourier", got, want));
        let places = config.convolutions();
        for place in self.places.iter() {
            if !places.contains(place) {
                return refuse(place.to_string(), "convolutions of the network's blocks");
            }
            if place.is_downsampler() && config.downsample_padding == 0 {
                return refuse(place.to_string(), ConvPlace::ONE_SIDED);
            }
        }
        for factor in [self.factor, self.twin_factor] {
            if !(1.0..=Redilation::MOST).contains(&factor) {
                return refuse(format!("factor {factor}"), &format!("1 to {}", Redilation::MOST));
            }
        }
        if !(0.0..=1.0).contains(&self.floor) {
            return refuse(format!("floor {}", self.floor), "0 to 1");
        }
        if self.base.contains(&0) {
            return refuse(format!("base {:?}", self.base), "sides of at least 1");
        }
        Ok(())
    }
}
