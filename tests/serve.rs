//! `megafuse serve`, really started: its three APIs, who is refused, and what happens when clients or the server go.

#[path = "common/place.rs"]
mod place;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use place::{MODEL, Place, copy, copy_changed};
use serde_json::{Value, json};

/// Long enough for any picture of these tests on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);
/// Asks for far more than a test waits for: it must be ended.
const ENDLESS: &str = r#"{"prompt": "a red ball", "size": "256x256", "steps": 200}"#;

/// A server of the model inside the program; killed when dropped.
struct Server {
    process: Child,
    address: String,
}

struct Reply {
    status: u16,
    headers: ureq::http::HeaderMap,
    body: Vec<u8>,
}

impl Reply {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|_| panic!("no JSON: {}", String::from_utf8_lossy(&self.body)))
    }

    fn message(&self) -> String {
        self.json()["error"]["message"].as_str().expect("an error").to_string()
    }
}

impl Server {
    fn start(flags: &[&str]) -> Server {
        Server::with(flags, |_| {})
    }

    fn with(flags: &[&str], adapt: impl FnOnce(&mut Command)) -> Server {
        let mut command = Command::new(env!("CARGO_BIN_EXE_megafuse"));
        command.args(["serve", "--addr", "127.0.0.1:0", "--device", "cpu", "--method", "plain", "--steps", "2"]);
        command.args(flags).env("RAYON_NUM_THREADS", "1").env_remove("MEGAFUSE_API_TOKEN");
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        adapt(&mut command);
        let mut process = command.spawn().expect("the program starts");
        let mut line = String::new();
        BufReader::new(process.stdout.take().expect("a pipe")).read_line(&mut line).expect("a line");
        let address = line.trim().strip_prefix("http://").unwrap_or_else(|| panic!("no address: {line:?}")).to_string();
        let server = Server { process, address };
        server.until(|| server.get("/readyz").status == 200);
        server
    }

    fn until(&self, is: impl Fn() -> bool) {
        let begin = Instant::now();
        while !is() {
            assert!(begin.elapsed() < PATIENCE, "waited for {PATIENCE:?}");
            sleep(Duration::from_millis(10));
        }
    }

    fn ask(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Reply {
        let config = ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(PATIENCE)).build();
        let mut request = ureq::http::Request::builder().method(method).uri(format!("http://{}{path}", self.address));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if !body.is_empty() && !headers.iter().any(|(name, _)| *name == "content-type") {
            request = request.header("content-type", "application/json");
        }
        let request = request.body(body.to_string()).expect("a request");
        let mut reply = ureq::Agent::new_with_config(config).run(request).expect("a reply");
        let (status, headers) = (reply.status().as_u16(), reply.headers().clone());
        let mut body = Vec::new();
        reply.body_mut().as_reader().read_to_end(&mut body).expect("a body");
        Reply { status, headers, body }
    }

    fn get(&self, path: &str) -> Reply {
        self.ask("GET", path, &[], "")
    }

    fn post(&self, path: &str, body: &Value) -> Reply {
        self.ask("POST", path, &[], &body.to_string())
    }

    /// Submits a job: its name.
    fn submit(&self, body: &str) -> String {
        let reply = self.ask("POST", "/v1/jobs", &[], body);
        assert_eq!(reply.status, 202, "{}", String::from_utf8_lossy(&reply.body));
        let status = reply.json();
        let id = status["id"].as_str().expect("a name").to_string();
        assert_eq!(reply.headers["location"], format!("/v1/jobs/{id}"));
        id
    }

    fn status(&self, id: &str) -> Value {
        self.get(&format!("/v1/jobs/{id}")).json()
    }

    /// The status of a job once it is over.
    fn over(&self, id: &str) -> Value {
        self.until(|| ["done", "failed", "cancelled"].contains(&self.status(id)["state"].as_str().expect("a state")));
        self.status(id)
    }

    fn is_running(&self, id: &str) -> bool {
        self.status(id)["state"] == "running"
    }

    fn picture(&self, status: &Value, index: usize) -> Vec<u8> {
        let reply = self.get(status["pictures"][index]["url"].as_str().expect("a picture"));
        assert_eq!((reply.status, &reply.headers["content-type"]), (200, &"image/png".parse().expect("a value")));
        reply.body
    }

    fn metric(&self, name: &str) -> f64 {
        let text = String::from_utf8(self.get("/metrics").body).expect("text");
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok());
        line.unwrap_or_else(|| panic!("no {name} in:\n{text}"))
    }

    fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([name, &self.process.id().to_string()]).status().expect("kill");
        assert!(sent.success());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The bytes that `generate` writes.
fn generated(flags: &[&str]) -> Vec<u8> {
    let place = Place::with(&["--device", "cpu"]);
    place.ok(&[&["generate", "a red ball", "--method", "plain", "--out", "a.png"], flags].concat());
    place.bytes("a.png")
}

#[test]
fn every_api_gives_the_bytes_of_generate() {
    let server = Server::start(&[]);
    let want = ["3", "4"].map(|seed| generated(&["--steps", "3", "--seed", seed, "--guidance", "4"]));

    let id = server.submit(r#"{"prompt": "a red ball", "steps": 3, "seed": 3, "guidance": 4, "count": 2}"#);
    let status = server.over(&id);
    assert_eq!((&status["state"], &status["made"], &status["warnings"]), (&json!("done"), &json!(2), &json!([])));
    (0..2).for_each(|index| assert!(server.picture(&status, index) == want[index], "picture {index}"));
    // What a picture says of itself makes it again.
    let again = server.over(&server.submit(&status["pictures"][1]["parameters"].to_string()));
    assert_eq!(again["warnings"], json!([]));
    assert!(server.picture(&again, 0) == want[1]);

    let own = json!({"seed": 3, "steps": 3, "guidance": 4});
    let body = json!({"prompt": "a red ball", "n": 2, "model": "pocket", "quality": "high", "megafuse": own});
    let reply = server.post("/v1/images/generations", &body).json();
    assert_eq!(reply["megafuse"]["seeds"], json!([3, 4]));
    let decoded = |text: &Value| STANDARD.decode(text.as_str().expect("base64")).expect("base64");
    (0..2).for_each(|index| assert!(decoded(&reply["data"][index]["b64_json"]) == want[index], "picture {index}"));
    let body = json!({"prompt": "a red ball", "response_format": "url", "megafuse": own});
    let url =
        server.post("/v1/images/generations", &body).json()["data"][0]["url"].as_str().expect("a URL").to_string();
    let path = url.strip_prefix(&format!("http://{}", server.address)).expect("this server's");
    assert!(server.get(path).body == want[0]);
    let body = json!({"prompt": "a red ball", "n": 2, "stream": true, "megafuse": own});
    let events = String::from_utf8(server.post("/v1/images/generations", &body).body).expect("text");
    let data: Vec<Value> = events
        .lines()
        .filter_map(|line| line.strip_prefix("data: "))
        .map(|data| serde_json::from_str(data).expect("JSON"))
        .collect();
    assert_eq!(data.iter().map(|event| &event["type"]).collect::<Vec<_>>(), ["image_generation.completed"; 2]);
    (0..2).for_each(|index| assert!(decoded(&data[index]["b64_json"]) == want[index], "picture {index}"));

    let body = json!({"prompt": "a red ball", "steps": 3, "cfg_scale": 4, "seed": 3, "batch_size": 2, "eta": 1.0, "sampler_name": ""});
    let reply = server.post("/sdapi/v1/txt2img", &body).json();
    (0..2).for_each(|index| assert!(decoded(&reply["images"][index]) == want[index], "picture {index}"));
    let info: Value = serde_json::from_str(reply["info"].as_str().expect("a string")).expect("JSON");
    assert_eq!((&info["all_seeds"], &info["width"], &info["steps"]), (&json!([3, 4]), &json!(64), &json!(3)));
    let text = server.post("/sdapi/v1/png-info", &json!({"image": reply["images"][1]})).json();
    assert_eq!(text["info"], info["infotexts"][1]);
    assert_eq!(server.metric("megafuse_pictures_total"), 2.0 + 1.0 + 2.0 + 1.0 + 2.0 + 2.0);
}

#[test]
fn webuis_fields_are_those_of_generate() {
    let server = Server::start(&[]);
    let made = |body: Value| {
        let reply = server.post("/sdapi/v1/txt2img", &body);
        assert_eq!(reply.status, 200, "{}", String::from_utf8_lossy(&reply.body));
        STANDARD.decode(reply.json()["images"][0].as_str().expect("base64")).expect("base64")
    };
    let base = json!({"prompt": "a red ball", "seed": 7, "steps": 4, "cfg_scale": 3, "width": 64, "height": 64});
    let with = |further: Value| {
        let mut body = base.clone();
        body.as_object_mut().expect("an object").extend(further.as_object().expect("an object").clone());
        body
    };
    let flags = ["--seed", "7", "--guidance", "3"];
    let karras =
        [&flags[..], &["--steps", "4", "--size", "64x64", "--scheduler", "dpm++-2m", "--sigmas", "karras"]].concat();
    assert!(made(with(json!({"sampler_name": "DPM++ 2M Karras"}))) == generated(&karras));
    assert!(made(with(json!({"sampler_name": "DPM++ 2M", "scheduler": "Karras"}))) == generated(&karras));
    let eta = [&flags[..], &["--steps", "4", "--size", "64x64", "--scheduler", "ddim", "--eta", "0.5"]].concat();
    assert!(made(with(json!({"sampler_name": "DDIM", "eta": 0.5}))) == generated(&eta));
    let place = Place::with(&["--device", "cpu"]);
    let enlarged = ["generate", "a red ball", "--method", "hires-fix", "--stages", "64x64:4,96x96:2", "--out", "b.png"];
    place.ok(&[&enlarged[..], &flags].concat());
    assert!(made(with(json!({"enable_hr": true, "hr_scale": 1.5, "denoising_strength": 0.5}))) == place.bytes("b.png"));

    // Without a size and steps: the model's own, and the flags'.
    let enlarged =
        ["generate", "a red ball", "--method", "hires-fix", "--stages", "64x64:2,128x128:1", "--out", "e.png"];
    place.ok(&[&enlarged[..], &flags].concat());
    let body = json!({"prompt": "a red ball", "seed": 7, "cfg_scale": 3, "enable_hr": true, "denoising_strength": 0.5});
    assert!(made(body) == place.bytes("e.png"));

    // From a picture: the name that it is given differs, so the pixels are compared.
    place.ok(&["generate", "a red ball", "--method", "plain", "--steps", "2", "--out", "start.png"]);
    let further =
        ["--init-image", "start.png", "--strength", "0.5", "--method", "plain", "--steps", "4", "--out", "c.png"];
    place.ok(&[&["generate", "a red ball"], &further[..], &flags].concat());
    let body = with(json!({"init_images": [STANDARD.encode(place.bytes("start.png"))], "denoising_strength": 0.5}));
    let reply = server.post("/sdapi/v1/img2img", &body).json();
    let picture = STANDARD.decode(reply["images"][0].as_str().expect("base64")).expect("base64");
    std::fs::write(place.path("d.png"), picture).expect("written");
    let pixels = |name: &str| megafuse::image::read_image(&place.path(name)).expect("a PNG").2;
    assert!(pixels("c.png") == pixels("d.png"));

    let names = |path: &str, field: &str| -> Vec<String> {
        let list = server.get(path).json();
        list.as_array().expect("a list").iter().map(|item| item[field].as_str().expect("a name").to_string()).collect()
    };
    assert!(names("/sdapi/v1/samplers", "name").contains(&"DPM++ 2M".to_string()));
    assert!(names("/sdapi/v1/schedulers", "label").contains(&"Karras".to_string()));
    assert_eq!(names("/sdapi/v1/sd-models", "model_name"), ["pocket"]);
    assert_eq!(server.get("/sdapi/v1/options").json()["sd_model_checkpoint"], "pocket");
    assert_eq!(server.post("/sdapi/v1/options", &json!({"sd_model_checkpoint": "pocket [0123]"})).status, 200);
    assert_eq!(server.get("/v1/models").json()["data"][0]["id"], "pocket");
    assert_eq!(server.get("/sdapi/v1/progress").json()["progress"], 0.0);
}

#[test]
fn what_cannot_be_met_is_refused_by_name() {
    let flags = ["--max-steps", "20", "--max-pixels", "65536", "--max-count", "4", "--max-body", "1", "--queue", "8"];
    let server = Server::start(&flags);
    let long = "x".repeat(20_001);
    let jobs = |body: Value, field: &str, want: &str| {
        let reply = server.post("/v1/jobs", &body);
        assert_eq!(reply.status, 400, "{body}: {}", String::from_utf8_lossy(&reply.body));
        assert_eq!(reply.json()["error"]["param"], field, "{body}: {}", reply.message());
        assert!(reply.message().contains(want), "{body}: {}", reply.message());
    };
    jobs(json!({"prompt": "x", "size": "65x64"}), "size", "the nearest is 64x64");
    jobs(json!({"prompt": "x", "size": "64"}), "size", "WIDTHxHEIGHT");
    jobs(json!({"prompt": "x", "size": "512x512"}), "size", "more than 65536 pixels, this server's limit");
    jobs(json!({"prompt": "x", "size": "16384x16384"}), "size", "more than 65536 pixels");
    jobs(json!({"prompt": "x", "steps": 21}), "steps", "at most 20 in all");
    jobs(json!({"prompt": "x", "steps": 0}), "steps", "1 to 1000");
    jobs(json!({"prompt": "x", "method": "megafusion", "stages": "64x64:15,128x128:6"}), "steps", "at most 20");
    jobs(json!({"prompt": "x", "method": "magic"}), "method", "megafusion");
    jobs(json!({"prompt": "x", "method": "plain", "stages": ["64x64:5", "128x128:5"]}), "stages", "has one stage");
    jobs(json!({"prompt": "x", "dilation": 2}), "dilation", "has no effect with method plain");
    jobs(json!({"prompt": "x", "method": "megafusion", "dilation": "two"}), "dilation", "expected");
    jobs(json!({"prompt": "x", "guidance": -1}), "guidance", "0 to 1000");
    jobs(json!({"prompt": "x", "scheduler": "magic"}), "scheduler", "ddim");
    jobs(json!({"prompt": "x", "count": 5}), "count", "1 to 4");
    jobs(json!({"prompt": "x", "count": 0}), "count", "1 to 4");
    jobs(json!({"prompt": "x", "seed": 1.5}), "seed", "whole number");
    jobs(json!({"prompt": "x", "seed": [1]}), "seed", "whole number");
    jobs(json!({"prompt": "x", "seed": u64::MAX, "count": 2}), "seed", "exceed");
    jobs(json!({"prompt": "x", "priority": 11}), "priority", "-10 to 10");
    jobs(json!({"prompt": "x", "deadline_seconds": -1}), "deadline_seconds", "above 0");
    jobs(json!({"prompt": long}), "prompt", "at most 20000");
    jobs(json!({"prompt": "x", "init_image": "no base64!"}), "init_image", "not base64");
    jobs(json!({"prompt": "x", "init_image": STANDARD.encode("no picture")}), "init_image", "PNG, JPEG or WebP");
    jobs(json!({"prompt": "x", "mask": "AAAA"}), "mask", "give init_image too");
    jobs(json!({"prompt": "x", "strength": 0.5}), "strength", "give init_image too");
    // A picture that claims far more pixels than it has bytes is refused before it is decoded.
    let place = Place::with(&["--device", "cpu"]);
    megafuse::image::write_png(&place.path("big.png"), &vec![0; 512 * 512 * 3], 512, 512, Default::default())
        .expect("written");
    let bomb = STANDARD.encode(place.bytes("big.png"));
    jobs(json!({"prompt": "x", "init_image": bomb}), "init_image", "more than 65536 pixels");

    let status = |path: &str, body: Value| server.post(path, &body).status;
    assert_eq!(status("/v1/jobs", json!({"prompt": 5})), 422);
    assert_eq!(status("/v1/jobs", json!([])), 422);
    assert_eq!(server.ask("POST", "/v1/jobs", &[], "{").status, 400);
    assert_eq!(server.ask("POST", "/v1/jobs", &[("content-type", "text/plain")], "{}").status, 415);
    assert_eq!(status("/v1/jobs", json!({"prompt": "x".repeat(1 << 20)})), 413);
    assert_eq!(status("/v1/images/generations", json!({"prompt": "x", "model": "dall-e-3"})), 404);
    assert_eq!(status("/v1/images/generations", json!({"n": 1})), 422);
    for (field, value) in [("response_format", "jpeg"), ("output_format", "webp"), ("size", "big")] {
        assert_eq!(status("/v1/images/generations", json!({"prompt": "x", field: value})), 400, "{field}");
    }
    assert_eq!(status("/v1/images/generations", json!({"prompt": "x", "megafuse": {"steps": "many"}})), 400);
    for (field, value) in [("sampler_name", json!("Magic")), ("scheduler", json!("Magic")), ("width", json!(65))] {
        assert_eq!(status("/sdapi/v1/txt2img", json!({"prompt": "x", field: value})), 400, "{field}");
    }
    let sized = json!({"prompt": "x", "enable_hr": true, "hr_scale": 100, "width": 64, "height": 64});
    assert_eq!(status("/sdapi/v1/txt2img", sized), 400);
    assert_eq!(status("/sdapi/v1/txt2img", json!({"override_settings": {"sd_model_checkpoint": "other"}})), 404);
    assert_eq!(status("/sdapi/v1/options", json!({"sd_model_checkpoint": "other"})), 404);
    assert_eq!(status("/sdapi/v1/img2img", json!({"prompt": "x"})), 400);
    assert_eq!(status("/sdapi/v1/png-info", json!({"image": "AAAA"})), 400);
    for path in
        ["/v1/jobs/none", "/v1/jobs/none/events", "/v1/files/none.png", "/v1/files/..%2f..%2fetc%2fpasswd", "/nothing"]
    {
        assert_eq!(server.get(path).status, 404, "{path}");
    }
    assert_eq!(server.ask("DELETE", "/v1/jobs/none", &[], "").status, 404);
    assert_eq!(server.ask("PUT", "/v1/jobs", &[], "").status, 405);

    // What is merely odd is a warning.
    let odd = r#"{"prompt": "a red ball", "colour": "red", "negative_prompt": "blue", "guidance": 1}"#;
    let warnings = server.over(&server.submit(odd))["warnings"].to_string();
    assert!(
        warnings.contains("colour is not read") && warnings.contains("negative_prompt has no effect"),
        "{warnings}"
    );
    // Beyond the queue: this job's pictures wait while the first is made.
    let first = server.submit(r#"{"prompt": "x", "size": "256x256", "steps": 20, "count": 4}"#);
    server.until(|| server.is_running(&first));
    let second = server.submit(r#"{"prompt": "x", "count": 4}"#);
    assert_eq!(server.status(&second)["before"], 3);
    assert_eq!(server.metric("megafuse_queue_pictures"), 7.0);
    let full = server.post("/v1/jobs", &json!({"prompt": "x", "count": 4}));
    assert_eq!(full.status, 429, "{}", String::from_utf8_lossy(&full.body));
    assert!(full.headers["retry-after"].to_str().expect("text").parse::<u64>().expect("seconds") >= 1);
    assert!(full.message().contains("7 pictures wait"), "{}", full.message());
    assert_eq!(server.metric("megafuse_jobs_refused_total"), 1.0);
    server.post("/sdapi/v1/interrupt", &json!({}));
    server.ask("DELETE", &format!("/v1/jobs/{second}"), &[], "");
    assert_eq!(server.metric("megafuse_queue_pictures"), 0.0);
}

#[test]
fn hosts_origins_and_clients_without_the_token_are_refused() {
    let server = Server::with(&["--allow-host", "gpu.example"], |command| {
        command.env("MEGAFUSE_API_TOKEN", "correct horse");
    });
    let open = ("authorization", "Bearer correct horse");
    for (path, headers, want) in [
        ("/healthz", &[][..], 200),
        ("/readyz", &[], 200),
        ("/metrics", &[], 401),
        ("/openapi.json", &[], 401),
        ("/v1/models", &[("authorization", "Bearer wrong")], 401),
        ("/v1/models", &[open], 200),
        ("/v1/models", &[open, ("host", "gpu.example:80")], 200),
        ("/v1/models", &[open, ("host", "evil.example")], 403),
        ("/v1/models", &[open, ("origin", "https://evil.example")], 403),
    ] {
        assert_eq!(server.ask("GET", path, headers, "").status, want, "{path} {headers:?}");
    }
    assert_eq!(server.ask("POST", "/v1/jobs", &[], ENDLESS).status, 401);
    assert_eq!(server.ask("GET", "/metrics", &[], "").headers["www-authenticate"], "Bearer, Basic realm=\"megafuse\"");
    let taken = server.ask("GET", "/metrics", &[open], "");
    assert!(String::from_utf8(taken.body).expect("text").contains("megafuse_jobs_taken_total 0"));

    let place = Place::with(&[]);
    let refused = place.fails(2, &["serve", "--addr", "0.0.0.0:0"]);
    assert!(
        refused.contains("--addr 0.0.0.0:0: other machines reach it") && refused.contains("--api-token"),
        "{refused}"
    );
    let refused = place.fails(2, &["serve", "--api-token", "short"]);
    assert!(refused.contains("--api-token") && !refused.contains("short,"), "{refused}");
    assert!(place.fails(2, &["serve", "--queue", "0"]).contains("--queue 0: expected at least 1"));
    let taken = place.fails(1, &["serve", "--addr", &server.address]);
    assert!(taken.contains(&server.address), "{taken}");
}

#[test]
fn a_job_tells_where_it_stands_until_it_is_over() {
    let server = Server::start(&[]);
    let id = server.submit(
        r#"{"prompt": "a red ball", "steps": 5, "count": 2, "method": "megafusion", "stages": "64x64:4,96x96:1"}"#,
    );
    let events = String::from_utf8(server.get(&format!("/v1/jobs/{id}/events")).body).expect("text");
    let seen: Vec<Value> = events
        .lines()
        .filter_map(|line| line.strip_prefix("data:"))
        .map(|data| serde_json::from_str(data).expect("JSON"))
        .collect();
    let last = seen.last().expect("an event");
    assert_eq!((&last["state"], &last["made"]), (&json!("done"), &json!(2)));
    let steps: Vec<(u64, u64)> = seen
        .iter()
        .map(|now| (now["made"].as_u64().expect("a number"), now["step"].as_u64().expect("a number")))
        .collect();
    assert!(steps.len() > 4, "{steps:?}");
    assert!(seen.iter().any(|now| now["stage"] == 2 && now["size"] == "96x96" && now["stages"] == 2), "{events}");
    assert!(seen.iter().any(|now| now["eta_seconds"].is_number() && now["steps_per_second"].is_number()), "{events}");
    assert_eq!(server.get("/v1/jobs").json()[0], *last);
    // One who comes late gets the end at once.
    let late = String::from_utf8(server.get(&format!("/v1/jobs/{id}/events")).body).expect("text");
    assert_eq!(late.matches("event: status").count(), 1);
}

#[test]
fn jobs_end_when_they_are_told_or_late_or_their_client_goes() {
    let server = Server::start(&[]);
    let running = server.submit(ENDLESS);
    server.until(|| server.is_running(&running));
    let waiting = server.submit(ENDLESS);
    let cancelled = server.ask("DELETE", &format!("/v1/jobs/{waiting}"), &[], "").json();
    assert_eq!((&cancelled["state"], &cancelled["made"]), (&json!("cancelled"), &json!(0)));
    server.ask("DELETE", &format!("/v1/jobs/{running}"), &[], "");
    assert_eq!(server.over(&running)["state"], "cancelled");

    let late = server.submit(r#"{"prompt": "x", "size": "256x256", "steps": 200, "deadline_seconds": 0.5}"#);
    let status = server.over(&late);
    assert_eq!((&status["state"], &status["error"]), (&json!("failed"), &json!("its deadline has passed")));

    let body = r#"{"prompt": "x", "size": "256x256", "megafuse": {"steps": 200}}"#;
    for path in ["/v1/images/generations", "/sdapi/v1/txt2img"] {
        let before = server.metric("megafuse_jobs_cancelled_total");
        let mut client = TcpStream::connect(&server.address).expect("a connection");
        let length = body.len();
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
        );
        client.write_all(format!("{head}{body}").as_bytes()).expect("sent");
        server.until(|| server.get("/v1/jobs").json()[0]["state"] == "running");
        drop(client);
        server.until(|| server.metric("megafuse_jobs_cancelled_total") == before + 1.0);
    }
    let running = server.submit(ENDLESS);
    server.until(|| server.is_running(&running));
    assert!(server.get("/sdapi/v1/progress").json()["state"]["job"] == running);
    server.post("/sdapi/v1/interrupt", &json!({}));
    assert_eq!(server.over(&running)["state"], "cancelled");
    // And the next one is made.
    assert_eq!(server.over(&server.submit(r#"{"prompt": "a red ball"}"#))["state"], "done");
}

#[test]
fn pictures_that_are_alike_are_made_together_with_the_bytes_of_each_alone() {
    let server = Server::start(&["--batch", "4"]);
    let blocking = server.submit(r#"{"prompt": "x", "size": "128x128", "steps": 10}"#);
    server.until(|| server.is_running(&blocking));
    let ids: Vec<String> = (0..4)
        .map(|seed| {
            server.submit(&json!({"prompt": "a red ball", "seed": seed, "steps": 3, "guidance": 2 + seed}).to_string())
        })
        .collect();
    for (seed, id) in ids.iter().enumerate() {
        let (seed, guidance) = (seed.to_string(), (2 + seed).to_string());
        let alone = generated(&["--steps", "3", "--seed", &seed, "--guidance", &guidance]);
        assert!(server.picture(&server.over(id), 0) == alone, "seed {seed}");
    }
    assert_eq!(
        (server.metric("megafuse_batch_pictures_count"), server.metric("megafuse_batch_pictures_sum")),
        (2.0, 5.0)
    );
}

#[test]
fn models_are_asked_for_by_name_and_take_turns_in_memory() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = |name: &str| folder.path().join(name);
    copy(Path::new(MODEL), &path("one"));
    copy_changed(Path::new(MODEL), &path("two"), "scheduler/scheduler_config.json", "beta_end", json!(0.02));
    copy(Path::new(MODEL), &path("without"));
    std::fs::remove_file(path("without/unet/diffusion_pytorch_model.safetensors")).expect("removed");
    std::fs::write(path("readme.txt"), "no model").expect("written");
    // Left out, with a warning: the others are served.
    std::fs::create_dir(path("broken")).expect("a folder");
    std::fs::write(path("broken/model_index.json"), "{").expect("written");
    std::fs::write(path("damaged.safetensors"), "no weights").expect("written");
    let place = Place::with(&["--device", "cpu"]);
    let want = ["one", "two"].map(|name| {
        let model = path(name).display().to_string();
        place.ok(&[
            "generate", "a cat", "--model", &model, "--method", "plain", "--steps", "2", "--seed", "1", "--out",
            "a.png",
        ]);
        place.bytes("a.png")
    });
    assert!(want[0] != want[1]);

    let server = Server::start(&["--model-dir", &folder.path().display().to_string()]);
    let list = server.get("/v1/models").json();
    assert_eq!(
        list["data"].as_array().expect("a list").iter().map(|model| &model["id"]).collect::<Vec<_>>(),
        ["one", "two", "without"]
    );
    let made = |body: Value| {
        let status = server.over(&server.submit(&body.to_string()));
        assert_eq!(status["state"], "done", "{status}");
        server.picture(&status, 0)
    };
    for (name, want) in [("two", &want[1]), ("one", &want[0]), ("two", &want[1])] {
        assert!(made(json!({"prompt": "a cat", "seed": 1, "model": name})) == *want, "{name}");
    }
    assert!(made(json!({"prompt": "a cat", "seed": 1})) == want[0], "the default");
    let own = json!({"model": "two", "stages": "64x64:2", "seed": 1});
    let body = json!({"prompt": "a cat", "model": "one", "size": "16x16", "megafuse": own});
    let reply = server.post("/v1/images/generations", &body).json();
    let name = reply["megafuse"]["job"].as_str().expect("a job");
    let status = server.status(name);
    assert_eq!((&status["model"], &status["pictures"][0]["parameters"]["size"]), (&json!("two"), &json!("64x64")));
    let body = json!({"prompt": "a cat", "enable_hr": true, "width": 16, "height": 16, "megafuse": {"size": "32x32", "method": "plain", "model": "two"}});
    let info = server.post("/sdapi/v1/txt2img", &body).json()["info"].as_str().expect("a string").to_string();
    let info: Value = serde_json::from_str(&info).expect("JSON");
    assert_eq!((&info["sd_model_name"], &info["width"]), (&json!("two"), &json!(32)));
    // One that cannot be read fails its jobs alone.
    let broken = server.over(&server.submit(r#"{"prompt": "a cat", "model": "without"}"#));
    assert!(broken["error"].as_str().expect("an error").contains("without"), "{broken}");
    assert!(made(json!({"prompt": "a cat", "seed": 1})) == want[0], "the next");

    let asked = server.post("/v1/jobs", &json!({"prompt": "a cat", "model": "../one"}));
    assert_eq!(asked.status, 404);
    assert!(asked.message().contains(r#"this server has "one", "two", "without""#), "{}", asked.message());
    let decoded = |reply: Reply| STANDARD.decode(reply.json()["images"][0].as_str().expect("base64")).expect("base64");
    let body = json!({"prompt": "a cat", "seed": 1, "override_settings": {"sd_model_checkpoint": "two"}});
    assert!(decoded(server.post("/sdapi/v1/txt2img", &body)) == want[1]);
    assert_eq!(server.post("/sdapi/v1/options", &json!({"sd_model_checkpoint": "two [0123]"})).status, 200);
    assert_eq!(server.get("/sdapi/v1/options").json()["sd_model_checkpoint"], "two");
    assert!(decoded(server.post("/sdapi/v1/txt2img", &json!({"prompt": "a cat", "seed": 1}))) == want[1]);

    let empty = tempfile::tempdir().expect("a temporary folder");
    let refused = place.fails(1, &["serve", "--model-dir", &empty.path().display().to_string()]);
    assert!(refused.contains("holds no model: expected"), "{refused}");
    copy(&path("broken"), &empty.path().join("broken"));
    let refused = place.fails(1, &["serve", "--model-dir", &empty.path().display().to_string()]);
    assert!(
        refused.contains("broken is left out") && refused.contains("holds no model that can be served"),
        "{refused}"
    );
    // --model itself is not left out.
    let broken = path("broken").display().to_string();
    let refused = place.fails(1, &["serve", "--model", &broken, "--model-dir", &folder.path().display().to_string()]);
    assert!(refused.contains("error:") && refused.contains("model_index.json"), "{refused}");
}

#[test]
fn a_panic_fails_its_job_and_no_other() {
    let server = Server::with(&[], |command| {
        command.env("MEGAFUSE_TEST_PANIC", "a green cone");
    });
    let status = server.over(&server.submit(r#"{"prompt": "a green cone"}"#));
    assert_eq!(status["state"], "failed");
    assert!(status["error"].as_str().expect("a text").contains("internal error"), "{status}");
    assert_eq!(server.over(&server.submit(r#"{"prompt": "a red ball"}"#))["state"], "done");
    let reply = server.post("/v1/images/generations", &json!({"prompt": "a green cone"}));
    assert_eq!(reply.status, 500);
    assert!(reply.message().contains("internal error"));
}

#[test]
fn a_signal_lets_what_was_taken_be_finished_and_a_second_ends_at_once() {
    let mut server = Server::start(&[]);
    let id = server.submit(r#"{"prompt": "x", "size": "128x128", "steps": 24, "count": 2}"#);
    server.until(|| server.is_running(&id));
    server.signal("-TERM");
    server.until(|| server.get("/readyz").status == 503);
    assert_eq!((server.get("/healthz").status, server.post("/v1/jobs", &json!({"prompt": "x"})).status), (200, 503));
    let events = String::from_utf8(server.get(&format!("/v1/jobs/{id}/events")).body).expect("text");
    assert!(events.contains("\"state\":\"done\""), "{events}");
    assert_eq!(server.process.wait().expect("it ends").code(), Some(0));

    let mut server = Server::start(&[]);
    let id = server.submit(ENDLESS);
    server.until(|| server.is_running(&id));
    server.signal("-INT");
    server.until(|| server.get("/readyz").status == 503);
    server.signal("-INT");
    assert_eq!(server.process.wait().expect("it ends").code(), Some(130));
}

/// Bodies with one thing wrong, drawn from a seed: whatever they are, the server says so or makes a picture, and goes on.
#[test]
fn no_body_is_an_internal_error() {
    let flags = ["--max-pixels", "4096", "--max-steps", "2", "--max-count", "2", "--size", "64x64", "--batch", "2"];
    let server = Server::start(&flags);
    let bodies = [
        (
            "/v1/plan",
            json!({"prompt": "x", "negative_prompt": "y", "method": "megafusion", "size": "64x64", "stages": ["64x64:2"],
            "steps": 2, "guidance": 2, "guidance_rescale": 0.5, "guidance_high": null, "scheduler": "ddim", "sigmas": "uniform", "eta": 0.5,
            "clip_skip": 1, "prompt_syntax": "a1111", "rng": "torch-cpu", "seed": 1, "count": 1, "init_image": "AAAA", "mask": "AAAA",
            "strength": 0.5, "priority": 1, "deadline_seconds": 9, "dilation": 2, "reschedule": true, "upsampler": "bicubic"}),
        ),
        (
            "/v1/images/generations",
            json!({"prompt": "x", "model": "pocket", "n": 1, "size": "64x64", "response_format": "url", "stream": false,
            "output_format": "png", "megafuse": {"steps": 1, "seed": 3}}),
        ),
        (
            "/sdapi/v1/txt2img",
            json!({"prompt": "x", "negative_prompt": "y", "seed": 1, "steps": 1, "cfg_scale": 2, "width": 64, "height": 64,
            "sampler_name": "Euler a", "scheduler": "Karras", "batch_size": 1, "n_iter": 1, "eta": 1, "enable_hr": false, "hr_scale": 2,
            "hr_resize_x": 64, "hr_resize_y": 64, "denoising_strength": 0.5, "send_images": true, "override_settings": {}, "megafuse": {}}),
        ),
    ];
    let values = [
        json!(null),
        json!(-1),
        json!(0),
        json!(1e300),
        json!(u64::MAX),
        json!(0.5),
        json!(true),
        json!(""),
        json!("x"),
        json!("\u{0}\u{10ffff}"),
        json!("1x1:1,"),
        json!("18446744073709551616"),
        json!([]),
        json!([[]]),
        json!({}),
        json!({"a": 1}),
    ];
    let mut state = 0x1234_5678_9abc_def0u64;
    let mut below = |n: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % n
    };
    let mut seen = BTreeSet::new();
    for (path, body) in &bodies {
        for _ in 0..150 {
            let mut changed = body.clone();
            let fields: Vec<String> = changed.as_object().expect("an object").keys().cloned().collect();
            let field = &fields[below(fields.len())];
            // Pictures of the plan's body are no pictures: without them the others are looked at.
            if *path == "/v1/plan" && below(4) > 0 {
                ["init_image", "mask", "strength"]
                    .iter()
                    .for_each(|name| drop(changed.as_object_mut().expect("an object").remove(*name)));
            }
            changed[field] = values[below(values.len())].clone();
            let mut text = changed.to_string().into_bytes();
            if below(5) == 0 {
                let at = below(text.len());
                text[at] = b"\"{}[],:0\\x"[below(10)];
            }
            let Ok(text) = String::from_utf8(text) else { continue };
            let reply = server.ask("POST", path, &[], &text);
            assert!(reply.status < 500, "{path} {text}: {} {}", reply.status, String::from_utf8_lossy(&reply.body));
            seen.insert((*path, reply.status));
        }
    }
    for (path, _) in &bodies {
        for status in [200, 400, 422] {
            assert!(seen.contains(&(*path, status)), "{path} never gave {status}: {seen:?}");
        }
    }
    assert_eq!(server.metric("megafuse_jobs_failed_total"), 0.0);
}

/// Every route that the document names is there, and says what it may reply.
#[test]
fn the_document_describes_every_route() {
    let server = Server::start(&[]);
    let document = server.get("/openapi.json").json();
    let paths = document["paths"].as_object().expect("paths");
    assert!(paths.len() > 15);
    let mut methods = BTreeSet::new();
    for (path, operations) in paths {
        for (method, operation) in operations.as_object().expect("operations") {
            methods.insert(format!("{method} {path}"));
            assert!(
                operation["responses"]
                    .as_object()
                    .is_some_and(|replies| replies.contains_key("200") || replies.contains_key("202")),
                "{path}"
            );
            if method == "get" && !path.contains('{') {
                assert_eq!(server.get(path).status, 200, "{path}");
            }
        }
    }
    for route in [
        "post /v1/jobs",
        "delete /v1/jobs/{id}",
        "post /v1/images/generations",
        "post /sdapi/v1/txt2img",
        "get /metrics",
    ] {
        assert!(methods.contains(route), "{route}: {methods:?}");
    }
}
