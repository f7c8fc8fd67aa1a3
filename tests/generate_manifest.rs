//! `generate --manifest`: ten thousand pictures that survive whatever stops them, here a few dozen, really killed.

#[path = "common/place.rs"]
mod place;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use place::{MODEL, copy};
use serde_json::Value;

const STAGES: &str = "16x16:2,24x24:1";

struct Place {
    folder: tempfile::TempDir,
}

type Files = BTreeMap<String, Vec<u8>>;

impl Place {
    /// With these lines in `prompts.jsonl`.
    fn new(lines: &[String]) -> Place {
        let place = Place { folder: tempfile::tempdir().expect("a temporary folder") };
        place.manifest(lines);
        place
    }

    fn manifest(&self, lines: &[String]) {
        fs::write(self.path("prompts.jsonl"), lines.join("\n") + "\n").unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, out: &str, further: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_megafuse"));
        command.args(["generate", "--manifest", "prompts.jsonl", "--out", out]).args(further);
        if !further.contains(&"--model") {
            command.args(["--model", MODEL]);
        }
        if !further.contains(&"--stages") && !further.contains(&"--size") {
            command.args(["--stages", STAGES]);
        }
        command.current_dir(self.folder.path()).env("RAYON_NUM_THREADS", "1").env_remove("RUST_BACKTRACE");
        command
    }

    fn run(&self, out: &str, further: &[&str]) -> Output {
        self.command(out, further).output().expect("the program starts")
    }

    /// What is in the folder `out` after a run that must succeed.
    fn ok(&self, out: &str, further: &[&str]) -> Files {
        let output = self.run(out, further);
        assert!(output.status.success(), "{further:?}: {}", text(&output.stderr));
        self.files(out)
    }

    /// The message of a run that must end with this status and change nothing.
    fn fails(&self, status: i32, out: &str, further: &[&str]) -> String {
        let before = (self.files(""), self.files(out));
        let output = self.run(out, further);
        let message = text(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{further:?}: {message}");
        assert!(!message.contains("panicked") && output.stdout.is_empty(), "{further:?}: {message}");
        assert_eq!((self.files(""), self.files(out)), before, "{further:?} changed something: {message}");
        message
    }

    /// Names and contents of a folder's files, hidden ones too.
    fn files(&self, out: &str) -> Files {
        let Ok(entries) = fs::read_dir(self.path(out)) else { return Files::new() };
        let paths = entries.map(|entry| entry.unwrap().path()).filter(|path| !path.is_dir());
        paths.filter_map(|path| Some((path.file_name()?.to_string_lossy().into(), fs::read(&path).ok()?))).collect()
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn lines(count: usize) -> Vec<String> {
    (1..=count).map(|number| format!("{{\"prompt\": \"a photo of {number} cats\"}}")).collect()
}

fn pictures(files: &Files) -> Vec<&str> {
    files.keys().map(String::as_str).filter(|name| name.ends_with(".png")).collect()
}

/// Parameters of a picture, from its chunk of JSON.
fn parameters(files: &Files, name: &str) -> Value {
    let bytes = files.get(name).unwrap_or_else(|| panic!("{name} among {:?}", files.keys()));
    let reader = png::Decoder::new(std::io::Cursor::new(bytes)).read_info().expect("a PNG");
    let info = reader.info();
    let latin1 = info.uncompressed_latin1_text.iter().map(|chunk| (&chunk.keyword, chunk.text.clone()));
    let utf8 = info.utf8_text.iter().map(|chunk| (&chunk.keyword, chunk.get_text().expect("UTF-8")));
    let (_, text) = latin1.chain(utf8).find(|(keyword, _)| *keyword == "megafuse").expect("our chunk");
    serde_json::from_str(&text).expect("JSON")
}

/// Milliseconds without a pattern, other ones in every run of the tests.
struct Moments(u64);

impl Moments {
    fn new() -> Moments {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        Moments(now.as_nanos() as u64 | 1)
    }

    fn below(&mut self, limit: Duration) -> Duration {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        limit.mul_f64((self.0 >> 11) as f64 / (1u64 << 53) as f64)
    }
}

#[cfg(unix)]
fn signal(child: &Child, name: &str) {
    // It may have ended by itself just now.
    let _ = Command::new("kill").args(["-s", name, &child.id().to_string()]).stderr(Stdio::null()).status();
}

/// Killed and interrupted at random moments, again and again, and resumed until all is there: byte for byte what an
/// undisturbed run makes, and three parts that share a folder at the same time, the parts killed too.
#[cfg(unix)]
#[test]
fn what_is_killed_and_resumed_is_what_an_undisturbed_run_makes() {
    const COUNT: usize = 60;
    let place = Place::new(&lines(COUNT));
    let whole = place.ok("whole", &[]);
    assert_eq!(pictures(&whole).len(), COUNT);
    assert_eq!(whole.len(), COUNT + 1, "{:?}", whole.keys());

    let mut moments = Moments::new();
    let mut ends_in_the_middle = 0;
    for round in 0.. {
        assert!(round < 400, "it does not come to an end: {} pictures", place.files("killed").len());
        let name = if round % 2 == 1 { "INT" } else { "KILL" };
        let mut command = place.command("killed", &["--resume"]);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("starts");
        // After a few pictures, in the middle of the next; or before there is one.
        let few = moments.below(Duration::from_millis(8)).as_millis() as usize;
        let names = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().expect("piped")));
        let named = names.take(few).count();
        std::thread::sleep(moments.below(Duration::from_millis(if named == 0 { 80 } else { 10 })));
        signal(&child, name);
        let output = child.wait_with_output().expect("it ends");
        let files = place.files("killed");
        for (name, bytes) in files.iter().filter(|(name, _)| !name.starts_with('.')) {
            assert!(whole.get(name) == Some(bytes), "{name} is not that of the undisturbed run");
        }
        match output.status.code() {
            Some(0) => break,
            Some(130) => assert!(text(&output.stderr).contains("interrupted"), "{}", text(&output.stderr)),
            Some(other) => panic!("status {other}: {}", text(&output.stderr)),
            None => {}
        }
        ends_in_the_middle += usize::from((1..COUNT).contains(&pictures(&files).len()));
    }
    assert!(ends_in_the_middle >= 2, "only {ends_in_the_middle} ends in the middle");
    assert_eq!(place.ok("killed", &["--resume"]), whole);

    let part = |shard: &str| {
        let mut command = place.command("parts", &["--resume", "--shard", shard]);
        command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("starts")
    };
    let mut children: Vec<Child> = ["1/3", "2/3", "3/3"].map(part).into_iter().collect();
    std::thread::sleep(moments.below(Duration::from_millis(400)));
    children.iter().for_each(|child| signal(child, "KILL"));
    children.iter_mut().for_each(|child| drop(child.wait()));
    children = ["1/3", "2/3", "3/3"].map(part).into_iter().collect();
    children.iter_mut().for_each(|child| assert!(child.wait().unwrap().success()));
    // The three began at once, so none was sure to be alone and to remove what the killed ones left.
    assert_eq!(place.ok("parts", &["--resume"]), whole);
}

/// Ctrl-C after the first picture: status 130, whole files, and what to do.
#[cfg(unix)]
#[test]
fn an_interrupt_says_how_to_go_on() {
    let place = Place::new(&lines(60));
    let mut command = place.command("out", &[]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("starts");
    let mut names = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().expect("piped")));
    assert_eq!(names.next().expect("a line").unwrap(), "out/000001.png");
    signal(&child, "INT");
    let named = 1 + names.map_while(Result::ok).count();
    let output = child.wait_with_output().expect("it ends");
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(130), "{message}");
    assert!(message.contains("interrupted") && message.contains("--resume makes the missing ones"), "{message}");
    let files = place.files("out");
    // The last one may have been written and not yet named.
    assert!((named..=named + 1).contains(&pictures(&files).len()), "{named} named, {:?}", files.keys());
    assert!(pictures(&files).len() < 60 && files.keys().all(|name| !name.starts_with('.')), "{:?}", files.keys());
    assert_eq!(pictures(&place.ok("out", &["--resume"])).len(), 60);
}

/// Whatever else is in the file, and in whatever order.
#[test]
fn a_picture_depends_on_its_line_and_the_flags_alone() {
    let line = |id: &str, further: &str| format!("{{\"id\": \"{id}\", \"prompt\": \"{id} of a cat\"{further}}}");
    let mut all = vec![line("a", ""), line("b", ", \"seed\": 7"), line("c", ", \"guidance\": 3"), line("d", "")];
    let place = Place::new(&all);
    let first = place.ok("first", &["--seed", "5"]);
    all.reverse();
    all.remove(2);
    place.manifest(&all);
    let second = place.ok("second", &["--seed", "5"]);
    assert_eq!(pictures(&second), ["a.png", "c.png", "d.png"]);
    assert!(second.iter().all(|(name, bytes)| first.get(name) == Some(bytes)));

    let of = |name| parameters(&first, name);
    assert_eq!((&of("b.png")["seed"], &of("b.png")["prompt"]), (&7.into(), &"b of a cat".into()));
    assert_eq!(of("c.png")["guidance"], 3.0);
    assert_eq!(of("a.png")["guidance"], 7.0);
    // FNV-1a of "a" is 0xe40c292c, and --seed 5.
    assert_eq!(of("a.png")["seed"], 0xe40c292cu64 + 5);

    // The same picture as from `generate` with the line's prompt and seed.
    let mut command = Command::new(env!("CARGO_BIN_EXE_megafuse"));
    command.args(["generate", "b of a cat", "--seed", "7", "--out", "b.png", "--model", MODEL, "--stages", STAGES]);
    assert!(command.current_dir(place.folder.path()).output().unwrap().status.success());
    assert_eq!(fs::read(place.path("b.png")).unwrap(), first["b.png"]);
}

#[test]
fn lines_without_ids_are_numbered_and_may_have_their_own_sizes() {
    let place = Place::new(&[
        "{\"prompt\": \"a caf\u{e9}, \u{732b}\\u0000\\n\"}".into(),
        String::new(),
        "{\"prompt\": \"a\", \"size\": \"32x16\", \"steps\": 2, \"method\": \"plain\"}".into(),
        "{\"prompt\": \"a\", \"stages\": \"16x16:1,32x32:1\", \"method\": \"megafusion\"}".into(),
    ]);
    let flags = ["--size", "24x24", "--steps", "3", "--method", "plain", "--seed", "100"];
    let files = place.ok("out", &flags);
    assert_eq!(pictures(&files), ["000001.png", "000003.png", "000004.png"]);
    let of = |name, key: &str| parameters(&files, name)[key].clone();
    assert_eq!((of("000001.png", "size"), of("000001.png", "seed")), ("24x24".into(), 100.into()));
    assert_eq!((of("000003.png", "size"), of("000003.png", "seed")), ("32x16".into(), 102.into()));
    assert_eq!(of("000003.png", "steps"), 2);
    assert_eq!((of("000004.png", "size"), of("000004.png", "steps")), ("32x32".into(), 2.into()));
    // All of them are known again, whatever letters are in the prompt.
    let again = place.run("out", &[&flags[..], &["--resume"]].concat());
    assert!(text(&again.stderr).contains("3 of 3 pictures are there already"), "{}", text(&again.stderr));
}

/// A flag that only the parts of a line's stages read, or only a line's method, is that line's.
#[test]
fn flags_that_single_lines_read() {
    let place = Place::new(&[
        "{\"prompt\": \"a\", \"stages\": \"16x16:2,24x24:1+crops\"}".into(),
        "{\"prompt\": \"b\"}".into(),
        "{\"prompt\": \"c\", \"method\": \"hires-fix\", \"stages\": \"16x16:3,24x24:1\"}".into(),
    ]);
    let flags = ["--window", "4", "--enlarge", "latents"];
    let files = place.ok("out", &flags);
    let of = |name, key: &str| parameters(&files, name).get(key).cloned();
    assert_eq!((of("000001.png", "window"), of("000001.png", "enlarge")), (Some(4.into()), None));
    assert_eq!((of("000002.png", "window"), of("000002.png", "enlarge")), (None, None));
    assert_eq!((of("000003.png", "window"), of("000003.png", "enlarge")), (None, Some("latents".into())));
    let message = place.fails(1, "out", &["--window", "6", "--enlarge", "latents", "--resume"]);
    assert!(message.contains("out/run.json") && message.contains("window 4, now 6"), "{message}");
    place.manifest(&lines(2));
    for (flags, says) in [(&flags[..2], "--window 4: has no effect"), (&flags[2..], "--enlarge latents: has no effect")]
    {
        let message = place.fails(2, "other", flags);
        assert!(message.contains(says), "{says} in: {message}");
    }
}

/// `--phases` writes the earlier phases' pictures beside each line's.
#[test]
fn pictures_of_phases() {
    let line = |id: &str| format!("{{\"prompt\": \"{id} of a cat\", \"id\": \"{id}\"}}");
    let place = Place::new(&[line("a"), line("b")]);
    let flags =
        ["--method", "demofusion", "--size", "64x32", "--steps", "1", "--guidance", "1", "--batch", "2", "--phases"];
    let files = place.ok("out", &flags);
    assert_eq!(pictures(&files), ["a-phase1.png", "a.png", "b-phase1.png", "b.png"]);
    let (width, height) = image::load_from_memory(&files["a-phase1.png"]).unwrap().into_rgb8().dimensions();
    assert_eq!((width, height), (32, 16));
    assert_eq!(parameters(&files, "b-phase1.png"), parameters(&files, "b.png"));
    assert!(files["a-phase1.png"] != files["b-phase1.png"]);
    // One that is missing is made again, and its line with it.
    fs::remove_file(place.path("out/b-phase1.png")).unwrap();
    let again = place.run("out", &[&flags[..], &["--resume"]].concat());
    assert_eq!(text(&again.stdout), "out/b-phase1.png\nout/b.png\n", "{}", text(&again.stderr));
    assert_eq!(place.files("out"), files);
    // Without the flag they are no line's.
    let message = place.fails(1, "out", &[&flags[..flags.len() - 1], &["--resume"]].concat());
    assert!(message.contains("phases true, now false"), "{message}");
    place.manifest(&[line("a"), line("A-phase1")]);
    let message = place.fails(1, "other", &flags);
    assert!(
        message.contains("prompts.jsonl:2: id \"a-phase1\" is what --phases calls a picture of line 1"),
        "{message}"
    );
}

#[test]
fn a_folder_made_otherwise_is_refused() {
    let place = Place::new(&lines(3));
    let made = place.ok("out", &[]);
    let message = place.fails(1, "out", &[]);
    assert!(message.contains("out: is not empty (4 files)") && message.contains("--resume"), "{message}");
    for (flags, part) in [
        (&["--resume", "--guidance", "3"][..], "guidance 7, now 3"),
        (&["--resume", "--guidance-rescale", "0.7"], "guidance_rescale none, now 0.7"),
        (&["--resume", "--seed", "1"], "seed 0, now 1"),
        (&["--resume", "--stages", "16x16:2,24x24:2"], "stages [\"16x16:2\",\"24x24:1\"], now"),
        (&["--resume", "--dtype", "bf16"], "dtype f32, now bf16"),
        (&["--resume", "--negative", "dog"], "negative_prompt \"\", now dog"),
        (&["--resume", "--upsampler", "bilinear"], "upsampler bicubic, now bilinear"),
    ] {
        let message = place.fails(1, "out", flags);
        assert!(message.contains("out/run.json") && message.contains(part), "{part} in: {message}");
    }

    // Another line under a picture's name; a picture that no line makes; no picture at all.
    let mut other = lines(3);
    other[1] = "{\"prompt\": \"a dog\"}".into();
    place.manifest(&other);
    let message = place.fails(1, "out", &["--resume"]);
    let parts = ["000002.png", "line 2", "prompt a photo of 2 cats, now a dog"];
    assert!(parts.iter().all(|part| message.contains(part)), "{message}");
    place.manifest(&lines(2));
    let message = place.fails(1, "out", &["--resume"]);
    assert!(message.contains("000003.png") && message.contains("no line"), "{message}");
    place.manifest(&lines(3));

    // More lines are no other run: only theirs are made. Half a picture is made again.
    place.manifest(&lines(5));
    fs::write(place.path("out/000002.png"), &made["000002.png"][..200]).unwrap();
    let output = place.run("out", &["--resume"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), "out/000002.png\nout/000004.png\nout/000005.png\n");
    let files = place.files("out");
    assert!(made.iter().all(|(name, bytes)| files.get(name) == Some(bytes)));
    let output = place.run("out", &["--resume"]);
    assert!(output.status.success() && output.stdout.is_empty());
    assert!(text(&output.stderr).contains("5 of 5 pictures are there already"), "{}", text(&output.stderr));

    // A model of the same name with other weights.
    let model = place.path("sd15");
    copy(Path::new(MODEL), &model);
    let model_flag = ["--resume", "--model", model.to_str().unwrap()];
    assert_eq!(place.ok("out", &model_flag), files);
    let vae = model.join("vae/diffusion_pytorch_model.safetensors");
    let mut bytes = fs::read(&vae).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&vae, bytes).unwrap();
    let message = place.fails(1, "out", &model_flag);
    assert!(message.contains("model_digest"), "{message}");
}

#[test]
fn places_that_cannot_be_written_are_refused_first() {
    let place = Place::new(&lines(1));
    fs::write(place.path("file"), "").unwrap();
    assert!(place.fails(1, "file", &[]).contains("file: is a file"));
    assert!(place.fails(1, "file/such/folder", &[]).contains("cannot be made"));
    fs::create_dir(place.path("other")).unwrap();
    fs::write(place.path("other/notes.txt"), "mine").unwrap();
    assert!(place.fails(1, "other", &[]).contains("is not empty"));
    assert!(place.fails(1, "other", &["--resume"]).contains("no run.json"));
    fs::create_dir(place.path("empty")).unwrap();
    place.ok("empty", &[]);
}

/// A file that cannot grow, as on a full disk: one error, and nothing half-written.
#[cfg(unix)]
#[test]
fn a_full_disk_leaves_whole_pictures_only() {
    let place = Place::new(&lines(3));
    let whole = place.ok("whole", &[]);
    // Room for run.json and for no picture: 1 or 2 blocks of 512 or 1024 bytes, as the shell counts.
    assert!(whole["run.json"].len() < 1024 && whole["000001.png"].len() > 2048);
    let mut shell = Command::new("sh");
    shell.arg("-c").arg("trap '' XFSZ; ulimit -f 2; exec \"$0\" \"$@\"");
    let command = place.command("full", &[]);
    shell.arg(command.get_program()).args(command.get_args()).current_dir(place.folder.path());
    let output = shell.output().expect("a shell");
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("full/000001.png") && message.contains("--resume"), "{message}");
    assert_eq!(message.matches("error:").count(), 1, "{message}");
    assert_eq!(place.files("full").into_keys().collect::<Vec<_>>(), ["run.json"]);
    assert_eq!(place.ok("full", &["--resume"]), whole);
}

/// Before weights are read: the model here has none.
#[test]
fn bad_lines_are_found_before_weights_are_read() {
    let place = Place::new(&lines(2));
    let model = place.path("model");
    copy(Path::new(MODEL), &model);
    for part in ["unet", "vae"] {
        fs::remove_file(model.join(part).join("diffusion_pytorch_model.safetensors")).unwrap();
    }
    let model = ["--model", model.to_str().unwrap()];
    for (last, part) in [
        ("{\"prompt\": \"a\"", "prompts.jsonl:3: EOF"),
        ("{\"id\": \"a\"}", "prompts.jsonl:3: missing field `prompt`"),
        ("{\"prompt\": \"a\", \"sede\": 1}", "prompts.jsonl:3: unknown field `sede`"),
        ("{\"prompt\": \"a\", \"id\": \"../a\"}", "prompts.jsonl:3: id \"../a\""),
        ("{\"prompt\": \"a\", \"id\": \"000002\"}", "prompts.jsonl:3: id \"000002\" is that of line 2"),
        ("{\"prompt\": \"a\", \"size\": \"48x48\"}", "prompts.jsonl:3: --size 48x48"),
        ("{\"prompt\": \"a\", \"stages\": \"16x16:2,25x25:1\"}", "prompts.jsonl:3: --stages 25x25"),
        ("{\"prompt\": \"a\", \"steps\": 4}", "prompts.jsonl:3: --steps 4"),
    ] {
        place.manifest(&[&lines(2)[..], &[last.to_string()]].concat());
        let message = place.fails(1, "out", &model);
        assert!(message.contains(part), "{part} in: {message}");
    }
    place.manifest(&[]);
    assert!(place.fails(1, "out", &model).contains("prompts.jsonl: has no lines"));
    fs::remove_file(place.path("prompts.jsonl")).unwrap();
    assert!(place.fails(1, "out", &model).contains("prompts.jsonl: no such file"));
    place.manifest(&lines(2));
    assert!(place.fails(1, "out", &model).contains("safetensors"));
}

#[test]
fn flags_that_do_not_go_together() {
    let place = Place::new(&lines(2));
    for (flags, part) in [
        (&["--count", "2"][..], "--count 2"),
        (&["--dump", "d.safetensors"], "--dump"),
        (&["--strip", "s.png"], "--strip"),
        (&["a prompt"], "PROMPT"),
        (&["--shard", "3/2"], "--shard"),
        (&["--method", "plain", "--upsampler", "bilinear", "--size", "16x16"], "--upsampler bilinear"),
        (&["--size", "15x15"], "--size 15x15"),
    ] {
        let message = place.fails(2, "out", flags);
        assert!(message.contains(part), "{part} in: {message}");
    }
    for flags in [&["--resume"][..], &["--shard", "1/2"]] {
        let output =
            Command::new(env!("CARGO_BIN_EXE_megafuse")).args(["generate", "cat"]).args(flags).output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        assert!(text(&output.stderr).contains("--manifest"), "{}", text(&output.stderr));
    }
    let message = Command::new(env!("CARGO_BIN_EXE_megafuse")).args(["generate", "--manifest", "x"]).output().unwrap();
    assert_eq!(message.status.code(), Some(2));
    assert!(text(&message.stderr).contains("--out"), "{}", text(&message.stderr));
}

/// A prompt whose embedding overflows: its picture is missing and reported, the others are made.
#[test]
fn one_picture_that_is_not_finite_does_not_end_the_others() {
    let mut all = lines(4);
    all[1] = "{\"prompt\": \"a ~\", \"id\": \"bad\"}".into();
    let place = Place::new(&all);
    let model = place.path("model");
    copy(Path::new(MODEL), &model);
    poison(&model, "~</w>");
    let flags = ["--model", model.to_str().unwrap(), "--resume"];
    for attempt in 0..2 {
        let output = place.run("out", &flags);
        let message = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{message}");
        for part in ["prompts.jsonl:2: ", "not finite", "1 of ", "failed.jsonl"] {
            assert!(message.contains(part), "{part} in: {message}");
        }
        let files = place.files("out");
        assert_eq!(pictures(&files), ["000001.png", "000003.png", "000004.png"], "attempt {attempt}");
        let failed = text(&files["failed.jsonl"]);
        let failed: Vec<Value> = failed.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        assert_eq!(failed.len(), 1, "attempt {attempt}");
        assert_eq!((&failed[0]["line"], &failed[0]["id"]), (&2.into(), &"bad".into()));
    }
    // Another prompt in the line, and all is well.
    all[1] = "{\"prompt\": \"a cat\", \"id\": \"bad\"}".into();
    place.manifest(&all);
    let files = place.ok("out", &flags);
    assert_eq!(pictures(&files).len(), 4);
    assert!(!files.contains_key("failed.jsonl"));
}

/// The time for lines alone: all are read and checked, and the last shard has one of them.
#[test]
fn many_lines_are_no_burden() {
    let place = Place::new(&lines(20_000));
    let begin = Instant::now();
    let files = place.ok("out", &["--shard", "20000/20000"]);
    assert_eq!(pictures(&files), ["020000.png"]);
    assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
}

/// Makes the embedding of one token so large that the encoder's sums overflow; finite itself.
fn poison(model: &Path, token: &str) {
    let vocabulary: Value = serde_json::from_slice(&fs::read(model.join("tokenizer/vocab.json")).unwrap()).unwrap();
    let row = vocabulary[token].as_u64().expect("a token") as usize;
    let path = model.join("text_encoder/model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let tensor = &mut header["text_model.embeddings.token_embedding.weight"];
    let (width, start) = (tensor["shape"][1].as_u64().unwrap() as usize, tensor["data_offsets"][0].as_u64().unwrap());
    // As wide as f16, with the range of f32; the other embeddings become other numbers, which is nothing here.
    tensor["dtype"] = "BF16".into();
    let mut data = bytes[8 + length..].to_vec();
    let at = start as usize + 2 * row * width;
    for value in data[at..at + 2 * width].chunks_exact_mut(2) {
        value.copy_from_slice(&half::bf16::from_f32(3e38).to_le_bytes());
    }
    let header = header.to_string();
    fs::write(&path, [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat()).unwrap();
}
