//! Which library is the driver, what it must be able to do, and its errors as ours.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};

use cudarc::driver::result::DriverError;
use cudarc::driver::sys::{self, CUresult};

use crate::error::{Error, Result};

/// Of the driver's functions that this program calls, `cuEventElapsedTime_v2` is the newest; it came with CUDA 12.8.
const OLDEST_WITH_ITS_FUNCTIONS: i32 = 12_080;

/// The oldest driver that can run kernels which this nvcc compiled (`13.0.88`; empty: none were), 1000 major + 10 minor as
/// the driver says it. Machine code runs on every driver of nvcc's major version (NVIDIA calls it minor version
/// compatibility); whether PTX does, the driver says at load.
fn oldest_driver(nvcc: &str) -> i32 {
    let major = nvcc.split('.').next().and_then(|major| major.parse::<i32>().ok()).unwrap_or(0);
    OLDEST_WITH_ITS_FUNCTIONS.max(1000 * major)
}

/// The release branch of the driver that first supported this version of CUDA.
fn driver_branch(version: i32) -> &'static str {
    match version {
        ..=12_080 => "570",
        12_081..=13_000 => "580",
        _ => "590",
    }
}

/// The library that took the driver's place, once there is one.
static REPLACED: Mutex<Option<PathBuf>> = Mutex::new(None);

/// Makes the library at `path` the driver of this process: it is loaded under the driver's name before anything asks for
/// the driver by name. Once per process; the same path again is no error.
///
/// # Errors
/// [`Error::DeviceUnavailable`]: not loadable, or the process already runs on another driver.
pub fn use_library(path: &Path) -> Result<()> {
    let refuse = |reason: String| Err(Error::DeviceUnavailable { device: path.display().to_string(), reason });
    let mut replaced = REPLACED.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    match &*replaced {
        Some(other) if other == path => return Ok(()),
        Some(other) => return refuse(format!("this process already runs on {}", other.display())),
        None if STARTED.get().is_some() => return refuse("this process already runs on the installed driver".into()),
        None => {}
    }
    // SAFETY: the emulated card's library runs nothing at load but its own constructors.
    match unsafe { libloading::Library::new(path) } {
        // Stays for the life of the process: the driver's functions are kept in statics.
        Ok(library) => std::mem::forget(library),
        Err(error) => return refuse(format!("it cannot be loaded: {error}")),
    }
    *replaced = Some(path.to_path_buf());
    Ok(())
}

/// The emulated card's library: `MEGAFUSE_EMU_LIBRARY`, else what this program was built with.
///
/// # Errors
/// [`Error::DeviceUnavailable`] with what to do, where there is none.
pub fn emulated_library() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("MEGAFUSE_EMU_LIBRARY") {
        return Ok(PathBuf::from(path));
    }
    let refuse = |reason: String| Err(Error::DeviceUnavailable { device: "emu".into(), reason });
    let built = env!("MEGAFUSE_EMU_DIR");
    if built.is_empty() {
        let reason = "this program was built without the emulated card, which needs a C++20 compiler (g++ 12, clang++ 16 \
                      or newer); install one and build again, or use the cpu";
        return refuse(reason.into());
    }
    let path = Path::new(built).join("plain/libcuda.so.1");
    if !path.is_file() {
        let path = path.display();
        return refuse(format!("{path} is gone; build again, or name the library in MEGAFUSE_EMU_LIBRARY"));
    }
    Ok(path)
}

/// Whether the driver in use is the emulated card: its times say nothing about a card.
pub fn is_emulated() -> bool {
    // SAFETY: called after the driver was found; the symbol is looked up, not called.
    STARTED.get().is_some() && unsafe { sys::culib().get::<*const ()>(b"emu_last_error").is_ok() }
}

/// The driver was found and initialised.
static STARTED: OnceLock<()> = OnceLock::new();

/// Version of CUDA that the driver supports, 1000 major + 10 minor; `None` without a driver.
pub fn driver_version() -> Option<i32> {
    let mut version = 0;
    // SAFETY: the library is there; the pointer is valid for the call.
    (unsafe { sys::is_culib_present() } && unsafe { sys::cuDriverGetVersion(&mut version) } == CUresult::CUDA_SUCCESS)
        .then_some(version)
}

/// Finds and initialises the driver; the number of cards.
///
/// # Errors
/// [`Error::DeviceUnavailable`]: no driver, too old a driver, no card, each with what to do.
pub(super) fn start(device: &str) -> Result<usize> {
    let refuse = |reason: String| Err(Error::DeviceUnavailable { device: device.into(), reason });
    let Some(version) = driver_version() else {
        let reason = "no NVIDIA driver: libcuda.so.1 is not on this machine; install the driver, or use the cpu";
        return refuse(reason.into());
    };
    let oldest = oldest_driver(env!("MEGAFUSE_NVCC"));
    if version < oldest {
        let text = |version: i32| format!("{}.{}", version / 1000, version % 1000 / 10);
        let (supported, needed, branch) = (text(version), text(oldest), driver_branch(oldest));
        return refuse(format!(
            "the NVIDIA driver is too old: it supports CUDA {supported}, {needed} is needed; install driver {branch} or \
             newer, or use the cpu"
        ));
    }
    let no_card = || {
        let reason = "the NVIDIA driver finds no card (a card that is there may be hidden by CUDA_VISIBLE_DEVICES); use \
                      the cpu";
        refuse(reason.into())
    };
    // SAFETY: the library is there.
    match unsafe { sys::cuInit(0) } {
        CUresult::CUDA_SUCCESS => {}
        CUresult::CUDA_ERROR_NO_DEVICE => return no_card(),
        other => return Err(failure(device, "cuInit", DriverError(other))),
    }
    STARTED.get_or_init(|| ());
    let mut count = 0;
    // SAFETY: the pointer is valid for the call.
    check(device, "cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&mut count) })?;
    if count == 0 { no_card() } else { Ok(count as usize) }
}

pub(super) fn check(device: &str, call: &'static str, result: CUresult) -> Result<()> {
    result.result().map_err(|error| failure(device, call, error))
}

pub(super) fn failure(device: &str, call: &'static str, error: DriverError) -> Error {
    let text = |result: std::result::Result<&std::ffi::CStr, DriverError>| {
        result.map_or_else(|_| format!("error {}", error.0 as u32), |text| text.to_string_lossy().into_owned())
    };
    Error::Driver { device: device.into(), call, name: text(error.error_name()), text: text(error.error_string()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Kernels of any toolkit run on the first driver of its major version, if that has the functions that are called.
    #[test]
    fn the_driver_must_suit_the_toolkit_that_built_the_kernels() {
        for (nvcc, oldest) in [
            ("12.0.140", 12_080),
            ("12.8.93", 12_080),
            ("12.9.86", 12_080),
            ("13.0.88", 13_000),
            ("13.2.51", 13_000),
            ("", 12_080),
        ] {
            assert_eq!(oldest_driver(nvcc), oldest, "nvcc {nvcc}");
        }
    }
}
