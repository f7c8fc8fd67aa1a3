//! `megafuse bench` from outside: what it prints, compares, draws and refuses. No time is checked, only what is said of it.

#[path = "common/place.rs"]
mod place;

use std::fs;

use place::Place;
use serde_json::{Value, json};

/// The lines of --json.
fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

const FIGURES: [&str; 6] = ["median_us", "tflops", "gbytes_per_s", "share_of_peak", "floor_us", "rotated"];

/// The emulated card runs what a card would, and no time of it is called a card's.
#[test]
fn a_bench_of_the_emulated_card_has_no_figures() {
    let place = Place::new();
    let all = lines(&place.ok(&[
        "bench",
        "kernels",
        "--device",
        "emu",
        "--json",
        "--variants",
        "--filter",
        "linear [64,64] -> 64",
    ]));
    assert!(all.iter().all(|line| line["emulated"] == true), "{all:?}");
    for (line, figure) in all.iter().flat_map(|line| FIGURES.map(|figure| (line, figure))) {
        assert!(line.get(figure).is_none(), "{figure} in {line}");
    }
    let peaks: Vec<&str> =
        all.iter().filter(|line| line["kind"] == "peak").filter_map(|line| line["with"].as_str()).collect();
    assert_eq!(peaks, ["fused multiply-add, f32", "mma.sync m16n8k16", "wgmma m64n256k16", "copy"]);
    let kernels: Vec<&Value> = all.iter().filter(|line| line["kind"] == "kernel").collect();
    // The op's own choice, and each variant that takes the operands.
    assert!(kernels.len() > 8, "{kernels:?}");
    for kernel in kernels {
        assert_eq!(kernel["from_graph"], true, "{kernel}");
        assert!(kernel["flops"].as_u64() >= Some(2 * 64 * 64 * 64), "{kernel}");
        let error = kernel["error"]["rms"].as_f64().expect("an error");
        // Half an ulp of bf16 at most in each element.
        assert!(error > 0.0 && error < 0.002, "{kernel}");
    }
    // As before there were several benches: no word of what.
    let table = place.ok(&["bench", "--device", "emu", "--filter", "add"]);
    assert!(table.contains("no performance figures") && !table.contains("FLOP/s") && !table.contains(" us"), "{table}");
    assert!(table.contains("error"), "{table}");
    assert!(place.fails(2, &["bench", "--device", "emu", "--roofline", "a.svg"]).contains("--roofline"));
    assert!(place.fails(2, &["bench", "--device", "cpu", "--filter", "subtract"]).contains("subtract"));
}

/// Two benches of the cpu, a comparison of them and a picture.
#[test]
fn a_bench_of_the_cpu_has_peaks_and_shares_and_can_be_compared() {
    let place = Place::new();
    let bench = |name: &str, further: &[&str]| {
        let args = ["bench", "kernels", "--device", "cpu", "--seconds", "0", "--filter", "layer_norm [512", "--json"];
        let text = place.ok(&[&args[..], further].concat());
        fs::write(place.path(name), &text).expect("a writable folder");
        lines(&text)
    };
    let found = bench("a.json", &["--roofline", "a.svg"]);
    let [run, line] = &found[..] else { panic!("{found:?}") };
    assert!(run["peak_tflops"].as_f64() > Some(0.0) && run["peak_gbytes_per_s"].as_f64() > Some(0.0), "{run}");
    assert_eq!((&run["kind"], &run["schema"]), (&"run".into(), &1.into()));
    assert_eq!((&line["op"], &line["dtype"], &line["method"]), (&"layer_norm".into(), &"bf16".into(), &"warm".into()));
    assert_eq!((&line["shape"]["rows"], &line["shape"]["c"]), (&512.into(), &1280.into()));
    for figure in &FIGURES[..5] {
        assert!(line[figure].as_f64() > Some(0.0), "{figure} in {line}");
    }
    let warm = &line["warm"];
    assert!(warm["samples"].as_u64() >= Some(5), "{line}");
    let of = |at: usize, name: &str| warm[name][at].as_f64().expect("a number");
    let median = warm["median_us"].as_f64().expect("a number");
    assert!(of(0, "interval_us") <= median && median <= of(1, "interval_us"), "{line}");
    assert!(of(0, "quartiles_us") <= median && median <= of(1, "quartiles_us"), "{line}");
    assert!(line["error"]["rms"].as_f64() < Some(0.01) && line["error"]["against"] == "the cpu in f32", "{line}");
    assert_eq!(line["emulated"], false);
    let svg = fs::read_to_string(place.path("a.svg")).expect("a picture");
    let document = roxmltree::Document::parse(&svg).expect("XML");
    assert_eq!(document.descendants().filter(|node| node.attribute("class") == Some("case")).count(), 1, "{svg}");

    let mut slow = found.clone();
    let samples: Vec<f64> = (0..30).map(|i| 1e7 + f64::from(i)).collect();
    slow[1]["warm"]["samples_us"] = json!(samples);
    let slow: Vec<String> = slow.iter().map(Value::to_string).collect();
    fs::write(place.path("slow.json"), slow.join("\n")).expect("a writable folder");
    let compared = lines(&place.ok(&["bench", "kernels", "--compare", "a.json", "slow.json", "--json"]));
    let [line] = &compared[..] else { panic!("{compared:?}") };
    assert_eq!((&line["verdict"], &line["method"]), (&"slower".into(), &"warm".into()));
    assert!(line["interval"][0].as_f64() > Some(1.0), "{line}");
    let same = place.ok(&["bench", "--compare", "a.json", "a.json"]);
    assert!(same.contains("0 faster, 0 slower, 1 no difference shown"), "{same}");
}

#[test]
fn what_cannot_be_compared_is_said() {
    let place = Place::new();
    fs::write(place.path("empty.json"), "").expect("a writable folder");
    fs::write(place.path("broken.json"), "{\"kind\":\"run\",\"schema\":1}\n{").expect("a writable folder");
    fs::write(place.path("newer.json"), "{\"kind\":\"run\",\"schema\":99}").expect("a writable folder");
    fs::write(place.path("emulated.json"), "{\"kind\":\"run\",\"schema\":1,\"emulated\":true}")
        .expect("a writable folder");
    for (file, words) in [
        ("missing.json", "missing.json"),
        ("empty.json", "empty.json: no line says"),
        ("broken.json", "broken.json: line 2"),
        ("newer.json", "schema 99"),
        ("emulated.json", "emulated.json: it holds no times"),
    ] {
        let message = place.fails(1, &["bench", "--compare", file, file]);
        assert!(message.contains(words), "{message}");
    }
    assert!(place.fails(2, &["bench", "--compare", "a.json"]).contains("--compare"));
    assert!(place.fails(2, &["bench", "--compare", "a", "b", "--variants"]).contains("--variants"));
}
