//! The calls of a real run, written by `generate --record-shapes` and timed by `bench kernels --workload`.

use std::fs;
use std::path::Path;

use megafuse::ops::cases::{self, Case};
use megafuse::ops::profile::record_calls;
use megafuse::pipeline::Request;
use megafuse::{Error, Result};
use serde_json::{Value, json};

use crate::cli::console::say;
use crate::cli::session::Session;
use crate::cli::{output, values};

const SCHEMA: u64 = 1;

/// The run's calls, from the meta device.
///
/// # Errors
/// As [`Planner::plan`](megafuse::pipeline::Planner::plan); [`Error::Io`].
pub fn write(path: &Path, session: &Session, request: &Request) -> Result<()> {
    let (plan, calls) = record_calls(|| session.planner.plan(request));
    let plan = plan?;
    let calls: Vec<Value> =
        calls.iter().map(|call| json!({ "op": call.op, "shape": call.shape, "count": call.count })).collect();
    let stages: Vec<String> = plan.stages.iter().map(ToString::to_string).collect();
    let workload = json!({
        "kind": "workload", "schema": SCHEMA, "model": values::source_name(session.source()), "stages": stages,
        "dtype": plan.dtype.name(), "calls": calls,
    });
    output::replace(path, format!("{workload:#}\n").as_bytes())?;
    output::print_name(path);
    Ok(())
}

/// The cases of a file, and how often the run has each.
///
/// # Errors
/// [`Error::Io`], [`Error::File`]: no such file; as [`cases::of_shape`].
pub fn read(path: &Path) -> Result<Vec<(Case, u64)>> {
    let text = fs::read_to_string(path).map_err(|error| Error::io(path, error))?;
    let workload: Value = serde_json::from_str(&text).map_err(|error| Error::file(path, error.to_string()))?;
    let calls = workload["calls"].as_array().filter(|_| workload["kind"] == "workload");
    let Some(calls) = calls else {
        return Err(Error::file(path, "it is no workload: generate --record-shapes FILE writes one"));
    };
    if workload["schema"] != SCHEMA {
        let reason = format!("it follows schema {}, this program reads {SCHEMA}: record it again", workload["schema"]);
        return Err(Error::file(path, reason));
    }
    let (mut cases, mut left_out) = (Vec::new(), 0);
    for call in calls {
        let (Some(op), Some(count)) = (call["op"].as_str(), call["count"].as_u64()) else {
            return Err(Error::file(path, format!("a call without op and count: {call}")));
        };
        match cases::of_shape(op, &call["shape"]).map_err(|error| Error::file(path, error.to_string()))? {
            Some(case) => cases.push((case, count)),
            None => left_out += count,
        }
    }
    if left_out > 0 {
        say!("warning: {}: {left_out} calls cannot be made from their shape and are left out", path.display());
    }
    Ok(cases)
}
