//! Pictures as prompts: a second set of keys and values in every cross-attention, beside the text's. IP-Adapter, Ye et al. 2023,
//! arXiv:2308.06721.
//! ```text
//! y = attn(q, K, V) + sum over prompts of scale M attn(q, K', V')          M: 1, or a mask over the map's tokens
//! ```

use std::cell::RefCell;
use std::sync::Arc;

use super::{BlockConfig, UnetConfig};
use crate::error::{Error, Result};
use crate::ops::{self, Upsampler};
use crate::runtime::Tensor;

/// A cross-attention beside a self-attention (`attn2`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CrossAttentionShape {
    pub channels: usize,
    pub heads: usize,
}

/// Those of a UNet, in the order of execution within each part.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CrossAttentions {
    down: Vec<CrossAttentionShape>,
    mid: Vec<CrossAttentionShape>,
    up: Vec<CrossAttentionShape>,
}

impl CrossAttentions {
    /// As files of IP-Adapters number them: the mid block's are the last.
    pub fn in_files(&self) -> Vec<CrossAttentionShape> {
        [&self.down[..], &self.up, &self.mid].concat()
    }

    /// In the order of execution, with the number in files.
    pub fn numbered_as_run(&self) -> Vec<(usize, CrossAttentionShape)> {
        let [down, mid, up] = [self.down.len(), self.mid.len(), self.up.len()];
        let numbers = (0..down).chain(down + up..down + up + mid).chain(down..down + up);
        numbers.zip([&self.down[..], &self.mid, &self.up].concat()).collect()
    }
}

impl UnetConfig {
    /// The cross-attentions that an image prompt has keys and values for.
    pub fn cross_attentions(&self) -> CrossAttentions {
        let of = |block: &BlockConfig| {
            let layers = |attention: &super::AttentionConfig| attention.layers[..block.resnets].iter().sum();
            let (count, heads) = block.attention.as_ref().map_or((0, 1), |a| (layers(a), a.heads));
            vec![CrossAttentionShape { channels: block.channels, heads }; count]
        };
        let deepest = self.block_out_channels[self.block_out_channels.len() - 1];
        let mid = self.mid_block.as_ref().and_then(|mid| mid.attention.as_ref());
        CrossAttentions {
            down: self.down_blocks.iter().flat_map(of).collect(),
            mid: mid.map_or(Vec::new(), |a| {
                vec![CrossAttentionShape { channels: deepest, heads: a.heads }; a.layers.first().copied().unwrap_or(0)]
            }),
            up: self.up_blocks.iter().flat_map(of).collect(),
        }
    }
}

/// Pictures that one adapter shows the network.
#[derive(Clone, Debug)]
pub struct ImagePrompt {
    /// One a cross-attention, in the order of execution: `[R, L, 2, heads, head_dim]`. R divides the samples of a batch, the
    /// unconditional rows first.
    pub kv: Vec<Tensor>,
    pub scale: f32,
}

impl ImagePrompt {
    /// For a batch that ends with the samples of the text's rows from `first` on once more, of `all`.
    pub(super) fn with_twins(&self, first: usize, all: usize) -> Result<ImagePrompt> {
        let again = |kv: &Tensor| {
            let rows = kv.shape()[0];
            Tensor::concat(&[kv.clone(), kv.rows(first * rows / all..rows)?])
        };
        Ok(ImagePrompt { kv: self.kv.iter().map(again).collect::<Result<_>>()?, scale: self.scale })
    }
}

/// Where on the map image prompts count: one for each of a conditioning's, or none.
#[derive(Debug, Default)]
pub struct ImageMasks {
    /// `[1, H, W, 1]`, f32, from 0 to 1, of any size.
    masks: Vec<Option<Tensor>>,
    /// What calls have read, by the sides of their maps: `[H W]` for each mask.
    levels: RefCell<Vec<Level>>,
}

#[derive(Debug)]
struct Level {
    map: [usize; 2],
    masks: Vec<Option<Arc<Tensor>>>,
}

impl ImageMasks {
    /// `masks`: one for each image prompt, `[1, H, W, 1]`, f32.
    pub fn new(masks: Vec<Option<Tensor>>) -> ImageMasks {
        ImageMasks { masks, levels: RefCell::default() }
    }

    /// Others, of the same prompts, in the memory that a recorded call reads.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape): `masks` are of other prompts; those of the ops.
    pub fn replace(&mut self, masks: Vec<Option<Tensor>>) -> Result<()> {
        self.masks = masks;
        for level in self.levels.get_mut() {
            for (own, mask) in level.masks.iter_mut().zip(&self.masks) {
                let (Some(own), Some(mask)) = (own, mask) else { continue };
                let resized = resized(mask, level.map)?;
                match Arc::get_mut(own) {
                    Some(own) => own.copy_from(&resized)?,
                    None => return Err(Error::config("unet", "a mask is replaced while a call reads it")),
                }
            }
        }
        Ok(())
    }

    /// That of a prompt for the tokens of `map`, `[H W]`, f32; computed when first asked for.
    ///
    /// # Errors
    /// Those of the ops.
    pub(super) fn of(&self, prompt: usize, map: [usize; 2]) -> Result<Option<Arc<Tensor>>> {
        if self.masks.get(prompt).is_none_or(Option::is_none) {
            return Ok(None);
        }
        let mut levels = self.levels.borrow_mut();
        let at = match levels.iter().position(|level| level.map == map) {
            Some(at) => at,
            None => {
                let of = |mask: &Option<Tensor>| mask.as_ref().map(|mask| resized(mask, map).map(Arc::new)).transpose();
                levels.push(Level { map, masks: self.masks.iter().map(of).collect::<Result<_>>()? });
                levels.len() - 1
            }
        };
        Ok(levels[at].masks[prompt].clone())
    }
}

/// `[1, H, W, 1]` to the tokens of a map, `[H W]`: bicubically as torch does, without a wider filter for smaller maps, as
/// diffusers has it. Values may leave 0 to 1 a little.
fn resized(mask: &Tensor, map: [usize; 2]) -> Result<Tensor> {
    let y = ops::resize(mask, map, Upsampler::BicubicTorch, None, None)?.reshape(&[map[0] * map[1]])?;
    // Of the map's own size it may be the mask itself.
    if y.is_unshared() { Ok(y) } else { y.duplicate() }
}
