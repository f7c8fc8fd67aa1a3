//! A run on the card whose memory ends at any point: an error each time, nothing leaks, and the next run on the same device
//! makes the picture. Needs the emulated card, which fails on demand; the tests take turns, since a fault has no address.

use std::path::Path;
use std::sync::{Mutex, MutexGuard};

use megafuse::methods::Method;
use megafuse::pipeline::{ModelSource, Picture, Pipeline, Request, Silent};
use megafuse::runtime::{CudaDevice, CudaOptions, cuda};
use megafuse::{DType, Device, Error, Result};

static TURN: Mutex<()> = Mutex::new(());

fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// What the emulated card's library offers to tests.
struct Emulated(libloading::Library);

impl Emulated {
    fn open() -> Emulated {
        let path = cuda::emulated_library().unwrap();
        cuda::use_library(&path).unwrap();
        // SAFETY: it is loaded already.
        Emulated(unsafe { libloading::Library::new(&path) }.unwrap())
    }

    fn call<R>(&self, name: &str) -> R {
        // SAFETY: driver.h declares these without parameters.
        unsafe { self.0.get::<unsafe extern "C" fn() -> R>(name.as_bytes()).unwrap()() }
    }

    fn set(&self, name: &str, value: u64) {
        // SAFETY: driver.h declares these with one 64-bit parameter.
        unsafe { self.0.get::<unsafe extern "C" fn(u64)>(name.as_bytes()).unwrap()(value) }
    }
}

fn request() -> Request {
    Request {
        prompt: "a photo of a cat".into(),
        method: Method::MegaFusionPlus,
        stages: vec!["16x16:3".parse().unwrap(), "18x16:1".parse().unwrap()],
        guidance: 2.0,
        ..Request::default()
    }
}

fn load(device: &CudaDevice) -> Result<Pipeline> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/sd15");
    Pipeline::load(ModelSource::Directory(folder), Device::Cuda(device.clone()), DType::BF16)
}

fn picture(pipeline: &Pipeline) -> Result<Picture> {
    Ok(pipeline.generate(&request(), &mut Silent)?.remove(0))
}

/// Loads and generates with the n-th allocation failing, for n from 1 until none fails any more.
fn fail_at_every_allocation(emulated: &Emulated, open: impl Fn() -> Result<CudaDevice>, stride: u64) -> u64 {
    let device = open().unwrap();
    let want = picture(&load(&device).unwrap()).unwrap();
    let mut nth = 1;
    loop {
        emulated.set("emu_fail_allocation", nth);
        let result = load(&device).and_then(|pipeline| picture(&pipeline));
        emulated.set("emu_fail_allocation", 0);
        match result {
            Ok(picture) => {
                assert_eq!(picture, want, "a fault that was not met, or made up for, changes nothing");
                if emulated.call::<u64>("emu_failed_allocations") == 0 {
                    break;
                }
            }
            Err(error @ (Error::OutOfMemory { .. } | Error::Driver { .. })) => {
                let text = error.to_string();
                assert!(text.contains("memory") && text.contains("cuda:0"), "{nth}: {text}");
                assert_eq!(device.memory().unwrap().in_use_bytes, 0, "{nth}: {text}");
            }
            Err(other) => panic!("allocation {nth}: {other}"),
        }
        nth += stride;
    }
    assert_eq!(picture(&load(&device).unwrap()).unwrap(), want, "the device goes on");
    nth
}
