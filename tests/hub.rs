//! Models of the Hugging Face hub, against a server that the tests are: nothing here asks the real one, or touches the
//! cache of this machine.

#[path = "common/drawn.rs"]
mod drawn;
#[path = "common/place.rs"]
mod place;
#[path = "common/torch_file.rs"]
mod torch_file;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use megafuse::pipeline::{HubName, HubNeed, HubObserver, HubSettings, ModelFiles, ModelSource, fetch_model};
use megafuse::{DType, Result};
use place::{MODEL, Place, text};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const LATER_COMMIT: &str = "fedcba9876543210fedcba9876543210fedcba98";
const F32: HubNeed = HubNeed::Weights(DType::F32);
const UNET: &str = "unet/diffusion_pytorch_model.safetensors";

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Contents by path.
type Files = BTreeMap<String, Vec<u8>>;

/// The files below a folder, by their paths in it.
fn files_of(folder: &Path) -> Files {
    let (mut files, mut folders) = (BTreeMap::new(), vec![folder.to_path_buf()]);
    while let Some(next) = folders.pop() {
        for path in fs::read_dir(next).unwrap().map(|entry| entry.unwrap().path()) {
            match path.is_dir() {
                true => folders.push(path),
                false => {
                    let name = path.strip_prefix(folder).unwrap().display().to_string();
                    files.insert(name, fs::read(&path).unwrap());
                }
            }
        }
    }
    files
}

#[derive(Clone, Debug, PartialEq)]
struct Asked {
    path: String,
    range: Option<String>,
    authorization: Option<String>,
}

/// What the server has and how it misbehaves.
struct State {
    commit: String,
    files: Files,
    asked: Vec<Asked>,
    /// Answers for addresses with this in them: status, x-error-code, how often.
    refusals: Vec<(&'static str, u16, &'static str, usize)>,
    /// Connections end after so many bytes of a file with this in its name: how often.
    cuts: Vec<(&'static str, usize, usize)>,
    /// Ranges are not understood.
    whole_always: bool,
    /// Other bytes are sent than are listed.
    corrupt: bool,
    /// So many bytes more are listed than are sent.
    longer_by: u64,
    /// Large files come from there.
    redirect: Option<String>,
    /// In place of the listing.
    listing: Option<String>,
    /// Before every answer with a file.
    delay: Duration,
}

/// A hub with the model acme/tiny.
struct Hub {
    address: String,
    state: Arc<Mutex<State>>,
}

impl Hub {
    fn new() -> Hub {
        Hub::with(files_of(Path::new(MODEL)))
    }

    fn with(files: Files) -> Hub {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = format!("http://{}", listener.local_addr().unwrap());
        let state = State {
            commit: COMMIT.into(),
            files,
            asked: Vec::new(),
            refusals: Vec::new(),
            cuts: Vec::new(),
            whole_always: false,
            corrupt: false,
            longer_by: 0,
            redirect: None,
            listing: None,
            delay: Duration::ZERO,
        };
        let state = Arc::new(Mutex::new(state));
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = Arc::clone(&shared);
                std::thread::spawn(move || answer(stream, &state));
            }
        });
        Hub { address, state }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// The paths of files that were asked for, in order; forgets them.
    fn files_asked(&self) -> Vec<String> {
        let asked = std::mem::take(&mut self.state().asked);
        asked
            .iter()
            .filter_map(|asked| Some(asked.path.split_once("/resolve/")?.1.split_once('/')?.1.to_string()))
            .collect()
    }

    fn weights_asked(&self) -> Vec<String> {
        self.files_asked().into_iter().filter(|path| path.ends_with(".safetensors")).collect()
    }
}

/// Answers one request per connection.
fn answer(mut stream: TcpStream, state: &Mutex<State>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut line = String::new();
    if reader.read_line(&mut line).is_err() || line.is_empty() {
        return;
    }
    let path = line.split(' ').nth(1).unwrap_or_default().to_string();
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        match line.trim().split_once(": ") {
            Some((name, value)) => drop(headers.insert(name.to_ascii_lowercase(), value.to_string())),
            None => break,
        }
    }
    let range = headers.get("range").cloned();
    let mut state = state.lock().unwrap();
    state.asked.push(Asked {
        path: path.clone(),
        range: range.clone(),
        authorization: headers.get("authorization").cloned(),
    });
    let head = |status: &str, length: usize, more: &str| {
        format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\nconnection: close\r\n{more}\r\n")
    };
    let mut send = |head: String, body: &[u8]| {
        let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
    };
    let refusal = state.refusals.iter_mut().find(|(part, _, _, times)| path.contains(part) && *times > 0);
    if let Some((_, status, code, times)) = refusal {
        *times -= 1;
        let more = if code.is_empty() { String::new() } else { format!("x-error-code: {code}\r\n") };
        return send(head(&format!("{status} No"), 2, &more), b"no");
    }
    if path.starts_with("/api/models/acme/tiny/revision/") {
        let entry = |(path, bytes): (&String, &Vec<u8>)| {
            let (hash, size) = (sha256(bytes), bytes.len() as u64 + state.longer_by);
            let mut entry = json!({"rfilename": path, "size": size, "blobId": &hash[..40]});
            if path.ends_with(".safetensors") {
                entry["lfs"] = json!({"sha256": hash, "size": size, "pointerSize": 134});
            }
            entry
        };
        let siblings: Vec<Value> = state.files.iter().map(entry).collect();
        let listing = json!({"id": "acme/tiny", "sha": state.commit, "siblings": siblings}).to_string();
        let listing = state.listing.clone().unwrap_or(listing);
        return send(head("200 OK", listing.len(), "content-type: application/json\r\n"), listing.as_bytes());
    }
    let name = path.split_once("/resolve/").and_then(|(_, rest)| Some(rest.split_once('/')?.1.to_string()));
    let Some((name, mut bytes)) = name.and_then(|name| Some((name.clone(), state.files.get(&name)?.clone()))) else {
        return send(head("404 Not Found", 0, ""), b"");
    };
    if let Some(to) = state.redirect.as_ref().filter(|_| name.ends_with(".safetensors")) {
        let location = format!("location: {to}{path}\r\n");
        return send(head("302 Found", 0, &location), b"");
    }
    if state.corrupt && name.ends_with(".safetensors") {
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
    }
    let from: Option<usize> = range.filter(|_| !state.whole_always).map(|range| {
        let from = range.strip_prefix("bytes=").and_then(|range| range.strip_suffix('-')).expect("an open range");
        from.parse().unwrap()
    });
    let total = bytes.len();
    let mut rest = bytes[from.unwrap_or(0).min(total)..].to_vec();
    let head = match from {
        Some(from) if from >= total => return send(head("416 Range Not Satisfiable", 0, ""), b""),
        Some(from) => {
            let more = format!("content-range: bytes {from}-{}/{total}\r\n", total - 1);
            head("206 Partial Content", rest.len(), &more)
        }
        None => head("200 OK", rest.len(), ""),
    };
    let cut = state.cuts.iter_mut().find(|(part, _, times)| name.contains(part) && *times > 0);
    if let Some((_, after, times)) = cut {
        *times -= 1;
        rest.truncate(*after);
    }
    let delay = state.delay;
    drop(state);
    std::thread::sleep(delay);
    send(head, &rest);
}

/// Keeps what it is told.
#[derive(Default)]
struct Log {
    warnings: Vec<String>,
    /// Files, bytes.
    begun: Vec<(usize, u64)>,
    last: u64,
}

impl HubObserver for Log {
    fn begin(&mut self, files: usize, bytes: u64) {
        self.begun.push((files, bytes));
    }
    fn position(&mut self, _name: &str, done: u64) {
        self.last = done;
    }
    fn end(&mut self) {}
    fn warning(&mut self, message: &str) {
        self.warnings.push(message.into());
    }
}

/// A cache of its own, and a hub to fill it from.
struct Cache {
    /// Removed with it.
    _folder: tempfile::TempDir,
    settings: HubSettings,
}

impl Cache {
    fn of(hub: &Hub) -> Cache {
        let folder = tempfile::tempdir().unwrap();
        let settings = HubSettings {
            cache: folder.path().join("hub"),
            endpoint: hub.address.clone(),
            token: None,
            certificates: None,
            offline: false,
            lock_patience: Duration::from_millis(400),
            retry_delay: Duration::from_millis(1),
        };
        Cache { _folder: folder, settings }
    }

    fn get_noting(&self, name: &str, need: HubNeed, log: &mut Log) -> Result<PathBuf> {
        fetch_model(&name.parse::<HubName>()?, need, &self.settings, log)
    }

    fn get(&self, name: &str, need: HubNeed) -> Result<PathBuf> {
        self.get_noting(name, need, &mut Log::default())
    }

    fn error(&self, name: &str, need: HubNeed) -> String {
        self.get(name, need).expect_err(name).to_string()
    }

    /// `models--acme--tiny/` and further.
    fn path(&self, inside: &str) -> PathBuf {
        self.settings.cache.join("models--acme--tiny").join(inside)
    }

    fn blob(&self, bytes: &[u8]) -> PathBuf {
        self.path("blobs").join(sha256(bytes))
    }

    fn incomplete(&self, bytes: &[u8]) -> PathBuf {
        self.path("blobs").join(format!("{}.incomplete", sha256(bytes)))
    }

    fn offline(mut self) -> Cache {
        (self.settings.offline, self.settings.endpoint) = (true, NOWHERE.into());
        self
    }
}

/// Nothing listens here.
const NOWHERE: &str = "http://127.0.0.1:9";

fn assert_parts(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{part} in: {message}");
    }
}

/// What a model of the family is read from, and nothing else.
fn needed() -> Vec<String> {
    let wanted = |path: &&String| !path.starts_with("oracle") && path.as_str() != "README.md";
    files_of(Path::new(MODEL)).keys().filter(wanted).cloned().collect()
}

#[test]
fn a_model_is_fetched_whole_and_then_not_again() {
    let hub = Hub::new();
    for other in [
        "unet/diffusion_pytorch_model.bin",
        "tiny.ckpt",
        "unet/model.onnx",
        "vae/flax_model.msgpack",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "safety_checker/model.safetensors",
        "x.safetensors",
    ] {
        hub.state().files.insert(other.into(), b"not wanted".to_vec());
    }
    let cache = Cache::of(&hub);
    let mut log = Log::default();
    let place = cache.get_noting("acme/tiny", F32, &mut log).unwrap();
    assert_eq!(place, cache.path("snapshots").join(COMMIT));
    let mut asked = hub.files_asked();
    assert_eq!(asked[0], "model_index.json");
    asked.sort();
    assert_eq!(asked, needed());
    for (path, bytes) in files_of(Path::new(MODEL)).iter().filter(|(path, _)| needed().contains(path)) {
        assert_eq!(&fs::read(place.join(path)).unwrap(), bytes, "{path}");
        #[cfg(unix)]
        assert!(fs::read_link(place.join(path)).unwrap().starts_with("../../"), "{path} is a link into blobs");
    }
    assert_eq!(fs::read_to_string(cache.path("refs/main")).unwrap(), COMMIT);
    assert!(fs::read_dir(cache.path("blobs")).unwrap().all(|blob| blob.unwrap().path().extension().is_none()));
    let weights: u64 = ["text_encoder/model.safetensors", UNET, "vae/diffusion_pytorch_model.safetensors"]
        .iter()
        .map(|path| fs::metadata(place.join(path)).unwrap().len())
        .sum();
    assert_eq!(log.begun.last(), Some(&(3, weights)));
    assert_eq!((log.last, log.warnings.len()), (weights, 0));
    assert_eq!(ModelFiles::open(&ModelSource::Directory(place.clone())).unwrap().name(), "acme/tiny");

    assert_eq!(cache.get("acme/tiny", F32).unwrap(), place);
    let again: Vec<String> = hub.state().asked.iter().map(|asked| asked.path.clone()).collect();
    assert_eq!(again, ["/api/models/acme/tiny/revision/main?blobs=true"]);
}

/// The folders of a DeepFloyd IF are those that a Stable Diffusion has too, without the VAE's; its second stage has a scheduler more.
#[test]
fn a_model_over_pixels_is_fetched_whole() {
    let hub = Hub::new();
    let files = files_of(&drawn::folder("if/ii-l"));
    let wanted: Vec<String> = files.keys().filter(|path| !path.ends_with(".drawn.json")).cloned().collect();
    hub.state().files = files;
    hub.state().files.insert("watermarker/model.safetensors".into(), b"not wanted".to_vec());
    let cache = Cache::of(&hub);
    let place = cache.get("acme/tiny", F32).unwrap();
    let mut asked = hub.files_asked();
    asked.sort();
    assert_eq!(asked, wanted);
    assert!(place.join("image_noising_scheduler/scheduler_config.json").is_file());
    ModelFiles::open(&ModelSource::Directory(place)).unwrap().t5_tokenizer("tokenizer").unwrap();
}

#[test]
fn a_plan_needs_no_weights() {
    let hub = Hub::new();
    let cache = Cache::of(&hub);
    let place = cache.get("acme/tiny", HubNeed::Configurations).unwrap();
    assert_eq!(hub.weights_asked(), [""; 0]);
    assert!(place.join("unet/config.json").is_file() && !place.join(UNET).exists());
    // A plan of a later commit does not take the weights of the earlier one away.
    cache.get("acme/tiny", F32).unwrap();
    hub.state().commit = LATER_COMMIT.into();
    assert!(cache.get("acme/tiny", HubNeed::Configurations).unwrap().ends_with(LATER_COMMIT));
    assert!(cache.offline().get("acme/tiny", F32).unwrap().ends_with(COMMIT));
}

#[test]
fn a_later_commit_fetches_what_has_changed() {
    let hub = Hub::new();
    let cache = Cache::of(&hub);
    cache.get("acme/tiny", F32).unwrap();
    hub.files_asked();
    {
        let mut state = hub.state();
        state.commit = LATER_COMMIT.into();
        state.files.get_mut("unet/config.json").unwrap().push(b'\n');
    }
    let place = cache.get("acme/tiny", F32).unwrap();
    assert!(place.ends_with(LATER_COMMIT));
    assert_eq!(hub.files_asked(), ["unet/config.json"]);
    assert_eq!(fs::read_to_string(cache.path("refs/main")).unwrap(), LATER_COMMIT);
    assert_eq!(fs::read(place.join("unet/config.json")).unwrap().last(), Some(&b'\n'));
    assert!(
        cache.get(&format!("acme/tiny@{COMMIT}"), F32).unwrap().ends_with(COMMIT),
        "the earlier one is still there"
    );
}

#[test]
fn revisions() {
    let hub = Hub::new();
    let cache = Cache::of(&hub);
    cache.get("acme/tiny@refs/pr/1", F32).unwrap();
    assert_eq!(hub.state().asked[0].path, "/api/models/acme/tiny/revision/refs%2Fpr%2F1?blobs=true");
    assert_eq!(fs::read_to_string(cache.path("refs/refs/pr/1")).unwrap(), COMMIT);
    assert!(!cache.path("refs/main").exists());

    // A commit is asked about once.
    let hub = Hub::new();
    let cache = Cache::of(&hub);
    let name = format!("acme/tiny@{COMMIT}");
    cache.get(&name, F32).unwrap();
    assert!(!cache.path("refs").exists());
    hub.files_asked();
    cache.get(&name, F32).unwrap();
    assert_eq!(hub.state().asked, []);
}

#[test]
fn sixteen_bits_take_the_fp16_weights() {
    let mut files = files_of(Path::new(MODEL));
    for path in needed().iter().filter(|path| path.ends_with(".safetensors")) {
        files.insert(
            path.replace(".safetensors", ".fp16.safetensors"),
            files[path].clone().into_iter().chain([0]).collect(),
        );
    }
    for dtype in [DType::F16, DType::BF16] {
        let hub = Hub::with(files.clone());
        let cache = Cache::of(&hub);
        cache.get("acme/tiny", HubNeed::Weights(dtype)).unwrap();
        let asked = hub.weights_asked();
        assert!(asked.len() == 3 && asked.iter().all(|path| path.contains(".fp16.")), "{asked:?}");
        // f32 wants more digits than are here; what it fetched is enough for the others.
        cache.get("acme/tiny", F32).unwrap();
        let asked = hub.weights_asked();
        assert!(asked.len() == 3 && asked.iter().all(|path| !path.contains(".fp16.")), "{asked:?}");
        cache.get("acme/tiny", HubNeed::Weights(dtype)).unwrap();
        assert_eq!(hub.weights_asked(), [""; 0]);
    }
    // What there is, where there is one form alone; offline it is said that f32 gets f16.
    files.retain(|path, _| !path.ends_with(".safetensors") || path.contains(".fp16."));
    let hub = Hub::with(files);
    let cache = Cache::of(&hub);
    cache.get("acme/tiny", F32).unwrap();
    assert_eq!(hub.weights_asked().len(), 3);
    let mut log = Log::default();
    cache.offline().get_noting("acme/tiny", F32, &mut log).unwrap();
    assert!(log.warnings.len() == 3 && log.warnings[0].contains("in f16 alone"), "{:?}", log.warnings);
}

#[test]
fn shards_come_before_their_index() {
    let files = files_of(&drawn::folder("sdxl-shards"));
    let shards = files.keys().filter(|path| path.ends_with(".safetensors") && path.contains("-of-")).count();
    let hub = Hub::with(files);
    let cache = Cache::of(&hub);
    hub.state().refusals.push(("00005-of-00005", 418, "", 1));
    assert_parts(&cache.error("acme/tiny", F32), &["acme/tiny: ", "answered 418"]);
    let snapshot = cache.path("snapshots").join(COMMIT);
    assert!(!snapshot.join("unet/diffusion_pytorch_model.safetensors.index.json").exists());
    hub.files_asked();
    let place = cache.get("acme/tiny", F32).unwrap();
    assert!(hub.weights_asked().len() < shards, "what was there is not fetched again");
    assert!(place.join("unet/diffusion_pytorch_model.safetensors.index.json").is_file());
    ModelFiles::open(&ModelSource::Directory(place)).unwrap();
    cache.offline().get("acme/tiny", F32).unwrap();
}

#[test]
fn a_cut_connection_goes_on() {
    let hub = Hub::new();
    let cache = Cache::of(&hub);
    hub.state().cuts.push((UNET, 1000, 2));
    let place = cache.get("acme/tiny", F32).unwrap();
    assert_eq!(fs::read(place.join(UNET)).unwrap(), hub.state().files[UNET]);
    let ranges: Vec<Option<String>> =
        hub.state().asked.iter().filter(|asked| asked.path.ends_with(UNET)).map(|asked| asked.range.clone()).collect();
    assert_eq!(ranges, [None, Some("bytes=1000-".into()), Some("bytes=2000-".into())]);
}

#[test]
fn an_interrupted_download_is_resumed_by_the_next_run() {
    let hub = Hub::new();
    let cache = Cache::of(&hub);
    let unet = hub.state().files[UNET].clone();
    hub.state().cuts.push((UNET, 1000, usize::MAX));
    let message = cache.error("acme/tiny", F32);
    assert_parts(&message, &[UNET, &format!("4000 of {} bytes are kept, and the next run goes on", unet.len())]);
    // Nothing half-written is taken for whole, here or by other programs.
    let snapshot = cache.path("snapshots").join(COMMIT);
    assert!(!cache.blob(&unet).exists() && fs::symlink_metadata(snapshot.join(UNET)).is_err());
    assert!(!cache.path("refs/main").exists());
    assert_eq!(fs::metadata(cache.incomplete(&unet)).unwrap().len(), 4000);

    hub.state().cuts.clear();
    hub.state().asked.clear();
    cache.get("acme/tiny", F32).unwrap();
    let first = hub.state().asked.iter().find(|asked| asked.path.ends_with(UNET)).unwrap().range.clone();
    assert_eq!(first.as_deref(), Some("bytes=4000-"));
    assert_eq!(fs::read(cache.blob(&unet)).unwrap(), unet);
    assert!(!cache.incomplete(&unet).exists());
}

/// A beginning of other bytes, one that is longer than the file, and one that is all of it.
#[test]
fn kept_beginnings_are_checked() {
    let hub = Hub::new();
    let unet = hub.state().files[UNET].clone();
    for (beginning, warned) in
        [(vec![7; 5000], true), (vec![7; unet.len() + 1], false), (vec![7; unet.len()], true), (unet.clone(), false)]
    {
        let cache = Cache::of(&hub);
        fs::create_dir_all(cache.path("blobs")).unwrap();
        fs::write(cache.incomplete(&unet), &beginning).unwrap();
        let mut log = Log::default();
        cache.get_noting("acme/tiny", F32, &mut log).unwrap();
        assert_eq!(fs::read(cache.blob(&unet)).unwrap(), unet);
        let damaged = log.warnings.iter().any(|warning| warning.contains("was damaged"));
        assert_eq!(damaged, warned, "{} bytes: {:?}", beginning.len(), log.warnings);
    }
}

#[test]
fn a_server_that_knows_no_ranges_sends_all_again() {
    let hub = Hub::new();
    let cache = Cache::of(&hub);
    hub.state().whole_always = true;
    hub.state().cuts.push((UNET, 1000, 1));
    let place = cache.get("acme/tiny", F32).unwrap();
    assert_eq!(fs::read(place.join(UNET)).unwrap(), hub.state().files[UNET]);
}

#[test]
fn other_bytes_than_those_listed_are_refused() {
    let hub = Hub::new();
    let cache = Cache::of(&hub);
    hub.state().corrupt = true;
    assert_parts(&cache.error("acme/tiny", F32), &["acme/tiny: ", "arrived with SHA-256", "the hub lists"]);
    assert!(fs::read_dir(cache.path("blobs")).unwrap().all(|blob| !blob.unwrap().path().ends_with("incomplete")));
    hub.state().corrupt = false;
    cache.get("acme/tiny", F32).unwrap();

    let hub = Hub::new();
    hub.state().longer_by = 3;
    let message = Cache::of(&hub).error("acme/tiny", F32);
    assert_parts(&message, &["model_index.json has ", " bytes where ", " are listed"]);
}

#[test]
fn the_token_goes_to_the_hub_alone() {
    let (hub, elsewhere) = (Hub::new(), Hub::new());
    hub.state().redirect = Some(elsewhere.address.clone());
    let mut cache = Cache::of(&hub);
    cache.settings.token = Some("hf_secret".into());
    let place = cache.get("acme/tiny", F32).unwrap();
    assert_eq!(fs::read(place.join(UNET)).unwrap(), hub.state().files[UNET]);
    let carried = |hub: &Hub| hub.state().asked.iter().map(|asked| asked.authorization.clone()).collect::<Vec<_>>();
    assert!(carried(&hub).iter().all(|token| token.as_deref() == Some("Bearer hf_secret")));
    assert_eq!(carried(&elsewhere), [None, None, None]);
    // From one place to another of the same hub it goes on.
    let hub = Hub::new();
    hub.state().redirect = Some("/moved".into());
    let mut cache = Cache::of(&hub);
    cache.settings.token = Some("hf_secret".into());
    assert_parts(&cache.error("acme/tiny", F32), &["redirects in a circle"]);
    assert!(carried(&hub).iter().all(Option::is_some));
}

#[test]
fn what_the_hub_refuses_is_said() {
    let page = |hub: &Hub| format!("{}/acme/tiny", hub.address);
    // Where, status, x-error-code, the token that is set, what is said.
    type Case = (&'static str, u16, &'static str, Option<&'static str>, &'static [&'static str]);
    let cases: [Case; 12] = [
        (
            "/api/",
            401,
            "RepoNotFound",
            None,
            &["no such path here", "no public model of this name", "HF_TOKEN", "PAGE"],
        ),
        ("/api/", 401, "", Some("hf_x"), &["refuses it with this token", "no model of this name"]),
        ("/api/", 403, "GatedRepo", Some("hf_x"), &["is gated (403", "accept its licence at PAGE", "HF_TOKEN"]),
        ("/resolve/", 401, "GatedRepo", None, &["is gated (401", "accept its licence at PAGE", "HF_TOKEN"]),
        ("/resolve/", 403, "", None, &["is gated (403", "accept its licence at PAGE"]),
        ("/api/", 404, "", None, &["no such path here", "no such model on the hub (404", "PAGE"]),
        ("@v9/api/", 404, "RevisionNotFound", None, &["has no revision v9", "PAGE"]),
        ("@v9/api/", 404, "", None, &["no such model, or it has no revision v9"]),
        ("/resolve/", 404, "EntryNotFound", None, &["model_index.json is listed and not there (404"]),
        ("/api/", 500, "", None, &["the server failed (500", "is not in the cache"]),
        ("/api/", 429, "", None, &["too many requests (429", "is not in the cache"]),
        ("/api/", 418, "", None, &["answered 418"]),
    ];
    for (part, status, code, token, wanted) in cases {
        let hub = Hub::new();
        let (name, part) = match part.strip_prefix("@v9") {
            Some(part) => ("acme/tiny@v9", part),
            None => ("acme/tiny", part),
        };
        hub.state().refusals.push((part, status, code, usize::MAX));
        let mut cache = Cache::of(&hub);
        cache.settings.token = token.map(String::from);
        let message = cache.error(name, F32);
        assert!(message.starts_with(&format!("{name}: ")), "{message}");
        for wanted in wanted {
            assert_parts(&message, &[&wanted.replace("PAGE", &page(&hub))]);
        }
        assert!(!message.contains("hf_x"), "the token in: {message}");
    }
    // What passes is tried again.
    for status in [500, 503, 429] {
        let hub = Hub::new();
        hub.state().refusals.extend([("/api/", status, "", 2), (UNET, status, "", 3)]);
        Cache::of(&hub).get("acme/tiny", F32).unwrap();
    }
}

#[test]
fn answers_that_are_no_listing_are_refused() {
    for (listing, part) in [
        ("<html>log in</html>", "sent no listing of a model: expected value"),
        ("", "sent no listing of a model: EOF"),
        ("[]", "sha is no commit"),
        ("{\"sha\": \"../../../x\", \"siblings\": []}", "sha is no commit"),
        ("{\"sha\": \"SHA\"}", "siblings is no list"),
        ("{\"sha\": \"SHA\", \"siblings\": [{}]}", "a file without a name"),
        (
            "{\"sha\": \"SHA\", \"siblings\": [{\"rfilename\": \"a\", \"size\": 1, \"blobId\": \"../x\"}]}",
            "without a hash",
        ),
        ("{\"sha\": \"SHA\", \"siblings\": [{\"rfilename\": \"a\", \"blobId\": \"SHA\"}]}", "a file without a size"),
        ("{\"sha\": \"SHA\", \"siblings\": []}", "holds neither model_index.json nor a safetensors or .ckpt file"),
        // A name that leads out of the cache is none of the model's files.
        (
            "{\"sha\": \"SHA\", \"siblings\": [{\"rfilename\": \"../x.safetensors\", \"size\": 1, \"blobId\": \"SHA\"}]}",
            "holds neither model_index.json nor a safetensors or .ckpt file",
        ),
    ] {
        let hub = Hub::new();
        hub.state().listing = Some(listing.replace("SHA", COMMIT));
        let cache = Cache::of(&hub);
        let message = cache.error("acme/tiny", F32);
        assert_parts(&message, &["acme/tiny: ", part]);
        assert!(!cache.settings.cache.exists(), "{listing} left something");
    }
}

#[test]
fn models_that_are_not_read_here_are_refused_before_their_weights_come() {
    let with = |change: &dyn Fn(&mut Files)| {
        let mut files = files_of(Path::new(MODEL));
        change(&mut files);
        let hub = Hub::with(files);
        let message = Cache::of(&hub).error("acme/tiny", F32);
        assert_eq!(hub.weights_asked(), [""; 0], "{message}");
        message
    };
    let flux =
        json!({"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}).to_string();
    let message = with(&|files| drop(files.insert("model_index.json".into(), flux.clone().into_bytes())));
    assert_parts(&message, &["model_index.json", "FLUX, which is not supported", "FluxPipeline"]);
    let message = with(&|files| drop(files.insert("model_index.json".into(), b"{".to_vec())));
    assert_parts(&message, &["model_index.json: not JSON"]);
    let message = with(&|files| {
        let unet = files.remove(UNET).unwrap();
        files.insert("unet/other.safetensors".into(), unet);
    });
    assert_parts(&message, &["unet has no diffusion_pytorch_model.safetensors; it holds other.safetensors"]);
    let index = json!({"weight_map": {"a": "../../x.safetensors"}}).to_string();
    let message = with(&|files| {
        files.remove(UNET);
        files.insert(format!("{UNET}.index.json"), index.clone().into_bytes());
    });
    assert_parts(&message, &["weight_map names the file \"../../x.safetensors\""]);
    let index = json!({"weight_map": {"a": "gone.safetensors"}}).to_string();
    let message = with(&|files| {
        files.remove(UNET);
        files.insert(format!("{UNET}.index.json"), index.clone().into_bytes());
    });
    assert_parts(&message, &["index.json names unet/gone.safetensors, which the model does not have"]);
}

#[test]
fn repositories_of_single_files() {
    let of =
        |names: &[&str]| Hub::with(names.iter().map(|name| (name.to_string(), name.as_bytes().to_vec())).collect());
    let hub = of(&["README.md", "tiny.safetensors", "tiny.ckpt"]);
    let cache = Cache::of(&hub);
    let plan = cache.error("acme/tiny", HubNeed::Configurations);
    assert_parts(&plan, &["tiny.safetensors is a single file", "generate fetches it"]);
    assert!(cache.get("acme/tiny", F32).unwrap().ends_with(format!("{COMMIT}/tiny.safetensors")));
    assert_eq!(hub.files_asked(), ["tiny.safetensors"]);
    cache.get("acme/tiny", HubNeed::Configurations).unwrap();
    cache.offline().get("acme/tiny", F32).unwrap();

    let hub = of(&["a.safetensors", "b.safetensors", "sub/c.safetensors"]);
    let cache = Cache::of(&hub);
    let message = cache.error("acme/tiny", F32);
    assert_parts(&message, &["2 checkpoints", "acme/tiny/a.safetensors, acme/tiny/b.safetensors"]);
    assert!(cache.get("acme/tiny/sub/c.safetensors", F32).unwrap().ends_with("sub/c.safetensors"));
    let message = cache.error("acme/tiny/d.safetensors", F32);
    assert_parts(&message, &["no file d.safetensors", "a.safetensors, b.safetensors, sub/c.safetensors"]);
    let cache = cache.offline();
    assert_parts(&cache.error("acme/tiny/a.safetensors", F32), &["a.safetensors is not in the cache", "hf download"]);
    // What torch wrote, where there is nothing else.
    let cache = Cache::of(&of(&["old.ckpt", "old.txt"]));
    assert!(cache.get("acme/tiny", F32).unwrap().ends_with("old.ckpt"));
    let message = Cache::of(&of(&["a.ckpt", "b.ckpt"])).error("acme/tiny", F32);
    assert_parts(&message, &["2 checkpoints", "acme/tiny/a.ckpt, acme/tiny/b.ckpt"]);
}

#[test]
fn weights_that_torch_wrote_come_where_there_is_no_safetensors() {
    let bin = "unet/diffusion_pytorch_model.bin";
    let mut files = files_of(Path::new(MODEL));
    let unet = torch_file::of_safetensors(&Path::new(MODEL).join(UNET));
    files.insert(bin.into(), unet);
    let text = "text_encoder/model.safetensors";
    files.insert("text_encoder/pytorch_model.bin".into(), torch_file::of_safetensors(&Path::new(MODEL).join(text)));
    let both = Hub::with(files.clone());
    Cache::of(&both).get("acme/tiny", F32).unwrap();
    assert!(both.weights_asked().iter().all(|name| name.ends_with(".safetensors")), "{:?}", both.weights_asked());
    files.remove(UNET);
    files.remove(text);
    let hub = Hub::with(files);
    let cache = Cache::of(&hub);
    let place = cache.get("acme/tiny", F32).unwrap();
    assert!(place.join(bin).is_file() && place.join("text_encoder/pytorch_model.bin").is_file());
    let cache = cache.offline();
    assert_eq!(cache.get("acme/tiny", F32).unwrap(), place);
    let loaded = ModelFiles::open(&ModelSource::Directory(place)).unwrap();
    loaded.unet(&megafuse::Device::cpu(), DType::F32).unwrap();
    loaded.clip("text_encoder", &megafuse::Device::cpu(), DType::F32).unwrap();
}

#[test]
fn offline_nothing_is_asked_and_what_is_missing_is_named() {
    let hub = Hub::new();
    let empty = Cache::of(&hub).offline();
    assert_parts(&empty.error("acme/tiny", F32), &["no such path here", "is not in the cache", "without --offline"]);
    let cache = Cache::of(&hub);
    cache.get("acme/tiny", F32).unwrap();
    let cache = cache.offline();
    cache.get("acme/tiny", F32).unwrap();
    cache.get(&format!("acme/tiny@{COMMIT}"), F32).unwrap();
    assert_parts(&cache.error("acme/tiny@v2", F32), &["no revision v2", "hf download acme/tiny --revision v2"]);
    let later = format!("acme/tiny@{LATER_COMMIT}");
    assert_parts(&cache.error(&later, F32), &["the cache has no revision fedcba"]);

    let snapshot = cache.path("snapshots").join(COMMIT);
    for (path, part) in [
        (UNET, "unet/diffusion_pytorch_model.safetensors is not in the cache"),
        ("scheduler/scheduler_config.json", "scheduler/scheduler_config.json is not in the cache"),
        ("vae/config.json", "vae/config.json is not in the cache"),
        ("tokenizer/merges.txt", "tokenizer/merges.txt is not in the cache"),
    ] {
        let bytes = fs::read(snapshot.join(path)).unwrap();
        fs::remove_file(snapshot.join(path)).unwrap();
        assert_parts(&cache.error("acme/tiny", F32), &[part, "hf download acme/tiny"]);
        fs::write(snapshot.join(path), bytes).unwrap();
    }
    cache.get("acme/tiny", F32).unwrap(); // a cache without links, as on Windows
}

#[test]
fn without_a_network_the_cache_serves() {
    let hub = Hub::new();
    let mut cache = Cache::of(&hub);
    cache.get("acme/tiny", F32).unwrap();
    cache.settings.endpoint = NOWHERE.into();
    let mut log = Log::default();
    cache.get_noting("acme/tiny", F32, &mut log).unwrap();
    assert_eq!(log.warnings.len(), 1, "{:?}", log.warnings);
    assert_parts(&log.warnings[0], &["acme/tiny", NOWHERE, "what is in the cache is used"]);
    fs::remove_file(cache.path("snapshots").join(COMMIT).join(UNET)).unwrap();
    let message = cache.error("acme/tiny", F32);
    assert_parts(&message, &["acme/tiny: ", NOWHERE, "unet/diffusion_pytorch_model.safetensors is not in the cache"]);
    cache.settings.endpoint = "http://no-such-host.invalid".into();
    assert_parts(&cache.error("acme/none", F32), &["no-such-host.invalid", "is not in the cache"]);
}

#[test]
fn damaged_caches_are_said_or_mended() {
    let hub = Hub::new();
    let fresh = || {
        let cache = Cache::of(&hub);
        cache.get("acme/tiny", F32).unwrap();
        cache
    };
    for (content, part) in [
        (&b""[..], "holds \"\", which is no commit"),
        (b"main", "holds \"main\", which is no commit"),
        (b"../../../etc", "which is no commit"),
        (b"\xff\xfe", "which is no commit"),
        (LATER_COMMIT.as_bytes(), "names the snapshot fedcba9876543210fedcba9876543210fedcba98, which is not there"),
    ] {
        let cache = fresh();
        fs::write(cache.path("refs/main"), content).unwrap();
        // The hub knows better.
        cache.get("acme/tiny", F32).unwrap();
        fs::write(cache.path("refs/main"), content).unwrap();
        assert_parts(&cache.offline().error("acme/tiny", F32), &["acme/tiny: ", "refs/main", part]);
    }
    // A link whose blob is gone.
    let unet = hub.state().files[UNET].clone();
    let cache = fresh();
    fs::remove_file(cache.blob(&unet)).unwrap();
    hub.files_asked();
    cache.get("acme/tiny", F32).unwrap();
    assert_eq!(hub.files_asked(), [UNET]);
    fs::remove_file(cache.blob(&unet)).unwrap();
    let message = cache.offline().error("acme/tiny", F32);
    assert_parts(&message, &[UNET, "is a link to a file that is gone", "without --offline"]);
    // A blob that has lost its end.
    let cache = fresh();
    fs::write(cache.blob(&unet), &unet[..100]).unwrap();
    let mut log = Log::default();
    cache.get_noting("acme/tiny", F32, &mut log).unwrap();
    assert_parts(&log.warnings[0], &["has not the size that the hub lists"]);
    assert_eq!(fs::read(cache.blob(&unet)).unwrap(), unet);
    // A file where a folder should be.
    let cache = Cache::of(&hub);
    fs::write(&cache.settings.cache, "").unwrap();
    assert_parts(&cache.error("acme/tiny", F32), &[".locks"]);
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_said() {
    let hub = Hub::new();
    let cache = Cache::of(&hub);
    let index = hub.state().files["model_index.json"].clone();
    let place = cache.path("blobs").join(format!("{}.incomplete", &sha256(&index)[..40]));
    fs::create_dir_all(place.parent().unwrap()).unwrap();
    std::os::unix::fs::symlink("/dev/full", &place).unwrap();
    assert_parts(&cache.error("acme/tiny", F32), &["no space left", "HF_HUB_CACHE", "incomplete"]);
    assert!(!cache.path("snapshots").exists());
}

#[test]
fn a_lock_of_another_process_is_waited_for() {
    let hub = Hub::new();
    let cache = Cache::of(&hub);
    let unet = hub.state().files[UNET].clone();
    let path = cache.settings.cache.join(".locks/models--acme--tiny").join(format!("{}.lock", sha256(&unet)));
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let lock = fs::File::create(&path).unwrap();
    lock.lock().unwrap();
    let message = cache.error("acme/tiny", F32);
    assert_parts(&message, &[".lock", "another process holds this lock", UNET, "end that process"]);

    // It goes on: then it is waited for longer than the patience, and what it has fetched is taken.
    let (blob, incomplete) = (cache.blob(&unet), cache.incomplete(&unet));
    let other = std::thread::spawn(move || {
        for part in 1..=8 {
            fs::write(&incomplete, &unet[..part * 100]).unwrap();
            std::thread::sleep(Duration::from_millis(100));
        }
        fs::remove_file(&incomplete).unwrap();
        fs::write(blob, &unet).unwrap();
        drop(lock);
    });
    hub.files_asked();
    let mut log = Log::default();
    cache.get_noting("acme/tiny", F32, &mut log).unwrap();
    other.join().unwrap();
    assert_parts(&log.warnings[0], &["another process is fetching", UNET]);
    assert!(!hub.files_asked().contains(&UNET.to_string()));
}

#[test]
fn two_runs_at_once_fetch_every_file_once() {
    let hub = Hub::new();
    hub.state().delay = Duration::from_millis(20);
    let mut cache = Cache::of(&hub);
    cache.settings.lock_patience = Duration::from_secs(30);
    std::thread::scope(|scope| {
        let runs: Vec<_> = (0..4).map(|_| scope.spawn(|| cache.get("acme/tiny", F32).unwrap())).collect();
        runs.into_iter().for_each(|run| drop(run.join().unwrap()));
    });
    let mut asked = hub.files_asked();
    asked.sort();
    assert_eq!(asked, needed());
    let place = cache.path("snapshots").join(COMMIT);
    let links: Vec<String> = files_of(&place).into_keys().collect();
    assert_eq!(links, needed());
}

/// The program on this hub.
fn on(place: &Place, hub: &Hub, args: &[&str]) -> Command {
    let mut command = place.command(args);
    command.env("HF_HUB_OFFLINE", "0").env("HF_ENDPOINT", &hub.address);
    for name in [
        "SSL_CERT_FILE",
        "REQUESTS_CA_BUNDLE",
        "http_proxy",
        "HTTP_PROXY",
        "all_proxy",
        "ALL_PROXY",
        "https_proxy",
        "HTTPS_PROXY",
    ] {
        command.env_remove(name);
    }
    command
}

#[test]
fn the_program_takes_a_name_for_a_model() {
    let (place, hub) = (Place::new(), Hub::new());
    let run = |args: &[&str]| {
        let output = on(&place, &hub, args).output().unwrap();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let (status, plan, said) = run(&["plan", "a cat", "--model", "acme/tiny"]);
    assert_eq!(status, Some(0), "{said}");
    assert_parts(&plan, &["acme/tiny, f32", "peak memory"]);
    assert_eq!(hub.weights_asked(), [""; 0]);

    let picture = ["generate", "a cat", "--stages", "16x16:2", "--method", "plain", "--out"];
    let (status, _, said) = run(&[&picture[..], &["hub.png", "--model", "acme/tiny"]].concat());
    assert_eq!(status, Some(0), "{said}");
    assert_parts(&said, &["fetching 3 files of acme/tiny", "fetched ", "acme/tiny, f32 on cpu"]);
    assert_eq!(hub.weights_asked().len(), 3);
    place.ok(&[&picture[..], &["path.png", "--model", MODEL]].concat());
    let pixels = |name: &str| megafuse::image::read_image(&place.path(name)).unwrap();
    assert_eq!(pixels("hub.png"), pixels("path.png"));

    // From the cache alone: by the flag, and by the variable.
    hub.files_asked();
    let (status, _, said) = run(&[&picture[..], &["c.png", "--model", "acme/tiny", "--offline"]].concat());
    assert_eq!((status, said.contains("fetch")), (Some(0), false), "{said}");
    place.ok(&[&picture[..], &["d.png", "--model", "acme/tiny"]].concat());
    assert_eq!(place.bytes("c.png"), place.bytes("hub.png"));
    let (status, _, said) = run(&[
        "probe",
        "--module",
        "text",
        "--prompt",
        "a",
        "--out",
        "t.safetensors",
        "--model",
        "acme/tiny",
        "--offline",
    ]);
    assert_eq!(status, Some(0), "{said}");
    assert_eq!(hub.state().asked, []);
    let (status, _, said) = run(&[&picture[..], &["e.png", "--model", "acme/other", "--offline"]].concat());
    assert_eq!(status, Some(1), "{said}");
    assert_parts(&said, &["error: acme/other: no such path here", "not in the cache", "without --offline"]);

    // Gated, and no token.
    hub.state().refusals.push(("acme/tiny/revision/v2", 403, "GatedRepo", 1));
    let (status, _, said) = run(&["plan", "a", "--model", "acme/tiny@v2"]);
    assert_eq!(status, Some(1), "{said}");
    assert_parts(&said, &["acme/tiny@v2: the model is gated", "accept its licence", "HF_TOKEN"]);
}

/// Processes, not threads; and the element type of the run decides which weights come.
#[test]
fn programs_at_the_same_time_share_a_cache() {
    let mut files = files_of(Path::new(MODEL));
    for path in needed().iter().filter(|path| path.ends_with(".safetensors")) {
        let bytes = files[path].clone();
        files.insert(path.replace(".safetensors", ".fp16.safetensors"), bytes);
    }
    let (place, hub) = (Place::new(), Hub::with(files));
    hub.state().delay = Duration::from_millis(20);
    let start = |name: &str| {
        let args =
            ["generate", "a", "--model", "acme/tiny", "--method", "plain", "--stages", "16x16:1", "--dtype", "f16"];
        on(&place, &hub, &[&args[..], &["--out", name]].concat())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let children = ["0.png", "1.png", "2.png"].map(start);
    for child in children {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
    }
    assert_eq!(place.bytes("0.png"), place.bytes("1.png"));
    let mut asked = hub.files_asked();
    asked.sort();
    let mut wanted = needed();
    wanted.iter_mut().for_each(|path| *path = path.replace(".safetensors", ".fp16.safetensors"));
    wanted.sort();
    assert_eq!(asked, wanted, "each file once");
}

#[test]
fn a_path_that_exists_is_no_name() {
    let (place, hub) = (Place::new(), Hub::new());
    for (path, bytes) in files_of(Path::new(MODEL)) {
        let to = place.path("acme/tiny").join(path);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::write(to, bytes).unwrap();
    }
    let output = on(&place, &hub, &["plan", "a", "--model", "acme/tiny"]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(hub.state().asked, []);
    // What is neither says both, and asks nobody.
    for model in ["nothing", "a/b/c", "./acme/other", "acme/o ther", "acme/other@"] {
        let output = on(&place, &hub, &["plan", "a", "--model", model]).output().unwrap();
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert_parts(&said, &[&format!("error: {model}: no such directory"), "ORG/NAME"]);
    }
    assert_eq!(hub.state().asked, []);
    fs::write(place.path("none.pem"), "no certificate").unwrap();
    let mut command = on(&place, &hub, &["plan", "a", "--model", "acme/other"]);
    let said =
        text(&command.env("SSL_CERT_FILE", "none.pem").env_remove("REQUESTS_CA_BUNDLE").output().unwrap().stderr);
    assert_parts(&said, &["none.pem: holds no certificate in PEM"]);
    let mut command = on(&place, &hub, &["plan", "a", "--model", "acme/other"]);
    let said = text(&command.env("HF_ENDPOINT", "mirror").output().unwrap().stderr);
    assert_parts(&said, &["HF_ENDPOINT: is \"mirror\", expected https://HOST"]);
}
