//! Which devices are tested, and tests that find nothing to check here.
#![allow(dead_code)] // each test binary uses a part

use std::collections::BTreeSet;
use std::io::Write;
use std::sync::Mutex;

static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// The cpu and the emulated card, or the devices that `MEGAFUSE_TEST_DEVICES` lists (`cpu`, `emu`, `cuda`).
pub fn device_names() -> Vec<String> {
    let listed = std::env::var("MEGAFUSE_TEST_DEVICES").unwrap_or_else(|_| "cpu,emu".into());
    listed.split(',').map(String::from).collect()
}

/// Is the emulated card among them? A test without it says that it checks nothing.
pub fn has_emulated_card() -> bool {
    let has = device_names().iter().any(|name| name == "emu");
    if !has {
        skipped("no emu among MEGAFUSE_TEST_DEVICES");
    }
    has
}

/// Says that the running test checks nothing, or a part of it nothing, and why; once per test. Past the harness, which
/// keeps the output of tests that pass to itself.
pub fn skipped(reason: &str) {
    let thread = std::thread::current();
    let line = format!("SKIPPED in {}: {reason}", thread.name().unwrap_or("a test"));
    if SAID.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).insert(line.clone()) {
        let _ = writeln!(std::io::stderr(), "{line}");
    }
}
