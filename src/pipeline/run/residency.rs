//! Which parts of a pipeline are in memory: the rung of the ladder that a run is on, and what leaves where there is no room.

use super::Pipeline;
use crate::error::{Error, Result};
use crate::methods::Observer;
use crate::pipeline::memory::{Residency, Role, Rung};
use crate::pipeline::resident::Module;
use crate::pipeline::{ModelFiles, Request};
use crate::runtime::{Device, bytes_text};

/// Memory that a run needs on a rung.
#[derive(Clone, Copy, Debug)]
pub(super) struct Need {
    /// The modules' weights included.
    peak_bytes: u64,
    /// Beside the weights.
    beside_weights_bytes: u64,
}

impl Pipeline {
    /// Brings the parts into memory as far as they shall be there before a run; what was odd, a sentence each.
    pub(super) fn load_parts(&self, files: &ModelFiles) -> Result<Vec<String>> {
        let mut warnings = Vec::new();
        let modules = self.modules();
        let load = || modules.iter().try_for_each(|module| module.load());
        match self.options.memory.residency {
            Residency::Low => {}
            Residency::Keep => load()?,
            Residency::Auto => match load() {
                Err(Error::OutOfMemory { .. }) => {
                    self.release_all();
                    let message = "the parts of the model do not fit into memory together: each is loaded when needed";
                    warnings.push(message.into());
                }
                loaded => loaded?,
            },
        }
        warnings.extend(files.warnings(self.weights())?);
        Ok(warnings)
    }

    /// How the model may be held in memory, the fastest way first.
    pub(in crate::pipeline) fn ladder(&self) -> &[Rung] {
        &self.ladder
    }

    /// Bytes of the modules that are in memory, of the device's own.
    pub(in crate::pipeline) fn resident_bytes(&self) -> u64 {
        let of_device = |module: &dyn Module| module.role() != Role::Text || self.options.text_elsewhere().is_none();
        let modules = self.modules().into_iter().zip(self.weights());
        let loaded = modules.filter(|(module, _)| module.is_loaded() && of_device(*module));
        let upscaler = self.upscaler.as_ref().map_or(0, |upscaler| upscaler.weights().bytes);
        let second = self.second().map_or(0, Pipeline::resident_bytes);
        loaded.map(|(_, weights)| weights.bytes).sum::<u64>() + upscaler + second
    }

    /// Takes modules out of memory, with what was recorded of the network; was one of them there?
    pub(super) fn release(&self, role: Role) -> bool {
        if role == Role::Network {
            self.recorded.clear(); // graphs hold the weights
        }
        *self.reserved.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = None;
        let of_role = self.modules().into_iter().filter(|module| module.role() == role);
        of_role.filter(|module| module.release()).count() > 0
    }

    /// Nothing of the model itself is in memory any more; was something?
    pub(super) fn release_own(&self) -> bool {
        Role::ALL.into_iter().filter(|&role| self.release(role)).count() > 0
    }

    /// The same of the second model, too.
    pub(in crate::pipeline) fn release_all(&self) -> bool {
        self.release_own() | self.second().is_some_and(Pipeline::release_all)
    }

    /// Loads the modules of a role; where there is no memory for them, those of the others and of the second model leave it first.
    pub(super) fn bring(&self, role: Role, warn: &mut dyn FnMut(&str)) -> Result<()> {
        self.bring_for(role, &|| self.second().is_some_and(Pipeline::release_all), warn)
    }

    /// The same, where `leave` also takes what it can out of memory; did it?
    pub(super) fn bring_for(&self, role: Role, leave: &dyn Fn() -> bool, warn: &mut dyn FnMut(&str)) -> Result<()> {
        let load = || self.modules().iter().filter(|module| module.role() == role).try_for_each(|m| m.load());
        match load() {
            Err(error @ Error::OutOfMemory { .. }) => {
                let others = Role::ALL.into_iter().filter(|&other| other != role);
                let left = others.filter(|&other| self.release(other)).count() > 0;
                if !(left | leave()) {
                    return Err(error);
                }
                warn(&format!("{error}; other parts leave memory"));
                load()
            }
            loaded => loaded,
        }
    }

    /// The first rung on which a batch fits into what memory there is, else the last; and what the batch needs there beside
    /// the weights.
    pub(super) fn choose_rung(
        &self,
        request: &Request,
        images: usize,
        observer: &mut dyn Observer,
    ) -> Result<(usize, u64)> {
        let Some(planner) = &self.planner else { return Ok((0, 0)) };
        let budget = self.options.device.budget_bytes();
        let request = Request { count: images, batch: images, ..request.without_words() };
        let mut planned = self.planned.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        planned.take_if(|(last, _)| *last != request);
        let (_, needs) = planned.get_or_insert_with(|| (request.clone(), Vec::new()));
        let mut chosen = self.ladder.len() - 1;
        for rung in 0..self.ladder.len() {
            if needs.len() == rung {
                let plan = planner.plan_on(rung, &request)?;
                needs.push(Need { peak_bytes: plan.peak_bytes, beside_weights_bytes: plan.beside_weights_bytes() });
            }
            if budget.is_none_or(|budget| needs[rung].peak_bytes <= budget) {
                chosen = rung;
                break;
            }
        }
        let mut told = self.told.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if *told != chosen && chosen > 0 {
            let (need, budget) = (bytes_text(needs[0].peak_bytes), bytes_text(budget.unwrap_or_default()));
            let given_up = self.ladder[chosen].beyond(self.ladder[0]);
            observer.warning(&format!("this takes {need} and there are {budget}: {given_up}"));
        }
        *told = chosen;
        Ok((chosen, needs[chosen].beside_weights_bytes))
    }

    /// On a card, memory for all that a run holds beside the weights, in one piece: nothing is asked of the driver while
    /// steps run, and what does not fit fails before the first of them.
    pub(super) fn reserve(&self, request: &Request, images: usize, (rung, bytes): (usize, u64)) -> Result<()> {
        let Device::Cuda(card) = &self.options.device else { return Ok(()) };
        let mut reserved = self.reserved.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let of = Some((Request { count: images, batch: images, ..request.without_words() }, rung));
        // What the batch before took is there still: kept by its steps, or free.
        if *reserved == of && rung == 0 {
            return Ok(());
        }
        *reserved = None;
        match card.reserve(bytes) {
            // The steps of other requests may hold what this one needs.
            Err(Error::OutOfMemory { .. }) if self.recorded.clear() > 0 => card.reserve(bytes)?,
            done => done?,
        }
        *reserved = of;
        Ok(())
    }
}
