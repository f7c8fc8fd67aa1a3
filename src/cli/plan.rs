//! `megafuse plan`: what a request would cost, from the configuration files alone.

use megafuse::Result;
use megafuse::pipeline::{Choices, PlanReport, Planner, Rung};
use megafuse::runtime::{OpKind, Work};
use serde_json::json;

use super::console::say;
use super::ip_args;
use super::memory::bytes_text;
use super::output::print_line;
use super::picture_args::PlanArgs;
use super::predict::Card;
use super::values;

pub fn run(args: &PlanArgs) -> Result<()> {
    let mut request = args.picture.request(&args.run, args.prompt.as_deref().unwrap_or_default())?;
    if let Some(path) = &args.choices {
        request.choices = Choices::read(path, request.method.spec())?;
    }
    let device = args.run.device.open()?;
    let source = args.run.source();
    let planner = Planner::with(&source, &args.run.load_options(&device))?;
    let request = ip_args::worded(request, planner.pipeline());
    // Without --memory and --vae-partition the fastest way is planned, wherever the command runs.
    let report = planner.plan(&request)?;
    planner.pipeline().remarks(&request)?.iter().for_each(|remark| say!("warning: {remark}"));
    let ladder = planner.ladder(&request)?;
    let card = args.card.as_deref().map(Card::named).transpose()?;
    let card = card.map(|card| card.with_vae_dtype(args.run.vae_dtype));
    if let Some(warning) = card.as_ref().and_then(|card| card.warning(report.dtype)) {
        say!("warning: {warning}");
    }
    if args.json {
        let mut json = report.to_json();
        if let Some(card) = &card {
            json["prediction"] = card.to_json(&report);
        }
        let rung = |(rung, peak): &(Rung, u64)| json!({"memory": rung.to_json(), "peak_bytes": peak});
        json["ladder"] = ladder.iter().map(rung).collect();
        print_line(format!("{json:#}"));
        return Ok(());
    }
    let stages: Vec<String> = report.stages.iter().map(ToString::to_string).collect();
    let model = values::source_name(&source);
    print_line(format!("{model}, {}, {}, stages {}", report.dtype, request.method, stages.join(" ")));
    if request.one_at_a_time() {
        print_line("at most: which steps need the network is seen as each picture is made; all are counted");
    }
    match (request.count, request.most_at_once()) {
        (1, _) => {}
        (count, 1) => print_line(format!("for one of {count} pictures")),
        (count, batch) => print_line(format!("for {batch} of {count} pictures in one batch")),
    }
    print_line("");
    table(&phases(&report)).iter().for_each(print_line);
    if let Some(card) = &card {
        print_line("");
        print_line(format!("predicted, not measured: {}; {}", card.name, card.basis));
        table(&predicted(&report, card)).iter().for_each(print_line);
    }
    print_line("");
    table(&totals(&report)).iter().for_each(print_line);
    print_line("");
    table(&weights(&report)).iter().for_each(print_line);
    print_line("");
    table(&peaks(&ladder)).iter().for_each(print_line);
    Ok(())
}

/// The kinds with matrix products, which make up the MACs.
const MATRIX_KINDS: [OpKind; 3] = [OpKind::Conv, OpKind::Linear, OpKind::Attention];

fn of(kinds: &[(OpKind, Work)], kind: OpKind) -> Work {
    kinds.iter().find(|(k, _)| *k == kind).map(|(_, work)| *work).unwrap_or_default()
}

fn phases(report: &PlanReport) -> Vec<Vec<String>> {
    let header =
        ["phase", "stage", "size", "times", "conv GMAC", "linear GMAC", "attention GMAC", "GFLOP", "launches", "peak"];
    let mut rows = vec![header.map(String::from).to_vec()];
    for phase in &report.phases {
        let text = |value: Option<String>| value.unwrap_or_else(|| "-".into());
        let mut row = vec![
            phase.name.to_string(),
            text(phase.stage.map(|stage| (stage + 1).to_string())),
            text(phase.size.map(|size| size.to_string())),
            phase.repeats.to_string(),
        ];
        row.extend(MATRIX_KINDS.map(|kind| giga(of(&phase.by_kind, kind).macs)));
        row.extend([giga(phase.once.flops), phase.once.launches.to_string(), bytes_text(phase.peak_bytes)]);
        rows.push(row);
    }
    rows
}

fn predicted(report: &PlanReport, card: &Card) -> Vec<Vec<String>> {
    let header = ["phase", "stage", "times", "predicted, once", "predicted, all"];
    let mut rows = vec![header.map(String::from).to_vec()];
    let milliseconds = |seconds: f64| format!("{:.2} ms", seconds * 1e3);
    for phase in &report.phases {
        let once = card.seconds(phase, report.dtype);
        rows.push(vec![
            phase.name.to_string(),
            phase.stage.map_or("-".into(), |stage| (stage + 1).to_string()),
            phase.repeats.to_string(),
            milliseconds(once),
            milliseconds(once * phase.repeats as f64),
        ]);
    }
    let dash = || "-".to_string();
    rows.push(vec!["total".into(), dash(), dash(), dash(), milliseconds(card.total_seconds(report))]);
    rows
}

fn totals(report: &PlanReport) -> Vec<Vec<String>> {
    let header = ["all phases and repeats", "GMAC", "GFLOP", "bytes moved", "launches"];
    let mut rows = vec![header.map(String::from).to_vec()];
    let kinds = report.by_kind.iter().map(|(kind, work)| (kind.name(), *work));
    for (name, work) in kinds.chain([("total", report.total)]) {
        let launches = work.launches.to_string();
        rows.push(vec![name.into(), giga(work.macs), giga(work.flops), bytes_text(work.bytes), launches]);
    }
    rows
}

fn weights(report: &PlanReport) -> Vec<Vec<String>> {
    let mut rows = vec![["weights", "parameters", "bytes"].map(String::from).to_vec()];
    for module in &report.weights {
        rows.push(vec![module.module.into(), module.parameters.to_string(), bytes_text(module.bytes)]);
    }
    let parameters: u64 = report.weights.iter().map(|module| module.parameters).sum();
    let bytes: u64 = report.weights.iter().map(|module| module.bytes).sum();
    rows.push(vec!["total".into(), parameters.to_string(), bytes_text(bytes)]);
    rows
}

fn peaks(ladder: &[(Rung, u64)]) -> Vec<Vec<String>> {
    let mut rows = vec![["peak memory, weights and live activations", "bytes"].map(String::from).to_vec()];
    let mut before = Rung::FASTEST;
    for &(rung, peak) in ladder {
        let held = match rung.beyond(before) {
            same if same.is_empty() => "all parts of the model stay in memory".into(),
            given_up if rows.len() == 1 => given_up,
            given_up => format!("and {given_up}"),
        };
        rows.push(vec![held, bytes_text(peak)]);
        before = rung;
    }
    rows
}

fn giga(count: u64) -> String {
    let giga = count as f64 / 1e9;
    if giga >= 100.0 { format!("{giga:.0}") } else { format!("{giga:.3}") }
}

/// Columns lined up: the first to the left, the others to the right.
fn table(rows: &[Vec<String>]) -> Vec<String> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.len()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).enumerate();
        let cells = cells.map(|(i, (cell, &w))| if i == 0 { format!("{cell:w$}") } else { format!("{cell:>w$}") });
        cells.collect::<Vec<_>>().join("  ")
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [vec!["a".into(), "1".into()], vec!["long".into(), "22".into()]];
        assert_eq!(table(&rows), ["a      1", "long  22"]);
        assert_eq!((giga(1_500_000), giga(123_456_000_000)), ("0.002".into(), "123".into()));
    }
}
