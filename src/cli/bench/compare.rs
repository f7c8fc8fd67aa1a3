//! `megafuse bench --compare A.json B.json`: what became faster, what slower.

use std::path::Path;

use megafuse::Result;
use serde_json::json;

use super::numbers::Comparison;
use super::results::Results;
use crate::cli::check::no_case;
use crate::cli::console::say;
use crate::cli::output::print_line;

pub fn run(first: &Path, second: &Path, filter: &str, as_json: bool) -> Result<()> {
    let (a, b) = (Results::read(first)?, Results::read(second)?);
    if a.device() != b.device() {
        say!("warning: A was measured on {}, B on {}", a.device(), b.device());
    }
    let mut compared = 0;
    let mut verdicts: Vec<(&str, usize)> = vec![("faster", 0), ("slower", 0), ("no difference shown", 0)];
    if !as_json {
        print_line(format!("A: {}, {}; B: {}, {}", first.display(), a.device(), second.display(), b.device()));
        print_line(format!("{:66} {:>11} {:>11} {:>6} {:>13}  B is", "case", "A", "B", "B / A", "95% interval"));
    }
    for before in a.cases.iter().filter(|case| case.key.contains(filter)) {
        let Some(after) = b.cases.iter().find(|case| case.key == before.key) else {
            say!("only in A: {}", before.key);
            continue;
        };
        if before.method != after.method {
            say!("not compared, {} in A and {} in B: {}", before.method, after.method, before.key);
            continue;
        }
        compared += 1;
        let comparison = Comparison::new(&before.samples, &after.samples);
        let verdict = comparison.verdict();
        verdicts.iter_mut().filter(|(word, _)| *word == verdict).for_each(|(_, count)| *count += 1);
        let [us_a, us_b] = [before, after].map(|case| case.samples.median() * 1e6);
        let [low, high] = comparison.interval;
        if as_json {
            print_line(json!({
                "kind": "comparison", "case": before.key, "method": before.method, "a_us": us_a, "b_us": us_b,
                "ratio": comparison.ratio, "interval": [low, high], "verdict": verdict,
            }));
        } else {
            print_line(format!(
                "{:66} {us_a:8.1} us {us_b:8.1} us {:6.3} {low:5.3} - {high:5.3}  {verdict}",
                before.key, comparison.ratio
            ));
        }
    }
    let new = b.cases.iter().filter(|case| case.key.contains(filter));
    for case in new.filter(|case| a.cases.iter().all(|before| before.key != case.key)) {
        say!("only in B: {}", case.key);
    }
    if compared == 0 {
        return Err(no_case(filter));
    }
    if !as_json {
        let counts: Vec<String> = verdicts.iter().map(|(word, count)| format!("{count} {word}")).collect();
        print_line(counts.join(", "));
    }
    Ok(())
}
