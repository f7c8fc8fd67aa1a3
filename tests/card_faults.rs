//! A run on the card whose memory ends at any point: an error each time, nothing leaks, and the next run on the same device
//! makes the picture. Needs the emulated card, which fails on demand; the tests take turns, since a fault has no address.

#[path = "common/emulated.rs"]
mod emulated;

use std::path::Path;
use std::sync::{Mutex, MutexGuard};

use megafuse::methods::MegaFusion;
use megafuse::pipeline::{ModelSource, Picture, Pipeline, Request, Silent};
use megafuse::runtime::{CudaDevice, CudaOptions};
use megafuse::{DType, Device, Error, Result};

use emulated::Emulated;

static TURN: Mutex<()> = Mutex::new(());

fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn request() -> Request {
    Request {
        prompt: "a photo of a cat".into(),
        method: MegaFusion::plus().into(),
        // The steps of the first stage: launched, recorded, replayed.
        stages: vec!["8x8:3".parse().unwrap(), "10x8:1".parse().unwrap()],
        guidance: 1.0,
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

/// Loads and generates with the n-th allocation failing, for n from 1 in steps of `stride`, until a run has fewer.
fn fail_at_allocations(options: CudaOptions, stride: u64) {
    let emulated = Emulated::open();
    let device = CudaDevice::open(options).unwrap();
    let want = picture(&load(&device).unwrap()).unwrap();
    let reserved = device.memory().unwrap().reserved_bytes;
    let injected = || emulated.call::<u64>("emu_injected_failures");
    let mut nth = 1;
    loop {
        let before = injected();
        emulated.set("emu_fail_allocation", nth);
        let result = load(&device).and_then(|pipeline| picture(&pipeline));
        emulated.set("emu_fail_allocation", 0);
        match result {
            // A region that could not be had whole may be had in parts.
            Ok(picture) => assert_eq!(picture, want, "allocation {nth}"),
            Err(error @ (Error::OutOfMemory { .. } | Error::Driver { .. })) => {
                let text = error.to_string().to_lowercase();
                assert!(text.contains("out of memory") && text.contains("cuda:0"), "allocation {nth}: {error}");
            }
            Err(other) => panic!("allocation {nth}: {other}"),
        }
        assert_eq!(device.memory().unwrap().in_use_bytes, 0, "allocation {nth}: everything was given back");
        if injected() == before {
            break;
        }
        nth += stride;
    }
    println!("{} failures up to allocation {nth}, {options:?}", nth / stride);
    assert!(nth > 2, "a run allocates");
    assert_eq!(picture(&load(&device).unwrap()).unwrap(), want, "the device goes on");
    assert!(device.memory().unwrap().reserved_bytes <= reserved.max(64 << 20));
}

/// As a run is: regions, pinned memory, events, graphs.
#[test]
fn every_call_that_needs_memory_may_fail() {
    let _turn = turn();
    Emulated::open();
    // A new device each time would have its regions afresh; this one keeps them, so the first failures are the telling ones.
    fail_at_allocations(CudaOptions::default(), 1);
}

/// Every tensor by itself, those of the weights included. A prime stride keeps the test short: every 17th fails;
/// `MEGAFUSE_TEST_STRIDE=1` tries them all.
#[test]
fn every_tensor_may_find_no_room() {
    let _turn = turn();
    Emulated::open();
    let stride = std::env::var("MEGAFUSE_TEST_STRIDE").map_or(17, |stride| stride.parse().expect("a number"));
    fail_at_allocations(CudaOptions { separate_allocations: true, ..CudaOptions::default() }, stride);
}

#[test]
fn a_run_beyond_the_cards_memory_says_how_much_there_is() {
    let _turn = turn();
    let emulated = Emulated::open();
    let options = CudaOptions { separate_allocations: true, ..CudaOptions::default() };
    let pipeline = load(&CudaDevice::open(options).unwrap()).unwrap();
    let want = picture(&pipeline).unwrap();
    let limit = emulated.call::<u64>("emu_live_bytes") + 10_000;
    emulated.set("emu_set_memory_limit", limit);
    let error = picture(&pipeline).unwrap_err();
    emulated.set("emu_set_memory_limit", 0);
    let text = error.to_string();
    assert!(text.contains("out of memory on cuda:0") && text.contains(&limit.to_string()), "{text}");
    assert_eq!(picture(&pipeline).unwrap(), want, "the same pipeline serves the next run");
}

#[test]
fn two_hundred_runs_take_no_more_than_the_first() {
    let _turn = turn();
    let emulated = Emulated::open();
    let device = CudaDevice::open(CudaOptions::default()).unwrap();
    let pipeline = load(&device).unwrap();
    let run = || picture(&pipeline).unwrap();
    let want = run();
    // Stages of one step are recorded in the second run.
    assert_eq!(run(), want);
    let state = || {
        let memory = device.memory().unwrap();
        let live = ["emu_live_allocations", "emu_live_bytes"].map(|name| emulated.call::<u64>(name));
        (memory.in_use_bytes, memory.reserved_bytes, live)
    };
    let before = state();
    for i in 0..200 {
        assert_eq!(run(), want, "run {i}");
        assert_eq!(state(), before, "run {i}");
    }
}
