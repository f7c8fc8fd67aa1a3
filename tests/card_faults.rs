//! A run on the card whose memory ends at any point: an error each time, nothing leaks, and the next run on the same device
//! makes the picture. Needs the emulated card, which fails on demand; the tests take turns, since a fault has no address.

#[path = "common/drawn.rs"]
mod drawn;
#[path = "common/emulated.rs"]
mod emulated;

use std::path::Path;
use std::sync::{Mutex, MutexGuard};

use megafuse::methods::MegaFusion;
use megafuse::pipeline::{
    Event, LoadOptions, MemoryOptions, ModelSource, Observer, Picture, Pipeline, Planner, Request, Residency,
    SecondRequest, Silent, VaePartition,
};
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

fn source() -> ModelSource {
    ModelSource::Directory(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/sd15"))
}

fn load(device: &CudaDevice) -> Result<Pipeline> {
    load_with(device, MemoryOptions::default())
}

fn load_with(device: &CudaDevice, memory: MemoryOptions) -> Result<Pipeline> {
    let options = LoadOptions { memory, ..LoadOptions::new(Device::Cuda(device.clone()), DType::BF16) };
    Pipeline::load_with(source(), options)
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
    let keep = MemoryOptions { residency: Residency::Keep, ..MemoryOptions::default() };
    let pipeline = load_with(&CudaDevice::open(options).unwrap(), keep).unwrap();
    let want = picture(&pipeline).unwrap();
    let limit = emulated.call::<u64>("emu_live_bytes") + 10_000;
    emulated.set("emu_set_memory_limit", limit);
    let error = picture(&pipeline).unwrap_err();
    emulated.set("emu_set_memory_limit", 0);
    let text = error.to_string();
    assert!(text.contains("out of memory on cuda:0") && text.contains(&limit.to_string()), "{text}");
    assert_eq!(picture(&pipeline).unwrap(), want, "the same pipeline serves the next run");
}

type Phase = fn(&Event) -> bool;

/// Takes all memory away when a phase begins, and gives it back after as many warnings as there shall be.
struct Starved<'a> {
    emulated: &'a Emulated,
    phase: Phase,
    rungs: usize,
    said: Vec<String>,
}

impl Observer for Starved<'_> {
    fn event(&mut self, event: &Event) {
        if (self.phase)(event) {
            self.emulated.set("emu_set_memory_limit", 1);
        }
    }

    fn warning(&mut self, message: &str) {
        self.said.push(message.into());
        if self.said.len() == self.rungs {
            self.emulated.set("emu_set_memory_limit", 0);
        }
    }
}

/// Whatever the VAE's work lacks memory for, the run gives up one thing after the other, says so, and makes the same picture.
#[test]
fn a_decode_that_does_not_fit_goes_down_the_ladder() {
    let _turn = turn();
    let emulated = Emulated::open();
    let device =
        CudaDevice::open(CudaOptions { separate_allocations: true, ..CudaOptions::default() }).expect("the card opens");
    let want = picture(&load(&device).unwrap()).unwrap();
    let steps = "the VAE finds no room: the recorded steps leave memory";
    let ladder = [
        "the VAE finds no room: text encoders leave memory once the prompts are encoded",
        "the VAE finds no room: the denoiser leaves memory while the VAE works",
        "the VAE finds no room: the VAE works by stripes of 128 rows, which gives the same picture",
        "the VAE finds no room: the VAE works by stripes of 32 rows, which gives the same picture",
    ];
    let phases: [(&str, Phase); 3] = [
        ("the relay's decode", |event| matches!(event, Event::Relay { .. })),
        ("the relay's encode", |event| matches!(event, Event::RelayEncode { .. })),
        ("the decode", |event| matches!(event, Event::Decode)),
    ];
    for (name, phase) in phases {
        for rungs in 1..=5 {
            let pipeline = load(&device).unwrap();
            let mut starved = Starved { emulated: &emulated, phase, rungs, said: Vec::new() };
            let made = pipeline.generate(&request(), &mut starved);
            emulated.set("emu_set_memory_limit", 0);
            let said: Vec<&str> = [steps].into_iter().chain(ladder).take(rungs).collect();
            assert_eq!(starved.said, said, "{name}, {rungs}");
            assert_eq!(made.unwrap(), std::slice::from_ref(&want), "{name}, {rungs}");
            assert_eq!(picture(&pipeline).unwrap(), want, "{name}, {rungs}: the next picture");
        }
        let pipeline = load(&device).unwrap();
        let mut starved = Starved { emulated: &emulated, phase, rungs: usize::MAX, said: Vec::new() };
        let error = pipeline.generate(&request(), &mut starved).unwrap_err();
        emulated.set("emu_set_memory_limit", 0);
        assert!(matches!(error, Error::OutOfMemory { .. }), "{name}: {error}");
        assert_eq!(picture(&pipeline).unwrap(), want, "{name}: the next picture");
    }
}

/// A card that cannot hold the run as it is: what is given up is decided, and said, before the first step.
#[test]
fn a_run_is_planned_for_the_memory_that_there_is() {
    let _turn = turn();
    let emulated = Emulated::open();
    let options = CudaOptions { separate_allocations: true, ..CudaOptions::default() };
    let want = picture(&load(&CudaDevice::open(options).unwrap()).unwrap()).unwrap();
    let before = emulated.call::<u64>("emu_live_bytes");
    // Attention and a picture that outweigh the weights of a small model.
    let planner = Planner::with(&source(), &LoadOptions::new(Device::meta(), DType::BF16)).unwrap();
    let ladder = planner.ladder(&request()).unwrap();
    assert!(ladder.windows(2).all(|pair| pair[1].1 <= pair[0].1), "{ladder:?}");
    assert!(ladder[1].1 < ladder[0].1, "{ladder:?}");
    println!("{ladder:?}, {before}");
    let device = CudaDevice::open(options).unwrap();
    emulated.set("emu_set_memory_limit", before + ladder[0].1 - 1);
    let mut starved = Starved { emulated: &emulated, phase: |_| false, rungs: 0, said: Vec::new() };
    let made = load(&device).and_then(|pipeline| pipeline.generate(&request(), &mut starved));
    emulated.set("emu_set_memory_limit", 0);
    println!("{:?}", starved.said);
    assert_eq!(made.unwrap(), [want]);
    assert_eq!(starved.said.len(), 1, "{:?}", starved.said);
    assert!(starved.said[0].contains("text encoders leave memory"), "{:?}", starved.said);
}

/// Parts that come and go make the pictures that parts that stay make, picture after picture, and hold less.
#[test]
fn parts_that_leave_memory_come_back() {
    let _turn = turn();
    Emulated::open();
    let peak = |memory: MemoryOptions| {
        let device = CudaDevice::open(CudaOptions { separate_allocations: true, ..CudaOptions::default() })
            .expect("the card opens");
        let pipeline = load_with(&device, memory).unwrap();
        let mut pictures = Vec::new();
        for prompt in ["a cat", "a dog", "a dog"] {
            let request = Request { prompt: prompt.into(), ..request() };
            pictures.extend(pipeline.generate(&request, &mut Silent).unwrap());
        }
        (pictures, device.memory().unwrap().peak_bytes)
    };
    let (want, most) = peak(MemoryOptions { residency: Residency::Keep, vae: VaePartition::Whole });
    for vae in [VaePartition::Auto, VaePartition::Stripes] {
        let (pictures, least) = peak(MemoryOptions { residency: Residency::Low, vae });
        assert_eq!(pictures, want);
        assert!(least < most, "{least} of {most} bytes");
    }
}

/// Bounds the memory from when the first of two models has its samples, by what is held then and a bit.
struct Filled<'a> {
    emulated: &'a Emulated,
    bound: bool,
    said: Vec<String>,
}

impl Observer for Filled<'_> {
    fn event(&mut self, event: &Event) {
        if matches!(event, Event::Decode) && !std::mem::replace(&mut self.bound, true) {
            self.emulated.set("emu_set_memory_limit", self.emulated.call::<u64>("emu_live_bytes") + 100_000);
        }
    }

    fn warning(&mut self, message: &str) {
        self.said.push(message.into());
    }
}

/// DeepFloyd IF: the parts of a first model leave memory for the second's network, and that one's for the first model's next run.
#[test]
fn two_models_take_turns_where_both_do_not_fit() {
    let _turn = turn();
    let emulated = Emulated::open();
    let device =
        CudaDevice::open(CudaOptions { separate_allocations: true, ..CudaOptions::default() }).expect("the card opens");
    let source = |name: &str| ModelSource::Directory(drawn::folder(&format!("if/{name}")));
    let options = |device: Device| {
        let memory = MemoryOptions { residency: Residency::Low, ..MemoryOptions::default() };
        LoadOptions { second: Some(source("ii-l")), memory, ..LoadOptions::new(device, DType::BF16) }
    };
    let load = || Pipeline::load_with(source("i-xl"), options(Device::Cuda(device.clone()))).unwrap();
    let before = emulated.call::<u64>("emu_live_bytes");
    let of = |prompt: &str| {
        let of = |stage: &str| Request {
            prompt: prompt.into(),
            method: "plain".parse().unwrap(),
            stages: vec![stage.parse().unwrap()],
            guidance: 1.0,
            ..Request::default()
        };
        Request { second: Some(Box::new(SecondRequest { request: of("16x16:1"), noise_level: 250 })), ..of("8x8:1") }
    };
    let pipeline = load();
    let prompts = ["a cat", "a dog"];
    let want = prompts.map(|prompt| pipeline.generate(&of(prompt), &mut Silent).unwrap());
    drop(pipeline);

    let pipeline = load();
    let mut filled = Filled { emulated: &emulated, bound: false, said: Vec::new() };
    let made = pipeline.generate(&of("a cat"), &mut filled);
    emulated.set("emu_set_memory_limit", 0);
    assert_eq!(made.expect("the second model's run"), want[0]);
    assert_eq!(filled.said.len(), 1, "{:?}", filled.said);
    assert!(filled.said[0].ends_with("; other parts leave memory"), "{:?}", filled.said);

    // The second's network is there. On the last rung of the ladder all that comes later has its turn, too.
    let planner = Planner::with(&source("i-xl"), &options(Device::meta())).expect("a planner");
    let ladder = planner.ladder(&of("a dog")).expect("peaks");
    emulated.set("emu_set_memory_limit", before + ladder.last().expect("a rung").1);
    let said = [1, 0, 1].map(|index| {
        let mut starved = Starved { emulated: &emulated, phase: |_| false, rungs: 0, said: Vec::new() };
        let made = pipeline.generate(&of(prompts[index]), &mut starved);
        assert_eq!(made.expect("the next run"), want[index], "{}", prompts[index]);
        starved.said
    });
    emulated.set("emu_set_memory_limit", 0);
    assert!(said[0][0].ends_with("the denoiser leaves memory while the VAE works"), "{said:?}");
    assert!(said[0][1].ends_with("; other parts leave memory"), "{said:?}");
    assert_eq!(said.map(|said| said.len()), [2, 0, 0], "what leaves by the plan needs no word");
}

#[test]
fn twenty_runs_take_no_more_than_the_second() {
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
    // To the byte: a run that kept one would show it at once.
    for i in 0..20 {
        assert_eq!(run(), want, "run {i}");
        assert_eq!(state(), before, "run {i}");
    }
}
