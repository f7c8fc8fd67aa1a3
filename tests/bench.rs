//! `megafuse bench` from outside: what it prints, compares, draws and refuses. No time is checked, only what is said of it.

#[path = "common/drawn.rs"]
mod drawn;
#[path = "common/place.rs"]
mod place;
#[path = "common/skip.rs"]
mod skip;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use place::{MODEL, Place, text};
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

/// A run's shapes are recorded and timed: on the cpu with their sum, on the emulated card without.
#[test]
fn the_shapes_of_a_run_are_recorded_and_timed() {
    let place = Place::new();
    let run = ["generate", "x", "--model", MODEL, "--stages", "16x16:2", "--out", "a.png", "--record-shapes", "w.json"];
    assert_eq!(place.ok(&run), "w.json\na.png\n");
    let workload: Value = serde_json::from_slice(&place.bytes("w.json")).expect("JSON");
    let calls = workload["calls"].as_array().expect("calls");
    let count = |op: &str| -> u64 {
        calls.iter().filter(|call| call["op"] == op).map(|call| call["count"].as_u64().expect("a number")).sum()
    };
    // The launches of a plan are the same run's.
    assert!(count("conv2d") > 20 && count("attention") > 4 && count("linear") > 20, "{workload}");
    let bench =
        ["bench", "kernels", "--workload", "w.json", "--filter", "attention", "--json", "--seconds", "0", "--device"];
    let timed = lines(&place.ok(&[&bench[..], &["cpu", "--dtype", "f32"]].concat()));
    let sums: Vec<&Value> = timed.iter().filter(|line| line["kind"] == "workload").collect();
    let [attention, all] = sums[..] else { panic!("{timed:?}") };
    assert_eq!((&attention["op"], &all["op"]), (&"attention".into(), &"all".into()));
    assert_eq!(attention["calls"], count("attention"));
    let of_cases = timed.iter().filter(|line| line["kind"] == "kernel");
    let seconds: f64 =
        of_cases.map(|line| line["count"].as_f64().unwrap() * line["median_us"].as_f64().unwrap() / 1e6).sum();
    assert!((all["seconds"].as_f64().unwrap() / seconds - 1.0).abs() < 1e-6, "{timed:?}");
    let emulated = lines(&place.ok(&[&bench[..], &["emu"]].concat()));
    assert!(emulated.iter().all(|line| line["kind"] != "workload" && line.get("median_us").is_none()), "{emulated:?}");
    assert!(emulated.iter().any(|line| line["count"].as_u64() > Some(1)), "{emulated:?}");

    fs::write(place.path("other.json"), "{}").expect("a writable folder");
    assert!(place.fails(1, &["bench", "--workload", "other.json"]).contains("other.json: it is no workload"));
    let broken = json!({"kind": "workload", "schema": 1, "calls": [{"op": "linear", "shape": {"m": 1}, "count": 1}]});
    fs::write(place.path("broken.json"), broken.to_string()).expect("a writable folder");
    assert!(place.fails(1, &["bench", "--workload", "broken.json"]).contains("activation"));
    assert!(place.fails(2, &["bench", "--workload", "w.json", "--shapes", "sd15"]).contains("--shapes"));
}

#[test]
fn a_profile_is_a_table_and_a_trace() {
    let place = Place::new();
    let run = ["generate", "x", "--model", MODEL, "--stages", "16x16:2", "--out", "a.png", "--profile", "trace.json"];
    let output = place.run(&[&run[..], &["--device", "cpu"]].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), "a.png\ntrace.json\n");
    let table = text(&output.stderr);
    assert!(table.contains("all ops") && table.contains("conv2d"), "{table}");
    let trace: Value = serde_json::from_slice(&place.bytes("trace.json")).expect("JSON");
    let events: Vec<&Value> =
        trace["traceEvents"].as_array().expect("events").iter().filter(|e| e["ph"] == "X").collect();
    assert!(events.len() > 50, "{} events", events.len());
    for event in events {
        assert!(event["ts"].as_f64() >= Some(0.0) && event["dur"].as_f64() >= Some(0.0), "{event}");
        assert!(event["args"]["output"].is_array(), "{event}");
    }
    let message = place.fails(2, &[&run[..], &["--device", "emu"]].concat());
    assert!(message.contains("--profile trace.json: the emulated card has no times"), "{message}");
}

/// What is predicted is said to be, and follows from the card's figures.
#[test]
fn a_plan_predicts_the_time_of_a_card() {
    let place = Place::new();
    let plan = ["plan", "x", "--model", MODEL, "--stages", "16x16:2,24x24:1", "--dtype", "bf16"];
    let table = place.ok(&[&plan[..], &["--card", "h200"]].concat());
    assert!(table.contains("predicted, not measured: NVIDIA H200; predicted from prototypes"), "{table}");
    let predicted = |card: &str| -> Value {
        serde_json::from_str(&place.ok(&[&plan[..], &["--json", "--card", card]].concat())).expect("JSON")
    };
    let report = predicted("h200-portable");
    let prediction = &report["prediction"];
    assert_eq!(prediction["predicted"], true);
    let phases = prediction["phases"].as_array().expect("phases");
    assert_eq!(phases.len(), report["phases"].as_array().expect("phases").len());
    let sum: f64 = phases.iter().map(|phase| phase["seconds"].as_f64().expect("a number")).sum();
    assert!((sum / prediction["seconds"].as_f64().expect("a number") - 1.0).abs() < 1e-9, "{prediction}");
    // Every call takes its start at least.
    let launches = report["total"]["launches"].as_f64().expect("a number");
    assert!(sum > launches * 1e-6, "{sum} {launches}");

    // A file whose ops take a fixed time: as many of that as there are calls.
    let run = json!({"kind": "run", "schema": 1, "card": "a card", "dtype": "bf16", "peak_tflops": 100.0,
                     "peak_gbytes_per_s": 1000.0});
    let case = |op: &str, us: f64| {
        json!({"kind": "kernel", "op": op, "name": op, "dtype": "bf16", "kernel": "", "method": "cold", "floor_us": 0.0,
               "cold": {"samples_us": [us, us, us]}})
    };
    let lines: Vec<String> = [run, case("linear", 1000.0), case("conv2d", 1000.0), case("other", 1000.0)]
        .map(|line| line.to_string())
        .to_vec();
    fs::write(place.path("card.json"), lines.join("\n")).expect("a writable folder");
    let prediction = &predicted("card.json")["prediction"];
    assert_eq!(prediction["card"], "a card");
    let error = place.fails(2, &[&plan[..], &["--card", "voodoo2"]].concat());
    assert!(error.contains("--card voodoo2: expected h200, h200-portable"), "{error}");
    let error = place.run(&["plan", "x", "--model", MODEL, "--dtype", "f32", "--card", "card.json"]);
    assert!(text(&error.stderr).contains("--card was measured in bf16"), "{}", text(&error.stderr));
}

/// The example of docs/kernels.md.
fn example() -> String {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/kernels.md");
    let page = fs::read_to_string(page).expect("the page");
    let block = page.split("```cuda\n").find(|block| block.contains("// bench: op rms_norm"));
    block.and_then(|block| block.split("```").next()).expect("an example in docs/kernels.md").to_string()
}

/// Compiled, compared with the cpu, raced; what is wrong with it is said.
#[test]
fn a_kernel_of_ones_own_is_checked_and_raced() {
    let place = Place::new();
    let bench = |text: &str| {
        fs::write(place.path("my.cu"), text).expect("a writable folder");
        let mut command = place.command(&["bench", "kernels", "--kernel", "my.cu", "--device", "emu"]);
        // The program's own builds of the emulated card, whichever the other tests run on.
        command.env_remove("MEGAFUSE_EMU_LIBRARY").output().expect("the program starts")
    };
    let own = example();
    assert!(own.lines().count() <= 25, "a short example");
    let output = bench(&own);
    let table = text(&output.stdout);
    assert!(output.status.success(), "{table}{}", text(&output.stderr));
    assert!(
        table.contains("(plain), compared with the cpu") && table.contains("(race), compared with the cpu"),
        "{table}"
    );
    assert_eq!(table.matches("ok").count(), 16, "{table}");
    assert!(!table.contains(" us") && !table.contains("GB/s"), "{table}");

    // A barrier too few: the race build says so, whatever the results.
    let output = bench(&own.replacen("__syncthreads();\n    for", "for", 1));
    assert!(!output.status.success() && text(&output.stderr).contains("RACE"), "{}", text(&output.stderr));
    // Wrong only where a row is longer than a block.
    let output = bench(&own.replace("c += 128) y[c]", "c += 1024) y[c]"));
    let message = text(&output.stderr);
    assert!(
        !output.status.success() && message.contains("kernel my_norm: wrong results for rows 2, channels 1025"),
        "{message}"
    );
    let message = text(&bench(&own.replace("sqrtf", "sqrtff")).stderr);
    assert!(message.contains("does not compile it") && message.contains("sqrtff"), "{message}");
    let message = text(&bench(&own.replace("op rms_norm", "op rms")).stderr);
    assert!(message.contains("my.cu: no contract for op \"rms\""), "{message}");
    let message =
        text(&bench(&own.replace("int channels, float eps) {\n    my", "float eps, int channels) {\n    my")).stderr);
    assert!(message.contains("my_norm_bf16"), "{message}");
    let message = text(&bench(&own.replace("entry my_norm", "entry your_norm")).stderr);
    assert!(message.contains("your_norm_bf16"), "{message}");
    assert!(place.fails(2, &["bench", "--kernel", "my.cu", "--device", "cpu"]).contains("--device cpu"));
}

/// A library under a name that the program looks for, from a file of tests/data; `None` without a C++ compiler.
fn compiled(place: &Place, name: &str, source: &str) -> Option<PathBuf> {
    let compiler = std::env::var("CXX").ok().filter(|compiler| !compiler.trim().is_empty());
    let words: Vec<String> = compiler.as_deref().unwrap_or("c++").split_whitespace().map(String::from).collect();
    let library = place.path(name);
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]).args(["-std=c++20", "-O1", "-shared", "-fPIC", "-Wall", "-Werror", "-o"]).arg(&library);
    command.arg(format!("-Wl,-soname,{name}"));
    let Ok(output) = command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/").to_owned() + source).output()
    else {
        assert!(std::env::var_os("CI").is_none(), "CI must have a C++ compiler");
        skip::skipped("no C++ compiler; CXX names one");
        return None;
    };
    assert!(output.status.success(), "{}", text(&output.stderr));
    Some(library)
}

/// A stand-in on the emulated card: asked for the same product, its result compared; without one nothing is said there.
#[test]
fn cublaslt_is_asked_for_the_same_linear() {
    let place = Place::new();
    let Some(library) = compiled(&place, "libcublasLt.so.13", "cublaslt/stand_in.cpp") else { return };
    let kernel = concat!(env!("CARGO_MANIFEST_DIR"), "/kernels/tutorial/01_naive.cu");
    let bench = |variables: &[&str]| {
        let mut command = place.command(&["bench", "kernels", "--kernel", kernel, "--device", "emu"]);
        command.env_remove("MEGAFUSE_EMU_LIBRARY").env("MEGAFUSE_CUBLASLT", &library);
        command.env("CUBLASLT_TEST_LOG", place.path("log")).envs(variables.iter().map(|name| (name, "1")));
        command.output().expect("the program starts")
    };
    let output = bench(&[]);
    let table = text(&output.stdout);
    assert!(output.status.success(), "{table}{}", text(&output.stderr));
    let lines: Vec<&str> = table.lines().filter(|line| line.starts_with("cuBLASLt bf16")).collect();
    assert_eq!(lines.len(), 2, "{table}");
    assert!(lines.iter().all(|line| line.ends_with("  ok")), "{table}");
    let log = fs::read_to_string(place.path("log")).expect("it was asked");
    let sizes = ["m 64 n 64 k 64", "m 40 n 136 k 72"];
    let products = sizes.iter().flat_map(|size| [format!("heuristic {size}"), format!("matmul {size}")]);
    let expected: Vec<String> = ["create".into()].into_iter().chain(products).chain(["destroy".into()]).collect();
    assert_eq!(log.lines().collect::<Vec<_>>(), expected);

    let output = bench(&["CUBLASLT_TEST_WRONG"]);
    let message = text(&output.stderr);
    assert!(
        !output.status.success() && message.contains("cuBLASLt's result for [64, 64, 64] is not the cpu's"),
        "{message}"
    );
}

/// A step and a decoding: counted, timed on the cpu, run on the emulated card.
#[test]
fn the_parts_of_a_model_are_timed() {
    let place = Place::new();
    let bench = ["bench", "models", "--model", MODEL, "--json", "--seconds", "0", "--size", "16x16", "--device"];
    let timed = lines(&place.ok(&[&bench[..], &["cpu", "--dtype", "f32", "--batch", "2"]].concat()));
    let parts: Vec<&str> = timed.iter().filter_map(|line| line["part"].as_str()).collect();
    assert_eq!(parts, ["UNet, guided step of 2 [4,8,8]", "VAE, decode 2 of 16x16"]);
    for line in &timed {
        assert_eq!(line["kind"], "model");
        for figure in ["median_us", "tflops", "share_of_peak_flops", "flops", "launches"] {
            assert!(line[figure].as_f64() > Some(0.0), "{figure} in {line}");
        }
    }
    let sd3 = drawn::folder("sd3/medium").display().to_string();
    let sd3 = [&bench[..3], &[sd3.as_str()], &bench[4..], &["cpu", "--dtype", "f32"]].concat();
    let parts: Vec<Value> = lines(&place.ok(&sd3)).iter().map(|line| line["part"].clone()).collect();
    assert_eq!(parts, ["transformer, guided step of 1 [2,8,8]", "VAE, decode 1 of 16x16"]);
    let emulated = lines(&place.ok(&[&bench[..], &["emu"]].concat()));
    assert_eq!(emulated.len(), 2, "{emulated:?}");
    for line in &emulated {
        assert_eq!((&line["ran"], &line["emulated"]), (&true.into(), &true.into()));
        assert!(line.get("median_us").is_none() && line.get("tflops").is_none(), "{line}");
    }
    let error = place.fails(2, &[&bench[..8], &["--size", "15x16", "--device", "cpu"]].concat());
    assert!(error.contains("--size"), "{error}");
    assert!(place.fails(1, &["bench", "models", "--model", "nowhere"]).contains("nowhere"));
    assert!(place.fails(2, &["bench", "models"]).contains("--model"));
    assert!(place.fails(2, &["bench", "models", "--model", MODEL, "--random", "sdxl"]).contains("--random"));
}

#[test]
fn whole_pictures_are_timed_by_batch() {
    let place = Place::new();
    let bench = ["bench", "generate", "--model", MODEL, "--size", "16x16", "--steps", "2", "--json", "--device"];
    let timed = lines(&place.ok(&[&bench[..], &["cpu", "--dtype", "f32", "--batch", "1,2", "--runs", "1"]].concat()));
    assert_eq!(timed.iter().map(|line| line["batch"].as_u64()).collect::<Vec<_>>(), [Some(1), Some(2)]);
    for line in &timed {
        let number = |value: &Value| value.as_f64().expect("a number");
        let (seconds, phases) = (number(&line["seconds"]), &line["phases"]);
        let rate = number(&line["batch"]) / seconds;
        assert!((number(&line["pictures_per_second"]) / rate - 1.0).abs() < 1e-9, "{line}");
        let sum: f64 = ["text", "steps", "decode"].iter().map(|phase| number(&phases[phase])).sum();
        assert!((sum / seconds - 1.0).abs() < 1e-6, "{line}");
        assert_eq!((&line["size"], &line["steps"], &line["guidance"]), (&"16x16".into(), &2.into(), &8.0.into()));
    }
    let emulated = lines(&place.ok(&[&bench[..], &["emu"]].concat()));
    let [line] = &emulated[..] else { panic!("{emulated:?}") };
    assert_eq!(line["ran"], true);
    assert!(line.get("seconds").is_none() && line.get("pictures_per_second").is_none(), "{line}");
}

/// Without a file of weights: here of the small models' configurations; the published ones' parts are counted elsewhere.
#[test]
fn whole_pictures_are_made_of_random_weights() {
    let place = Place::new();
    // As it comes from the hub without its weights.
    let copy = |from: &Path, name: &str| {
        for entry in fs::read_dir(from).expect("a model") {
            let path = entry.expect("readable").path();
            let folder = place.path(name).join(path.file_name().expect("a name"));
            for file in fs::read_dir(&path).into_iter().flatten().flatten().map(|file| file.path()) {
                if file.extension().is_none_or(|end| end != "safetensors") {
                    fs::create_dir_all(&folder).expect("a writable folder");
                    fs::copy(&file, folder.join(file.file_name().expect("a name"))).expect("a writable folder");
                }
            }
        }
    };
    // Another name than those of published models, which mean their full size.
    for (model, name) in [("sd15", "small-sd15"), ("sdxl", "small-sdxl")] {
        copy(&drawn::folder(model), name);
        let bench =
            ["bench", "generate", "--random", name, "--size", "16x16", "--steps", "2", "--json", "--device", "emu"];
        let made = lines(&place.ok(&[&bench[..], &["--batch", "1,2"]].concat()));
        assert_eq!(made.iter().map(|line| line["batch"].as_u64()).collect::<Vec<_>>(), [Some(1), Some(2)]);
        for line in &made {
            assert_eq!((&line["ran"], &line["emulated"], &line["size"]), (&true.into(), &true.into(), &"16x16".into()));
            assert!(line["model"].as_str().is_some_and(|model| model.ends_with("random weights")), "{line}");
        }
    }
    let error = place.fails(2, &["bench", "generate", "--random", "sd4"]);
    let expected = "expected sd15, sd21, sdxl, sd3, sd35, if-i-xl, if-i-l, if-i-m, if-ii-l, or a directory with the configurations";
    assert!(error.contains(expected), "{error}");
    assert!(place.fails(2, &["bench", "generate", "--model", MODEL, "--random", "sd15"]).contains("--random"));
}

/// Nsight Compute counts on a card.
#[test]
fn counters_want_a_card() {
    let place = Place::new();
    for device in ["cpu", "emu"] {
        let error = place.fails(2, &["bench", "kernels", "--ncu", "--device", device]);
        assert!(error.contains(&format!("--device {device}: ncu counts on a real card")), "{error}");
    }
    assert!(place.fails(2, &["bench", "--ncu", "--json"]).contains("--json"));
    // What ncu runs: every case once, without a word.
    let quiet = place.ok(&["bench", "kernels", "--once", "--device", "cpu", "--filter", "layer_norm [512"]);
    assert_eq!(quiet, "");
}
