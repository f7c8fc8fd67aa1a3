//! What of a model is in memory when: the ladder from the fastest way to the one that needs least.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::ModelSource;
use super::upscale::UpscaleOptions;
use crate::models::{Partition, WeightFormat};
use crate::names::named;
use crate::runtime::{DType, Device, MetaDevice};

/// How a model is loaded.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    pub device: Device,
    /// Where text encoders are: what they say of the prompts is copied to `device`. `None`: there as well.
    pub text_device: Option<Device>,
    /// Of weights and activations.
    pub dtype: DType,
    /// How the denoiser's large linear layers hold their weights.
    pub weights: WeightFormat,
    /// Of the VAE. `None`: as `dtype`, but bf16 in place of f16 for models whose VAE leaves the range of f16
    /// (`force_upcast`).
    pub vae_dtype: Option<DType>,
    pub memory: MemoryOptions,
    /// A network that enlarges every finished picture. It stays in memory.
    pub upscale: Option<UpscaleOptions>,
    /// ControlNets beside the denoiser: directories in the layout of diffusers, or single files. Each run has a picture for each.
    pub controls: Vec<PathBuf>,
    /// Are the text encoders loaded? Without them prompts are encoded elsewhere: a second stage of DeepFloyd IF reads what the
    /// first one's say.
    pub reads_prompts: bool,
    /// A second model that enlarges what this one makes: a second stage of DeepFloyd IF. It is loaded with the same options.
    pub second: Option<ModelSource>,
}

impl LoadOptions {
    /// Everything else is decided by what there is.
    pub fn new(device: Device, dtype: DType) -> LoadOptions {
        let (weights, memory) = (WeightFormat::Plain, MemoryOptions::default());
        let (controls, reads_prompts) = (Vec::new(), true);
        let (text_device, vae_dtype, upscale, second) = (None, None, None, None);
        LoadOptions { device, text_device, dtype, weights, vae_dtype, memory, upscale, controls, reads_prompts, second }
    }

    /// Where text encoders are.
    pub fn text_device(&self) -> &Device {
        self.text_device.as_ref().unwrap_or(&self.device)
    }

    /// The same with everything on a meta device; text encoders that are elsewhere are on another one, whose memory nobody counts.
    pub(super) fn on_meta(&self, meta: &MetaDevice) -> LoadOptions {
        let text_device = self.text_elsewhere().map(|_| Device::meta());
        LoadOptions { device: Device::Meta(meta.clone()), text_device, ..self.clone() }
    }
}

impl LoadOptions {
    /// Where the text encoders are, where that is another place than the network's.
    pub(super) fn text_elsewhere(&self) -> Option<&Device> {
        self.text_device.as_ref().filter(|device| !device.same(&self.device))
    }

    /// What of these decides a picture beside the device and the dtype, where it is not the default: name and value, as in a
    /// picture's JSON.
    pub fn named(&self) -> Vec<(&'static str, &'static str)> {
        let dtype = self.vae_dtype.map(|dtype| ("vae_dtype", dtype.name()));
        let tiles = (self.memory.vae == VaePartition::Tiles).then_some(("vae_partition", VaePartition::Tiles.name()));
        let weights = (self.weights != WeightFormat::Plain).then_some(("weights", self.weights.name()));
        let text = self.text_elsewhere().map(|device| match device {
            Device::Cpu(_) => ("text_encoder_device", "cpu"),
            Device::Cuda(_) => ("text_encoder_device", "cuda"),
            Device::Meta(_) => ("text_encoder_device", "meta"),
        });
        weights.into_iter().chain(dtype).chain(tiles).chain(text).collect()
    }
}

/// What may be done to fit a run into memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryOptions {
    pub residency: Residency,
    pub vae: VaePartition,
}

/// Which parts of a model stay in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Residency {
    /// All of them, where a run fits; else as `Low`.
    #[default]
    Auto,
    /// All of them, always.
    Keep,
    /// Each part is loaded when a run first needs it; text encoders leave memory once the prompts are encoded.
    Low,
}
named!(Residency, [Auto => "auto", Keep => "keep", Low => "low"]);

/// How the VAE decodes and encodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum VaePartition {
    /// Whole; by stripes where that does not fit.
    #[default]
    Auto,
    Whole,
    /// By horizontal stripes, with the norms' statistics of the whole map: the same picture.
    Stripes,
    /// By tiles with a cross-fade, each with statistics of its own: nearly the same picture.
    Tiles,
}
named!(VaePartition, [Auto => "auto", Whole => "whole", Stripes => "stripes", Tiles => "tiles"]);

/// What a module of a model is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Encodes prompts.
    Text,
    /// Denoises.
    Network,
    /// Is between samples and pictures.
    Vae,
}

impl Role {
    /// In the order of a run.
    pub const ALL: [Role; 3] = [Role::Text, Role::Network, Role::Vae];
}

/// A rung of the ladder: how a run holds the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rung {
    /// Do text encoders stay in memory once the prompts are encoded?
    pub keeps_text: bool,
    /// Does the network stay in memory while the VAE works?
    pub keeps_network: bool,
    pub partition: Partition,
}

/// Tiles of the side that Stable Diffusion 1.x was trained at, with diffusers' overlap of a quarter.
const TILES: Partition = Partition::Tiles { side: 512, overlap: 128 };

/// Rows of a picture in a stripe, the faster one first.
const STRIPE_ROWS: [usize; 2] = [128, 32];

impl MemoryOptions {
    /// From the fastest way to the one that needs least memory; at least one rung.
    pub fn ladder(self) -> Vec<Rung> {
        let held: &[(bool, bool)] = match self.residency {
            Residency::Auto => &[(true, true), (false, true), (false, false)],
            Residency::Keep => &[(true, true)],
            Residency::Low => &[(false, true), (false, false)],
        };
        let stripes = STRIPE_ROWS.map(|rows| Partition::Stripes { rows });
        let (first, further): (Partition, &[Partition]) = match self.vae {
            VaePartition::Auto => (Partition::Whole, &stripes),
            VaePartition::Whole => (Partition::Whole, &[]),
            VaePartition::Stripes => (stripes[0], &stripes[1..]),
            VaePartition::Tiles => (TILES, &[]),
        };
        let rung =
            |&(keeps_text, keeps_network): &(bool, bool), partition| Rung { keeps_text, keeps_network, partition };
        let last = &held[held.len() - 1];
        held.iter()
            .map(|held| rung(held, first))
            .chain(further.iter().map(|&partition| rung(last, partition)))
            .collect()
    }
}

impl Rung {
    /// Everything stays in memory and the VAE works on whole pictures.
    pub const FASTEST: Rung = Rung { keeps_text: true, keeps_network: true, partition: Partition::Whole };

    /// The same as JSON.
    pub fn to_json(self) -> Value {
        json!({
            "keeps_text_encoders": self.keeps_text, "keeps_denoiser": self.keeps_network, "vae": partition_text(self.partition),
        })
    }

    /// What is given up on this rung beside `before`, as the end of a sentence.
    pub fn beyond(self, before: Rung) -> String {
        let mut given_up = Vec::new();
        if before.keeps_text && !self.keeps_text {
            given_up.push("text encoders leave memory once the prompts are encoded".to_string());
        }
        if before.keeps_network && !self.keeps_network {
            given_up.push("the denoiser leaves memory while the VAE works".to_string());
        }
        if before.partition != self.partition {
            given_up.push(match self.partition {
                Partition::Stripes { rows } => {
                    format!("the VAE works by stripes of {rows} rows, which gives the same picture")
                }
                Partition::Tiles { .. } => "the VAE works by tiles".to_string(),
                Partition::Whole => "the VAE works on whole pictures".to_string(),
            });
        }
        given_up.join("; ")
    }
}

fn partition_text(partition: Partition) -> String {
    match partition {
        Partition::Whole => "whole".into(),
        Partition::Stripes { rows } => format!("stripes of {rows} rows"),
        Partition::Tiles { side, overlap } => format!("tiles of {side} pixels that overlap by {overlap}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_rung_gives_up_one_thing_more() {
        let ladder = MemoryOptions::default().ladder();
        assert_eq!(ladder[0], Rung::FASTEST);
        let said: Vec<String> = ladder.windows(2).map(|pair| pair[1].beyond(pair[0])).collect();
        assert_eq!(
            said,
            [
                "text encoders leave memory once the prompts are encoded",
                "the denoiser leaves memory while the VAE works",
                "the VAE works by stripes of 128 rows, which gives the same picture",
                "the VAE works by stripes of 32 rows, which gives the same picture",
            ]
        );
    }

    #[test]
    fn what_is_asked_for_is_on_every_rung() {
        let of = |residency, vae| MemoryOptions { residency, vae }.ladder();
        assert_eq!(of(Residency::Keep, VaePartition::Whole).len(), 1);
        assert!(of(Residency::Keep, VaePartition::Auto).iter().all(|rung| rung.keeps_text && rung.keeps_network));
        assert!(of(Residency::Low, VaePartition::Auto).iter().all(|rung| !rung.keeps_text));
        assert!(of(Residency::Auto, VaePartition::Tiles).iter().all(|rung| rung.partition == TILES));
        for rung in of(Residency::Auto, VaePartition::Stripes) {
            assert!(matches!(rung.partition, Partition::Stripes { .. }));
        }
    }
}
