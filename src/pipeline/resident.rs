//! Modules of a model that come into memory when they are needed and can leave it again.

use std::sync::{Arc, Mutex, MutexGuard};

use super::memory::Role;
use crate::error::Result;

/// A module of a model. Its files stay mapped, so it can leave memory and come back.
pub(super) struct Resident<T> {
    role: Role,
    loaded: Mutex<Option<Arc<T>>>,
    load: Box<Load<T>>,
}

type Load<T> = dyn Fn() -> Result<T> + Send + Sync;

impl<T> Resident<T> {
    /// Not in memory yet; `load` brings it there.
    pub fn new(role: Role, load: impl Fn() -> Result<T> + Send + Sync + 'static) -> Resident<T> {
        Resident { role, loaded: Mutex::new(None), load: Box::new(load) }
    }

    /// The module, loaded if it is not in memory.
    ///
    /// # Errors
    /// Those of loading.
    pub fn get(&self) -> Result<Arc<T>> {
        let mut loaded = self.loaded();
        if let Some(module) = &*loaded {
            return Ok(module.clone());
        }
        let module = Arc::new((self.load)()?);
        *loaded = Some(module.clone());
        Ok(module)
    }

    fn loaded(&self) -> MutexGuard<'_, Option<Arc<T>>> {
        // A panic while it is loaded leaves nothing behind: still usable.
        self.loaded.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// A [`Resident`] of any type.
pub(super) trait Module {
    fn role(&self) -> Role;

    fn is_loaded(&self) -> bool;

    /// # Errors
    /// Those of loading.
    fn load(&self) -> Result<()>;

    /// Takes it out of memory, once nobody uses it any more; was it there?
    fn release(&self) -> bool;
}

impl<T> Module for Resident<T> {
    fn role(&self) -> Role {
        self.role
    }

    fn is_loaded(&self) -> bool {
        self.loaded().is_some()
    }

    fn load(&self) -> Result<()> {
        self.get().map(drop)
    }

    fn release(&self) -> bool {
        self.loaded().take().is_some()
    }
}
