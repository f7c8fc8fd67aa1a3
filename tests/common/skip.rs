//! Tests that find nothing to check here.

use std::collections::BTreeSet;
use std::io::Write;
use std::sync::Mutex;

static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// Says that the running test checks nothing, or a part of it nothing, and why; once per test. Past the harness, which
/// keeps the output of tests that pass to itself.
pub fn skipped(reason: &str) {
    let thread = std::thread::current();
    let line = format!("SKIPPED in {}: {reason}", thread.name().unwrap_or("a test"));
    if SAID.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).insert(line.clone()) {
        let _ = writeln!(std::io::stderr(), "{line}");
    }
}
