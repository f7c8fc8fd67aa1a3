//! Kernels of one instruction set, on emulated cards that have it and that do not. A card a process, so the tests start
//! their own program again.

#[path = "common/skip.rs"]
mod skip;

use std::process::Command;

use megafuse::runtime::cuda::{self, Arg, Isa, Launch};
use megafuse::runtime::{CudaDevice, CudaOptions};

/// Runs the ignored test `name` of this program on an emulated card of that compute capability.
fn on_card(capability: &str, name: &str) {
    if let Err(error) = cuda::emulated_library() {
        return skip::skipped(&error.to_string());
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", name, "--ignored", "--nocapture"]).env("MEGAFUSE_EMU_CAPABILITY", capability);
    let output = command.output().unwrap();
    let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(output.status.success() && text.contains("1 passed"), "{name} on {capability}:\n{text}");
}

fn open() -> CudaDevice {
    cuda::use_library(&cuda::emulated_library().unwrap()).unwrap();
    CudaDevice::open(CudaOptions::default()).unwrap()
}

/// Whether this build has kernels for Hopper; without nvcc it has them all for the emulated card.
fn hopper_was_built() -> bool {
    !cuda::KERNELS_BUILT || env!("MEGAFUSE_CUDA_ARCHS").split(',').any(|arch| ["90a", "ptx90a"].contains(&arch))
}

fn launch(device: &CudaDevice, file: &'static str, entry: &str, args: &[Arg]) -> megafuse::Result<()> {
    // SAFETY: refused before anything is read: the file, the kernel or the number of arguments is wrong.
    unsafe { device.launch(file, entry, Launch::grid([1, 1, 1]).block(32), args) }
}

#[test]
fn a_card_without_the_instructions_refuses_by_name() {
    for capability in ["8.0", "8.6", "8.9"] {
        on_card(capability, "portable_card");
    }
}

#[test]
#[ignore = "started by a_card_without_the_instructions_refuses_by_name"]
fn portable_card() {
    let device = open();
    assert!(device.has(Isa::Sm80) && !device.has(Isa::Sm90a));
    assert_eq!(device.isa(), Isa::Sm80);
    let error = launch(&device, "sm90/launch", "conformance_box_2d", &[]).unwrap_err().to_string();
    let (major, minor) = device.compute_capability();
    for part in [
        "kernel conformance_box_2d: kernels/sm90/launch.cu",
        "for sm_90a",
        &format!("emulated sm_{major}{minor} card (compute capability {major}.{minor}) does not have"),
    ] {
        assert!(error.contains(part), "{part:?} is not in: {error}");
    }
    // The card is as good as before.
    device.synchronize().unwrap();
}

#[test]
fn a_card_with_the_instructions_has_both_sets() {
    on_card("9.0", "hopper_card");
    on_card("", "hopper_card"); // it is the default
}

#[test]
#[ignore = "started by a_card_with_the_instructions_has_both_sets"]
fn hopper_card() {
    let device = open();
    assert!(device.has(Isa::Sm80));
    assert_eq!(device.has(Isa::Sm90a), hopper_was_built());
    assert_eq!(device.isa(), if hopper_was_built() { Isa::Sm90a } else { Isa::Sm80 });
    let error = launch(&device, "sm90/launch", "conformance_box_2d", &[]).unwrap_err().to_string();
    let want = match hopper_was_built() {
        true => "it has parameters of [8, 128, 4, 4, 4]", // found, loaded, and asked for what it takes
        false => "was left out when this program was built: MEGAFUSE_CUDA_ARCHS=",
    };
    assert!(error.contains(want), "{error}");
    for (file, entry, want) in [
        ("sm90/none", "x", "there is no kernels/sm90/none.cu in this program"),
        ("rms_norm", "no_such_f32", "kernels/rms_norm.cu has no such kernel"),
    ] {
        let error = launch(&device, file, entry, &[]).unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
    }
}
