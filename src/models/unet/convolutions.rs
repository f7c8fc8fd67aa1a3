use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use super::UnetConfig;
use crate::models::layers::Redilation;

/// A 3x3 convolution of the network's blocks, by its place; as text, the checkpoint's key without `.weight`. `conv_in`, `conv_out`
/// and the shortcuts are none of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConvPlace {
    pub block: UnetBlock,
    pub role: ConvRole,
}

impl ConvPlace {
    /// Why no downsampler of a network with a `downsample_padding` of 0 is dilated.
    pub(super) const ONE_SIDED: &str =
        "no downsampler: those of this network (downsample_padding 0) are padded at one side alone";

    pub(super) fn is_downsampler(self) -> bool {
        matches!(self.block, UnetBlock::Down(_)) && self.role == ConvRole::Sampler
    }
}

/// A block of the network: `down_blocks.2`, `mid_block`, `up_blocks.0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum UnetBlock {
    Down(usize),
    Mid,
    Up(usize),
}

/// What a convolution is in its block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ConvRole {
    /// The first one of the ResNet of this number.
    Conv1(usize),
    Conv2(usize),
    /// The down- or upsampler's.
    Sampler,
}

impl fmt::Display for UnetBlock {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            UnetBlock::Down(i) => write!(f, "down_blocks.{i}"),
            UnetBlock::Mid => f.write_str("mid_block"),
            UnetBlock::Up(i) => write!(f, "up_blocks.{i}"),
        }
    }
}

impl fmt::Display for ConvPlace {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let block = self.block;
        match (self.role, block) {
            (ConvRole::Conv1(i), _) => write!(f, "{block}.resnets.{i}.conv1"),
            (ConvRole::Conv2(i), _) => write!(f, "{block}.resnets.{i}.conv2"),
            (ConvRole::Sampler, UnetBlock::Up(_)) => write!(f, "{block}.upsamplers.0.conv"),
            (ConvRole::Sampler, _) => write!(f, "{block}.downsamplers.0.conv"),
        }
    }
}

/// Which convolutions are applied otherwise than they were trained, and how; clones share it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Redilations(Arc<BTreeMap<ConvPlace, Redilation>>);

impl Redilations {
    /// `None`: as it was trained.
    pub fn get(&self, place: ConvPlace) -> Option<Redilation> {
        self.0.get(&place).copied()
    }

    pub fn iter(&self) -> impl Iterator<Item = (ConvPlace, Redilation)> {
        self.0.iter().map(|(&place, &redilation)| (place, redilation))
    }
}

impl FromIterator<(ConvPlace, Redilation)> for Redilations {
    fn from_iter<I: IntoIterator<Item = (ConvPlace, Redilation)>>(items: I) -> Redilations {
        Redilations(Arc::new(items.into_iter().collect()))
    }
}

impl UnetConfig {
    /// The 3x3 convolutions of the blocks, in the order of execution, but for those of ResNets in the place of samplers.
    pub fn convolutions(&self) -> Vec<ConvPlace> {
        let resnets = |block, count: usize| {
            let both = move |i| [ConvRole::Conv1(i), ConvRole::Conv2(i)];
            (0..count).flat_map(both).map(move |role| ConvPlace { block, role })
        };
        let sampler = |block, has: bool| has.then_some(ConvPlace { block, role: ConvRole::Sampler });
        let mut places = Vec::new();
        for (i, block) in self.down_blocks.iter().enumerate() {
            places.extend(resnets(UnetBlock::Down(i), block.resnets));
            places.extend(sampler(UnetBlock::Down(i), block.pixel.is_none() && i + 1 < self.down_blocks.len()));
        }
        if let Some(mid) = &self.mid_block {
            places
                .extend(resnets(UnetBlock::Mid, if mid.attention.is_some() || mid.added_kv.is_some() { 2 } else { 1 }));
        }
        for (i, block) in self.up_blocks.iter().enumerate() {
            places.extend(resnets(UnetBlock::Up(i), block.resnets));
            places.extend(sampler(UnetBlock::Up(i), block.pixel.is_none() && i + 1 < self.up_blocks.len()));
        }
        places
    }
}
