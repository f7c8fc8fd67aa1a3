//! `generate --profile`: where the time of a run goes, as a table and as a trace.

use std::path::Path;

use megafuse::ops::profile::{Span, sums};
use megafuse::runtime::cuda;
use megafuse::{Device, Error, Result};
use serde_json::{Value, json};

use super::console::say;
use super::output;
use super::values::DeviceChoice;

/// Rows of the table, at most.
const ROWS: usize = 25;

/// The device of a profiled run: a card launches every kernel by itself, as work from a graph passes no op.
///
/// # Errors
/// As [`DeviceChoice::open`]; [`Error::Request`]: the emulated card, which has no times.
pub fn device(choice: DeviceChoice, path: &Path) -> Result<Device> {
    let device = choice.open_eager()?;
    if matches!(device, Device::Cuda(_)) && cuda::is_emulated() {
        let reason = "the emulated card has no times to speak of: choose a card or the cpu";
        return Err(Error::Request { field: "--profile", value: path.display().to_string(), reason: reason.into() });
    }
    Ok(device)
}

/// The table on standard error, the trace in `path`.
///
/// # Errors
/// [`Error::Io`]
pub fn report(path: &Path, device: &Device, spans: &[Span]) -> Result<()> {
    table(spans).iter().for_each(|line| say!("{line}"));
    output::replace(path, trace(device, spans).to_string().as_bytes())?;
    output::print_name(path);
    Ok(())
}

fn table(spans: &[Span]) -> Vec<String> {
    let totals = sums(spans);
    let mut rows: Vec<_> = totals.iter().collect();
    rows.sort_by_key(|(_, total)| std::cmp::Reverse(total.time));
    let all: f64 = rows.iter().map(|(_, total)| total.time.as_secs_f64()).sum();
    let mut lines = vec![format!("{:18} {:22} {:>6} {:>11} {:>6}", "op", "output", "calls", "time", "share")];
    let row = |op: &str, output: &str, calls: u64, seconds: f64| {
        let share = if all > 0.0 { 100.0 * seconds / all } else { 0.0 };
        format!("{op:18} {output:22} {calls:>6} {:>8.2} ms {share:>5.1}%", seconds * 1e3)
    };
    for ((op, output), total) in rows.iter().take(ROWS) {
        lines.push(row(op, &format!("{output:?}"), total.calls, total.time.as_secs_f64()));
    }
    if let Some(rest) = rows.get(ROWS..).filter(|rest| !rest.is_empty()) {
        let (calls, seconds) = rest
            .iter()
            .fold((0, 0.0), |(calls, seconds), (_, total)| (calls + total.calls, seconds + total.time.as_secs_f64()));
        lines.push(row("others", "", calls, seconds));
    }
    let calls = rows.iter().map(|(_, total)| total.calls).sum();
    lines.push(row("all ops", "", calls, all));
    lines
}

/// The Trace Event Format that Chrome and Perfetto read: complete events, microseconds.
fn trace(device: &Device, spans: &[Span]) -> Value {
    let clock = if let Device::Cuda(_) = device { "the card's clock" } else { "the host's clock" };
    let names = [("process_name", device.to_string()), ("thread_name", format!("ops, {clock}"))];
    let mut events: Vec<Value> = names
        .iter()
        .map(|(what, name)| json!({ "name": what, "ph": "M", "pid": 1, "tid": 1, "args": { "name": name } }))
        .collect();
    events.extend(spans.iter().map(|span| {
        let (op, output) = &span.key;
        let [start, time] = [span.start, span.time].map(|time| time.as_secs_f64() * 1e6);
        json!({ "name": op, "cat": "op", "ph": "X", "ts": start, "dur": time, "pid": 1, "tid": 1, "args": { "output": output } })
    }));
    json!({ "displayTimeUnit": "ms", "traceEvents": events })
}
