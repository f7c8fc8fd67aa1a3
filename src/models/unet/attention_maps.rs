//! What cross-attention attends to, collected in one call of the UNet and put in the place of a share of it in later ones, whose
//! maps may have another size. FreCaS, Zhang et al. 2024, arXiv:2410.18410.
//! ```text
//! P_l  = mean over heads of softmax(Q K^T / sqrt(d))                       of every attn2, in the call that collects
//! M    = mean over levels of resize(mean over the level's layers of P_l)   to the largest level's map
//! attn = (1 - w) softmax(Q K^T / sqrt(d)) V + w resize(M) V                of every attn2, in calls that reuse
//! ```

use std::cell::RefCell;

use super::{Unet, UnetConfig};
use crate::error::{Error, Result};
use crate::ops;
use crate::runtime::{DType, Tensor};

/// What a call does with the maps of its cross-attentions to the text. Data alone.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AttentionMaps {
    /// Their mean over layers and levels is collected in [`AttentionMapMemory`].
    pub collect: bool,
    /// The share of cross-attention that goes by the maps of [`AttentionMapMemory`], 0 (none) to 1.
    pub reuse: f32,
    /// Maps of another size are resized along their tokens, as the published code does, in place of along rows and columns.
    pub flat: bool,
}

/// The maps that calls collect and reuse: `[rows, tokens, text tokens]`, f32, one row per row of the batch.
#[derive(Debug, Default)]
pub struct AttentionMapMemory {
    /// What calls reuse, by the levels' maps.
    levels: Vec<Level>,
    collected: RefCell<Option<Tensor>>,
    /// Of the call that is collecting, by the levels' maps.
    sums: RefCell<Vec<Sum>>,
}

#[derive(Debug)]
struct Level {
    map: [usize; 2],
    shares: Tensor,
}

#[derive(Debug)]
struct Sum {
    map: [usize; 2],
    layers: usize,
    shares: Tensor,
}

impl AttentionMapMemory {
    /// What the last call that collects found, `[rows, h, w, text tokens]`, f32, in memory that the next one writes.
    pub fn collected(&self) -> Option<Tensor> {
        self.collected.borrow().clone()
    }

    /// From now on calls reuse these maps, `[rows, h, w, text tokens]`, f32, resized to those of `levels`, height and width each
    /// ([`Unet::attention_levels`]). Levels that are there already keep their memory, which a recorded call reads.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Dtype`]: `maps`; [`Error::OutOfMemory`].
    pub fn reuse(&mut self, maps: &Tensor, levels: &[[usize; 2]], flat: bool) -> Result<()> {
        let [rows, h, w, keys] = maps.dims("attention maps", "maps")?;
        maps.expect("attention maps", "maps", &[rows, h, w, keys], DType::F32, maps.device())?;
        for &map in levels {
            let shares = resized(maps, map, flat)?.reshape(&[rows, map[0] * map[1], keys])?;
            match self.levels.iter_mut().find(|level| level.map == map) {
                Some(level) if level.shares.shape() == shares.shape() => level.shares.copy_from(&shares)?,
                // A map of the collected size is that tensor itself, which a later call writes.
                found => {
                    let shares = if shares.is_unshared() { shares } else { shares.duplicate()? };
                    let level = Level { map, shares };
                    match found {
                        Some(found) => *found = level,
                        None => self.levels.push(level),
                    }
                }
            }
        }
        Ok(())
    }

    /// A call begins.
    pub(super) fn begin(&self) {
        self.sums.borrow_mut().clear();
    }

    /// The maps of one layer: `q: [rows, tokens, heads, head_dim]`, the tokens being those of `map`.
    pub(super) fn add(&self, map: [usize; 2], q: &Tensor, kv: &Tensor) -> Result<()> {
        let mut sums = self.sums.borrow_mut();
        if let Some(sum) = sums.iter_mut().find(|sum| sum.map == map) {
            sum.layers += 1;
            return ops::attention_map(q, kv, &mut sum.shares, true);
        }
        let mut shares = Tensor::uninit(q.device(), &[q.shape()[0], q.shape()[1], kv.shape()[1]], DType::F32)?;
        ops::attention_map(q, kv, &mut shares, false)?;
        sums.push(Sum { map, layers: 1, shares });
        Ok(())
    }

    /// A call that collects is done: all levels have the same weight, and so have the layers of a level.
    pub(super) fn finish(&self, flat: bool) -> Result<()> {
        let sums = self.sums.take();
        let largest = sums.iter().map(|sum| sum.map).max_by_key(|[h, w]| h * w);
        let largest = largest.ok_or_else(|| Error::config("unet", "has no cross-attention, so no maps of it"))?;
        let mut mean: Option<Tensor> = None;
        for Sum { map: [h, w], layers, shares } in &sums {
            let weight = 1.0 / (layers * sums.len()) as f32;
            let level = ops::scale_cast(shares, weight, 0.0, DType::F32, 1)?;
            let level = resized(&level.reshape(&[shares.shape()[0], *h, *w, shares.shape()[2]])?, largest, flat)?;
            mean = Some(match mean {
                None => level,
                Some(mean) => ops::add(&mean, &level)?,
            });
        }
        let mut collected = self.collected.borrow_mut();
        match (&mut *collected, mean) {
            (Some(own), Some(mean)) if own.shape() == mean.shape() => own.copy_from(&mean),
            (own, mean) => {
                *own = mean;
                Ok(())
            }
        }
    }

    /// What the layers of a level reuse, `[rows, tokens, text tokens]`, f32.
    ///
    /// # Errors
    /// [`Error::Config`]: there is nothing for a level of this map.
    pub fn shares(&self, map: [usize; 2]) -> Result<&Tensor> {
        let level = self.levels.iter().find(|level| level.map == map);
        level.map(|level| &level.shares).ok_or_else(|| {
            let [h, w] = map;
            Error::config("unet", format!("there are no maps of attention for {h}x{w} tokens to reuse"))
        })
    }
}

/// `[rows, h, w, C]` to another size, bilinearly; `flat`: as if all tokens were one line.
fn resized(maps: &Tensor, to: [usize; 2], flat: bool) -> Result<Tensor> {
    let [rows, h, w, keys] = maps.dims("attention maps", "maps")?;
    match flat {
        false => ops::resize_bilinear(maps, to),
        true => {
            let line = ops::resize_bilinear(&maps.reshape(&[rows, h * w, 1, keys])?, [to[0] * to[1], 1])?;
            line.reshape(&[rows, to[0], to[1], keys])
        }
    }
}

impl Unet {
    /// Height and width of the maps on which there is cross-attention, for samples of this height and width, the largest first.
    pub fn attention_levels(&self, sample: [usize; 2]) -> Vec<[usize; 2]> {
        levels(self.config(), sample)
    }
}

fn levels(config: &UnetConfig, sample: [usize; 2]) -> Vec<[usize; 2]> {
    let padding = if config.downsample_padding == 0 { 1 } else { 2 * config.downsample_padding };
    let down = |side: usize| (side + padding).saturating_sub(3) / 2 + 1;
    let count = config.down_blocks.len();
    let mut map = sample;
    let mut all = Vec::new();
    for level in 0..count {
        let up = config.up_blocks.get(count - 1 - level);
        let mid = config.mid_block.as_ref().filter(|_| level + 1 == count);
        let attends = config.down_blocks[level].attention.is_some()
            || up.is_some_and(|block| block.attention.is_some())
            || mid.is_some_and(|block| block.attention.is_some());
        if attends {
            all.push(map);
        }
        map = map.map(down);
    }
    all
}
