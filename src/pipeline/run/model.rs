//! The model and the noise of a batch, as methods see them.

use std::cell::{Cell, RefCell};

use super::Pipeline;
use crate::error::{Error, Result};
use crate::methods::{Denoiser, DiffusionModel, NoiseSource, NoisedPicture, RecordedSteps, Size, StartPicture};
use crate::models::Partition;
use crate::pipeline::families::RunConditions;
use crate::pipeline::memory::Role;
use crate::pipeline::start::OnDevice;
use crate::pipeline::{ControlInput, Lowres};
use crate::rng::Rng;
use crate::runtime::{Device, Tensor};

/// The model with the prompts of a batch.
pub(super) struct Conditioned<'a> {
    pub pipeline: &'a Pipeline,
    pub images: usize,
    /// Shape of the prompts' embeddings, what tells image prompts apart, and of each ControlNet whether it sees all rows.
    pub conditioning_key: Vec<usize>,
    pub conditions: RefCell<Box<dyn RunConditions>>,
    /// Where on the pipeline's ladder the run is.
    pub rung: Cell<usize>,
    pub start: Option<OnDevice<'a>>,
    pub controls: &'a [ControlInput],
    /// Of every picture of the batch, where the network enlarges one.
    pub lowres: Vec<&'a Lowres>,
}

type VaeWork<'a> = dyn Fn(Partition, &mut dyn FnMut(&str)) -> Result<Tensor> + 'a;

impl Conditioned<'_> {
    /// What `work` does with the VAE, if need be further down the ladder.
    fn with_vae(&self, warn: &mut dyn FnMut(&str), work: &VaeWork) -> Result<Tensor> {
        let Pipeline { ladder, recorded, .. } = self.pipeline;
        loop {
            let rung = ladder[self.rung.get()];
            if !rung.keeps_network {
                self.pipeline.release(Role::Network);
            }
            let done = self.pipeline.bring(Role::Vae, warn).and_then(|()| work(rung.partition, warn));
            let Err(Error::OutOfMemory { .. }) = &done else { return done };
            if recorded.clear() > 0 {
                warn("the VAE finds no room: the recorded steps leave memory");
                continue;
            }
            let Some(&next) = ladder.get(self.rung.get() + 1) else { return done };
            warn(&format!("the VAE finds no room: {}", next.beyond(rung)));
            if !next.keeps_text {
                self.pipeline.release(Role::Text);
            }
            self.rung.set(self.rung.get() + 1);
        }
    }
}

impl DiffusionModel for Conditioned<'_> {
    fn device(&self) -> &Device {
        self.pipeline.device()
    }

    fn sample_shape(&self, size: Size) -> [usize; 4] {
        let space = self.pipeline.family.space();
        [self.images, size.height / space.factor(), size.width / space.factor(), space.channels()]
    }

    fn conditioning_key(&self) -> Vec<usize> {
        self.conditioning_key.clone()
    }

    fn begin_stage(
        &self,
        size: Size,
        timesteps: &[f32],
        reuse: Option<Box<dyn Denoiser>>,
    ) -> Result<Box<dyn Denoiser>> {
        // It may have left memory for a relay.
        self.pipeline.bring(Role::Network, &mut |_| {})?;
        self.conditions.borrow_mut().begin_stage(size, timesteps, reuse)
    }

    fn decode(&self, x0: &Tensor, warn: &mut dyn FnMut(&str)) -> Result<Tensor> {
        self.with_vae(warn, &|partition, warn| self.pipeline.family.space().decode(x0, partition, warn))
    }

    fn encode(&self, picture: &Tensor, noise: Option<&Tensor>, warn: &mut dyn FnMut(&str)) -> Result<Tensor> {
        self.with_vae(warn, &|partition, warn| self.pipeline.family.space().encode(picture, noise, partition, warn))
    }

    fn recorded_steps(&self) -> &RecordedSteps {
        &self.pipeline.recorded
    }

    fn start(&self) -> Option<&dyn StartPicture> {
        self.start.as_ref().map(|start| start as &dyn StartPicture)
    }

    fn control_pictures(&self, stage: usize, size: Size) -> Result<Vec<Tensor>> {
        self.controls.iter().map(|control| control.image.on(self.device(), stage, size)).collect()
    }

    fn lowres(&self, size: Size) -> Result<Option<NoisedPicture>> {
        match self.pipeline.family.lowres_noising() {
            Some(levels) => Lowres::noised(&self.lowres, levels, self.device(), size).map(Some),
            None => Ok(None),
        }
    }

    fn has_posterior(&self) -> bool {
        self.pipeline.family.space().has_posterior()
    }

    fn reads_mask(&self) -> bool {
        self.pipeline.family.reads_mask()
    }
}

/// The draws of a batch: every picture has its own generator.
pub(super) struct Noise<'a> {
    pub seeds: Vec<u64>,
    pub rngs: Vec<Rng>,
    pub device: &'a Device,
}

impl NoiseSource for Noise<'_> {
    fn seeds(&self) -> Vec<u64> {
        self.seeds.clone()
    }

    fn normal(&mut self, [_, h, w, c]: [usize; 4]) -> Result<Tensor> {
        let device = self.device;
        let parts: Vec<Tensor> =
            self.rngs.iter_mut().map(|rng| rng.normal_nhwc(device, [1, h, w, c])).collect::<Result<_>>()?;
        match &parts[..] {
            [one] => Ok(one.clone()),
            parts => Tensor::concat(parts),
        }
    }

    fn normal_into(&mut self, to: &mut Tensor) -> Result<()> {
        let shape = to.dims("normal_into", "to")?;
        match &mut self.rngs[..] {
            [rng] => rng.normal_nhwc_into(to),
            _ => to.copy_from(&self.normal(shape)?),
        }
    }
}
