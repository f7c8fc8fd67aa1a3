//! The results that `--json` prints, read again: an object a line, the first says of the run.

use std::fs;
use std::path::Path;

use megafuse::{Error, Result};
use serde_json::Value;

use super::numbers::Samples;

/// Of the lines; docs/performance.md has the fields. It grows by one when a field changes its meaning or goes.
pub const SCHEMA: u64 = 1;

/// What a file holds.
pub struct Results {
    /// The line of the run.
    pub run: Value,
    pub cases: Vec<Measured>,
}

/// One kernel's line.
pub struct Measured {
    /// Op and shape, kernel, dtype: what two runs have in common.
    pub key: String,
    pub op: String,
    pub method: String,
    pub samples: Samples,
    line: Value,
}

impl Results {
    /// # Errors
    /// [`Error::Io`], [`Error::File`]: not such a file, or one without times.
    pub fn read(path: &Path) -> Result<Results> {
        let text = fs::read_to_string(path).map_err(|error| Error::io(path, error))?;
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let lines = lines.map(|(at, line)| {
            serde_json::from_str(line).map_err(|error| Error::file(path, format!("line {}: {error}", at + 1)))
        });
        let lines: Vec<Value> = lines.collect::<Result<_>>()?;
        let Some(run) = lines.iter().find(|line| line["kind"] == "run").cloned() else {
            return Err(Error::file(path, "no line says \"kind\":\"run\": it is no result of bench --json"));
        };
        if run["schema"] != SCHEMA {
            let reason =
                format!("its lines follow schema {}, this program reads {SCHEMA}: measure again", run["schema"]);
            return Err(Error::file(path, reason));
        }
        let cases: Vec<Measured> = lines.into_iter().filter_map(Measured::of).collect();
        if cases.is_empty() {
            return Err(Error::file(path, "it holds no times (the emulated card has none)"));
        }
        Ok(Results { run, cases })
    }

    /// What it was measured on.
    pub fn device(&self) -> &str {
        self.run["card"].as_str().unwrap_or("an unknown device")
    }
}

impl Measured {
    fn of(line: Value) -> Option<Measured> {
        let method = line["method"].as_str()?.to_string();
        let samples = line[&method]["samples_us"].as_array()?.iter().filter_map(Value::as_f64);
        let samples = Samples::new(samples.map(|us| us / 1e6).collect());
        let variant = line["kernel"].as_str()?.split_once('=').map_or(String::new(), |(_, name)| format!(" {name}"));
        let key = format!("{}{variant} {}", line["name"].as_str()?, line["dtype"].as_str()?);
        let op = line["op"].as_str()?.to_string();
        (samples.len() > 0).then_some(Measured { key, op, method, samples, line })
    }

    /// Not the op's own choice, but one that --variants asked for.
    pub fn is_variant(&self) -> bool {
        self.line["kernel"] != ""
    }

    pub fn floor_us(&self) -> f64 {
        self.line["floor_us"].as_f64().unwrap_or(0.0)
    }
}
