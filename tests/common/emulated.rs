//! What the emulated card's library offers to tests: driver.h declares it.
#![allow(dead_code)] // each test binary uses a part

use megafuse::runtime::cuda;

pub struct Emulated(libloading::Library);

impl Emulated {
    /// From now on it is the process's driver.
    pub fn open() -> Emulated {
        let path = cuda::emulated_library().unwrap();
        cuda::use_library(&path).unwrap();
        // SAFETY: it is loaded already.
        Emulated(unsafe { libloading::Library::new(&path) }.unwrap())
    }

    pub fn call<R>(&self, name: &str) -> R {
        // SAFETY: driver.h declares these without parameters.
        unsafe { self.0.get::<unsafe extern "C" fn() -> R>(name.as_bytes()).unwrap()() }
    }

    pub fn set(&self, name: &str, value: u64) {
        // SAFETY: driver.h declares these with one 64-bit parameter.
        unsafe { self.0.get::<unsafe extern "C" fn(u64)>(name.as_bytes()).unwrap()(value) }
    }
}
