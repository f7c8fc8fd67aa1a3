//! `bench kernels --ncu`: the counters of Nsight Compute that say what a kernel waits for, as text.

use std::fs::File;
use std::io::Read;
use std::process::{Command, Stdio};

use megafuse::runtime::cuda;
use megafuse::{Device, Error, Result};

use super::args::KernelArgs;
use crate::cli::output::print_line;

/// Name, and what it says.
const COUNTERS: [(&str, &str); 10] = [
    ("gpu__time_duration.sum", "time"),
    ("sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active", "tensor cores"),
    ("sm__throughput.avg.pct_of_peak_sustained_elapsed", "multiprocessors"),
    ("dram__throughput.avg.pct_of_peak_sustained_elapsed", "memory"),
    ("dram__bytes.sum", "bytes of memory"),
    ("lts__t_sector_hit_rate.pct", "hits in L2"),
    ("l1tex__data_bank_conflicts_pipe_lsu.sum", "bank conflicts"),
    ("sm__warps_active.avg.pct_of_peak_sustained_active", "occupancy"),
    ("smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio", "stalled on memory"),
    ("launch__registers_per_thread", "registers"),
];

/// Runs the cases once each below ncu.
///
/// # Errors
/// [`Error::Request`]: no card; [`Error::Config`]: no ncu, or what it says.
pub fn run(args: &KernelArgs, device: &Device) -> Result<()> {
    if !matches!(device, Device::Cuda(_)) || cuda::is_emulated() {
        let reason = "ncu counts on a real card: choose cuda or cuda:N";
        return Err(Error::Request { field: "--device", value: args.device.to_string(), reason: reason.into() });
    }
    let refuse = |reason: String| Error::config("ncu", reason);
    let program = std::env::current_exe().map_err(|error| refuse(error.to_string()))?;
    let names: Vec<&str> = COUNTERS.iter().map(|(name, _)| *name).collect();
    let shapes: Vec<String> = args
        .shapes
        .iter()
        .filter_map(|shapes| clap::ValueEnum::to_possible_value(shapes).map(|value| value.get_name().to_string()))
        .collect();
    // ncu writes on the same output as the program, so its table goes to a file.
    let folder = tempfile::tempdir().map_err(|error| Error::io(&std::env::temp_dir(), error))?;
    let log = folder.path().join("ncu.csv");
    let mut command = Command::new("ncu");
    command.args(["--csv", "--metrics", &names.join(","), "--log-file"]).arg(&log).arg(program);
    command.args(["bench", "kernels", "--once", "--device", &args.device.to_string(), "--filter", &args.filter]);
    command.args(["--dtype", args.dtype.name()]);
    match &args.workload {
        Some(path) => command.arg("--workload").arg(path),
        None => command.args(["--shapes", &shapes.join(",")]),
    };
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).status();
    let status = status.map_err(|error| {
        refuse(format!("{error}: it comes with the CUDA toolkit (Nsight Compute) and must be in the PATH"))
    })?;
    let mut text = String::new();
    let read = File::open(&log).and_then(|mut file| file.read_to_string(&mut text));
    read.map_err(|error| Error::io(&log, error))?;
    if !status.success() {
        let said: Vec<&str> = text.lines().filter(|line| line.starts_with("==ERROR==")).collect();
        return Err(refuse(format!("{status}: {}", said.join(" "))));
    }
    let kernels = parse(&text).ok_or_else(|| refuse("its table has no columns ID, Kernel Name, Metric Name".into()))?;
    if kernels.is_empty() {
        return Err(refuse("it saw no kernel".into()));
    }
    for Kernel { name, counters } in kernels {
        print_line(name);
        for (counter, value) in counters {
            let what = COUNTERS.iter().find(|(name, _)| *name == counter).map_or(counter.as_str(), |(_, what)| what);
            print_line(format!("    {what:20} {value}"));
        }
    }
    Ok(())
}

#[derive(Debug, PartialEq)]
struct Kernel {
    name: String,
    /// Counter, and its value with the unit.
    counters: Vec<(String, String)>,
}

/// ncu's table: a line a launch and counter, below lines that begin with ==.
fn parse(text: &str) -> Option<Vec<Kernel>> {
    let mut lines = text.lines().filter(|line| line.starts_with('"')).map(fields);
    let header = lines.next()?;
    let column = |name: &str| header.iter().position(|field| field == name);
    let [id, kernel, name, unit, value] = [
        column("ID")?,
        column("Kernel Name")?,
        column("Metric Name")?,
        column("Metric Unit")?,
        column("Metric Value")?,
    ];
    let mut found: Vec<(String, Kernel)> = Vec::new();
    for line in lines {
        let field = |at: usize| line.get(at).cloned().unwrap_or_default();
        if found.last().is_none_or(|(last, _)| *last != field(id)) {
            found.push((field(id), Kernel { name: field(kernel), counters: Vec::new() }));
        }
        if let Some((_, kernel)) = found.last_mut() {
            kernel.counters.push((field(name), format!("{} {}", field(value), field(unit)).trim().to_string()));
        }
    }
    Some(found.into_iter().map(|(_, kernel)| kernel).collect())
}

/// Of a line whose every field stands in quotes.
fn fields(line: &str) -> Vec<String> {
    line.trim().trim_matches('"').split("\",\"").map(String::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_of_ncu_is_read() {
        let text = "==PROF== Connected\n\
            \"ID\",\"Process ID\",\"Kernel Name\",\"Metric Name\",\"Metric Unit\",\"Metric Value\"\n\
            \"0\",\"7\",\"linear_bf16\",\"gpu__time_duration.sum\",\"us\",\"31.2\"\n\
            \"0\",\"7\",\"linear_bf16\",\"dram__bytes.sum\",\"Mbyte\",\"1,024.5\"\n\
            \"1\",\"7\",\"linear_bf16\",\"gpu__time_duration.sum\",\"us\",\"30.9\"\n";
        let kernels = parse(text).unwrap();
        assert_eq!(kernels.len(), 2);
        assert_eq!(kernels[0].name, "linear_bf16");
        let value = |name: &str, value: &str| (name.to_string(), value.to_string());
        assert_eq!(
            kernels[0].counters,
            [value("gpu__time_duration.sum", "31.2 us"), value("dram__bytes.sum", "1,024.5 Mbyte")]
        );
        assert_eq!(kernels[1].counters.len(), 1);
        assert_eq!(parse("==ERROR== no permission"), None);
        assert_eq!(parse("\"ID\",\"Kernel\""), None);
    }
}
