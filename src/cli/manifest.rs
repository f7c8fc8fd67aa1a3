//! The lines of `--manifest`: what each says, what its picture is called and which seed it gets.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind};
use std::path::{Path, PathBuf};

use megafuse::pipeline::{ControlImage, ControlInput, MethodSpec, Request, Size, Stage};
use megafuse::{Error, Result};
use serde::Deserialize;
use serde_json::Value;

use super::generate::phase_suffix;
use super::method_options::MethodOptions;
use super::picture_args::{MethodRun, by_method};
use super::values::{self, Stages};

/// One line; `None`: as the flags say.
#[derive(Clone, Debug)]
pub struct Line {
    /// From 1, blank lines counted.
    pub number: usize,
    pub prompt: String,
    /// The picture is called so, without `.png`.
    pub id: String,
    /// Was the id in the line, or is it the number?
    named: bool,
    pub seed: Option<u64>,
    pub negative_prompt: Option<String>,
    pub method: Option<&'static MethodSpec>,
    pub size: Option<Size>,
    pub stages: Option<Stages>,
    pub steps: Option<usize>,
    pub guidance: Option<f32>,
    pub guidance_rescale: Option<f32>,
    /// What the ControlNets read; none: the flags' pictures.
    pub control_images: Vec<PathBuf>,
}

/// A line as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    prompt: String,
    id: Option<Value>,
    seed: Option<u64>,
    negative_prompt: Option<String>,
    method: Option<String>,
    size: Option<String>,
    stages: Option<String>,
    steps: Option<usize>,
    guidance: Option<f32>,
    guidance_rescale: Option<f32>,
    control_image: Option<OneOrMore>,
}

/// A file, or a list of them.
#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMore {
    One(PathBuf),
    More(Vec<PathBuf>),
}

/// The longest line that is read: prompts are a few hundred bytes, and a file without line breaks is no manifest.
const LONGEST_LINE_BYTES: u64 = 1 << 20;
/// `ID.png` stays below the 255 bytes of most file systems.
const LONGEST_ID_BYTES: usize = 200;

/// All lines, each checked by itself, no two for the same file. Blank lines are passed over.
///
/// # Errors
/// [`Error::File`] naming `path:line` and what is wrong; an empty file; [`Error::Io`].
pub fn read(path: &Path) -> Result<Vec<Line>> {
    if path.is_dir() {
        return Err(Error::file(path, "is a folder; expected a file of JSON lines like {\"prompt\": \"a cat\"}"));
    }
    let file = File::open(path).map_err(|error| match error.kind() {
        ErrorKind::NotFound => Error::file(path, "no such file; expected JSON lines like {\"prompt\": \"a cat\"}"),
        _ => Error::io(path, error),
    })?;
    let mut reader = BufReader::new(file);
    let (mut lines, mut lines_of_ids, mut bytes) = (Vec::new(), HashMap::new(), Vec::new());
    for number in 1.. {
        bytes.clear();
        let read = std::io::Read::take(&mut reader, LONGEST_LINE_BYTES).read_until(b'\n', &mut bytes);
        if read.map_err(|error| Error::io(path, error))? == 0 {
            break;
        }
        let wrong = |reason: String| Error::file(&place(path, number), reason);
        if bytes.len() as u64 == LONGEST_LINE_BYTES {
            return Err(wrong(format!("longer than {LONGEST_LINE_BYTES} bytes; expected one JSON object a line")));
        }
        let text = std::str::from_utf8(&bytes).map_err(|_| wrong("is not UTF-8 text".into()))?;
        let text = if number == 1 { text.trim_start_matches('\u{feff}') } else { text }; // a byte order mark
        if text.trim().is_empty() {
            continue;
        }
        let mut line = parse(number, text.trim()).map_err(wrong)?;
        for image in &mut line.control_images {
            *image = path.parent().unwrap_or(Path::new("")).join(&image);
        }
        // Many file systems make no difference between a.png and A.png.
        if let Some(other) = lines_of_ids.insert(line.id.to_ascii_lowercase(), number) {
            return Err(wrong(format!("id {:?} is that of line {other}; every picture needs its own", line.id)));
        }
        lines.push(line);
    }
    if lines.is_empty() {
        return Err(Error::file(path, "has no lines; expected JSON lines like {\"prompt\": \"a cat\"}"));
    }
    Ok(lines)
}

/// `prompts.jsonl:17`, for messages.
pub fn place(path: &Path, number: usize) -> PathBuf {
    let mut place = path.as_os_str().to_owned();
    place.push(format!(":{number}"));
    place.into()
}

fn parse(number: usize, text: &str) -> std::result::Result<Line, String> {
    if !text.starts_with('{') {
        return Err("expected a JSON object like {\"prompt\": \"a cat\"}".into());
    }
    let written: Written = serde_json::from_str(text).map_err(|error| {
        // The reader counts lines from the beginning of this one.
        let (reason, column) = (error.to_string(), error.column());
        match reason.strip_suffix(&format!(" at line 1 column {column}")) {
            Some(reason) => format!("{reason} (column {column})"),
            None => reason,
        }
    })?;
    let key = |key: &str, value: &dyn std::fmt::Debug, reason: String| format!("{key} {value:?}: {reason}");
    let method = written.method.as_ref().map(|text| values::method(text).map_err(|reason| key("method", text, reason)));
    let size = written.size.as_ref().map(|text| values::library(text).map_err(|reason| key("size", text, reason)));
    let stages = written.stages.as_ref().map(|text| values::stages(text).map_err(|reason| key("stages", text, reason)));
    let steps = written.steps.map(|n| values::steps(&n.to_string()).map_err(|reason| key("steps", &n, reason)));
    let guidance =
        written.guidance.map(|x| values::guidance(&x.to_string()).map_err(|reason| key("guidance", &x, reason)));
    let rescale = written
        .guidance_rescale
        .map(|x| values::guidance_rescale(&x.to_string()).map_err(|reason| key("guidance_rescale", &x, reason)));
    let control_images = match written.control_image {
        None => Vec::new(),
        Some(OneOrMore::One(path)) => vec![path],
        Some(OneOrMore::More(paths)) => paths,
    };
    let (id, named) = match &written.id {
        None => (format!("{number:06}"), false),
        Some(id) => (file_stem(id).map_err(|reason| format!("id {id}: {reason}"))?, true),
    };
    Ok(Line {
        number,
        prompt: written.prompt,
        id,
        named,
        seed: written.seed,
        negative_prompt: written.negative_prompt,
        method: method.transpose()?,
        size: size.transpose()?,
        stages: stages.transpose()?,
        steps: steps.transpose()?,
        guidance: guidance.transpose()?,
        guidance_rescale: rescale.transpose()?,
        control_images,
    })
}

/// An id as the beginning of a file name that every system takes.
fn file_stem(id: &Value) -> std::result::Result<String, String> {
    let stem = match id {
        Value::String(text) => text.clone(),
        Value::Number(number) if number.is_u64() => number.to_string(),
        _ => return Err("expected a string, or a number from 0 without decimals".into()),
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if stem.is_empty() || stem.starts_with(['.', '-']) || !stem.chars().all(plain) {
        let wanted = "a file name is made of it: expected letters from a to z, digits, '.', '_' and '-'";
        return Err(format!("{wanted}, not beginning with '.' or '-'"));
    }
    if stem.len() > LONGEST_ID_BYTES {
        return Err(format!("{} letters, at most {LONGEST_ID_BYTES} make a file name", stem.len()));
    }
    // Windows has these as devices, whatever follows the first dot.
    let device = stem.split('.').next().unwrap_or_default().to_ascii_uppercase();
    let numbered =
        |name: &str| device.strip_prefix(name).is_some_and(|n| n.len() == 1 && n != "0" && n.parse::<u8>().is_ok());
    if ["CON", "PRN", "AUX", "NUL"].contains(&device.as_str()) || numbered("COM") || numbered("LPT") {
        return Err("is the name of a device on Windows".into());
    }
    Ok(stem)
}

impl Line {
    pub fn file_name(&self) -> String {
        format!("{}.png", self.id)
    }

    /// Of the picture of `phase`, from 1.
    pub fn phase_name(&self, phase: usize) -> String {
        format!("{}{}.png", self.id, phase_suffix(phase))
    }

    /// The line's own; else `first` plus what tells it from the others: the id where there is one, so that the order of
    /// lines does not matter, else the number.
    pub fn seed(&self, first: u64) -> u64 {
        let offset = if self.named { u64::from(fnv1a_32(self.id.as_bytes())) } else { self.number as u64 - 1 };
        self.seed.unwrap_or(first.wrapping_add(offset))
    }

    /// The method and the stages that the line or else the flags name.
    pub fn run<'a>(&'a self, spec: &'static MethodSpec, stages: &'a [Stage]) -> MethodRun<'a> {
        (self.method.unwrap_or(spec), self.stages.as_ref().map_or(stages, |stages| &stages.0))
    }

    /// The flags, with what the line says in their place, and those of the method's `options` that the line's run reads; of the line's
    /// own pictures see [`with_pictures`](Line::with_pictures).
    ///
    /// # Errors
    /// [`Error::Request`]: an option of the flags does not fit the line's method.
    pub fn request(&self, flags: &Request, options: &MethodOptions) -> Result<Request> {
        // Stages have their sizes and steps: the flags' do not go on top of them.
        let flags = match self.stages {
            Some(_) => &Request { size: None, steps: None, ..flags.clone() },
            None => flags,
        };
        let request = Request {
            prompt: self.prompt.clone(),
            negative_prompt: self.negative_prompt.clone().or_else(|| flags.negative_prompt.clone()),
            seed: self.seed(flags.seed),
            size: self.size.or(flags.size),
            stages: self.stages.as_ref().map_or_else(|| flags.stages.clone(), |stages| stages.0.clone()),
            steps: self.steps.or(flags.steps),
            guidance: self.guidance.unwrap_or(flags.guidance),
            guidance_rescale: self.guidance_rescale.unwrap_or(flags.guidance_rescale),
            count: 1,
            ..flags.clone()
        };
        let request = match self.method {
            Some(spec) if spec.name != flags.method.name() => by_method(&request, spec)?,
            _ => request,
        };
        let method = options.of(request.method.spec(), &request.stages)?;
        Ok(Request { method, ..request })
    }

    /// The request with the line's pictures, read, where it has some, in place of those that its ControlNets read; edges are those of
    /// these. They are large: a run of many lines reads them as it comes to each.
    ///
    /// # Errors
    /// [`Error::Request`]: another number than there are ControlNets; those of the files.
    pub fn with_pictures(&self, request: Request) -> Result<Request> {
        if self.control_images.is_empty() {
            return Ok(request);
        }
        let flags = &request.controls;
        if self.control_images.len() != flags.len() {
            let value =
                self.control_images.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ");
            let reason = format!("of line {}: expected {}, one for each --control", self.number, flags.len());
            return Err(Error::Request { field: "control_image", value, reason });
        }
        let own = |(control, path): (&ControlInput, &PathBuf)| {
            let image = ControlImage::read(path)?;
            let image = match control.image {
                ControlImage::Edges(_, thresholds) => image.edges(thresholds)?,
                ControlImage::Picture(_) | ControlImage::Stages(_) => image,
            };
            Ok(ControlInput { image, ..control.clone() })
        };
        let controls = flags.iter().zip(&self.control_images).map(own).collect::<Result<_>>()?;
        Ok(Request { controls, ..request })
    }

    /// Does the line say how the picture gets its size?
    pub fn has_geometry(&self) -> bool {
        self.method.is_some() || self.size.is_some() || self.stages.is_some() || self.steps.is_some()
    }
}

/// Fowler, Noll and Vo's hash, FNV-1a, of 32 bits: torch's CPU generator seeds itself with no more.
fn fnv1a_32(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, &byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

/// `--shard I/N`: every N-th line from the I-th on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// From 1.
    index: usize,
    count: usize,
}

impl Shard {
    pub const WHOLE: Shard = Shard { index: 1, count: 1 };

    pub fn parse(text: &str) -> std::result::Result<Shard, String> {
        let parsed = text.split_once('/').and_then(|(index, count)| Some((index.parse().ok()?, count.parse().ok()?)));
        match parsed {
            Some((index, count)) if (1..=count).contains(&index) => Ok(Shard { index, count }),
            _ => Err("expected I/N, the I-th of N parts, from 1/N to N/N, like 2/8".into()),
        }
    }

    pub fn is_whole(self) -> bool {
        self.count == 1
    }

    /// Does it have the line at `position` (from 0)?
    pub fn has(self, position: usize) -> bool {
        position % self.count == self.index - 1
    }

    /// `failed.jsonl`, `failed-2-of-8.jsonl`: parts that share a folder each have their own.
    pub fn file_name(self, stem: &str, ending: &str) -> String {
        match self.count {
            1 => format!("{stem}.{ending}"),
            _ => format!("{stem}-{}-of-{}.{ending}", self.index, self.count),
        }
    }
}

#[cfg(test)]
mod tests {
    use megafuse::pipeline::Method;

    use super::*;

    fn manifest(text: impl AsRef<[u8]>) -> Result<Vec<Line>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("prompts.jsonl");
        std::fs::write(&path, text).unwrap();
        read(&path)
    }

    #[test]
    fn lines_say_what_the_flags_do_not() {
        let text = "\u{feff}{\"prompt\": \"a\"}\r\n\n  {\"prompt\": \"b\", \"id\": 139, \"seed\": 5, \"guidance\": 7.1}  \n\
                    {\"prompt\": \"\", \"id\": \"x.Y_z-1\", \"method\": \"plain\", \"negative_prompt\": \"n\"}";
        let lines = manifest(text).unwrap();
        let ids: Vec<(usize, &str)> = lines.iter().map(|line| (line.number, line.id.as_str())).collect();
        assert_eq!(ids, [(1, "000001"), (3, "139"), (4, "x.Y_z-1")]);
        assert_eq!(lines[0].seed(100), 100);
        assert_eq!(lines[1].seed(100), 5);
        assert_eq!(lines[2].seed(100), 100 + u64::from(fnv1a_32(b"x.Y_z-1")));
        assert_eq!(lines[2].seed(u64::MAX), u64::from(fnv1a_32(b"x.Y_z-1")) - 1);

        let stages = vec![Stage::new(Size::new(64, 64), 4), Stage::new(Size::new(96, 64), 2)];
        let flagged = Method::default().with("dilation", 2).unwrap();
        let options = MethodOptions { given: [("dilation".to_string(), 2.into())].into_iter().collect() };
        let flags = Request { negative_prompt: Some("f".into()), stages, method: flagged, ..Request::default() };
        let of = |line: usize| lines[line].request(&flags, &options).unwrap();
        assert_eq!((of(1).prompt.as_str(), of(1).guidance, of(1).negative_prompt.as_deref()), ("b", 7.1, Some("f")));
        assert_eq!((of(1).stages, of(1).method), (flags.stages.clone(), flags.method.clone()));
        // Beside the stages of the others, plain makes their steps at their last size.
        let plain = of(2);
        assert_eq!((plain.method.name(), plain.size, plain.steps), ("plain", Some(Size::new(96, 64)), Some(6)));
        assert_eq!(
            (plain.stages.len(), plain.method.option("dilation"), plain.negative_prompt.as_deref()),
            (0, None, Some("n"))
        );
    }

    /// The published test values of the hash.
    #[test]
    fn the_hash_is_fnv1a() {
        assert_eq!(fnv1a_32(b""), 0x811c9dc5);
        assert_eq!(fnv1a_32(b"a"), 0xe40c292c);
        assert_eq!(fnv1a_32(b"foobar"), 0xbf9cf968);
    }

    #[test]
    fn bad_lines_are_named() {
        let good = "{\"prompt\": \"a\"}\n";
        for (second, parts) in [
            ("cat", &["JSON object"][..]),
            ("[\"cat\"]", &["JSON object"]),
            ("{\"prompt\": \"cat\"", &["EOF", "column 16"]),
            ("{}", &["missing field `prompt`"]),
            ("{\"prompt\": 3}", &["integer `3`", "string", "column 12"]),
            ("{\"promt\": \"cat\"}", &["unknown field `promt`", "`negative_prompt`"]),
            ("{\"prompt\": \"a\", \"prompt\": \"b\"}", &["duplicate field `prompt`"]),
            ("{\"prompt\": \"a\"} {}", &["trailing characters"]),
            ("{\"prompt\": \"a\", \"seed\": -1}", &["`-1`", "u64"]),
            ("{\"prompt\": \"a\", \"seed\": \"1\"}", &["string \"1\"", "u64"]),
            ("{\"prompt\": \"a\", \"size\": \"64\"}", &["size \"64\"", "1024x768"]),
            ("{\"prompt\": \"a\", \"method\": \"magic\"}", &["method \"magic\"", "megafusion++"]),
            ("{\"prompt\": \"a\", \"stages\": \"64x64:0\"}", &["stages \"64x64:0\"", "from 1 to 1000"]),
            ("{\"prompt\": \"a\", \"steps\": 0}", &["steps 0", "from 1 to 1000"]),
            ("{\"prompt\": \"a\", \"guidance\": -1}", &["guidance -1", "from 0"]),
            ("{\"prompt\": \"a\", \"id\": \"\"}", &["id \"\"", "file name"]),
            ("{\"prompt\": \"a\", \"id\": \"../x\"}", &["id \"../x\"", "file name"]),
            ("{\"prompt\": \"a\", \"id\": \"a/b\"}", &["id \"a/b\"", "file name"]),
            ("{\"prompt\": \"a\", \"id\": \"-rf\"}", &["id \"-rf\"", "file name"]),
            ("{\"prompt\": \"a\", \"id\": \"caf\u{e9}\"}", &["id \"caf\u{e9}\"", "file name"]),
            ("{\"prompt\": \"a\", \"id\": \"Nul.1\"}", &["Nul.1", "Windows"]),
            ("{\"prompt\": \"a\", \"id\": 1.5}", &["id 1.5", "string"]),
            ("{\"prompt\": \"a\", \"id\": [1]}", &["id [1]", "string"]),
            ("{\"prompt\": \"a\", \"id\": \"000001\"}", &["id \"000001\"", "line 1"]),
        ] {
            let message = manifest(format!("{good}{second}\n{good}")).unwrap_err().to_string();
            for part in [&["prompts.jsonl:2: "][..], parts].concat() {
                assert!(message.contains(part), "{part} for {second} in: {message}");
            }
        }
        let long = format!("{{\"prompt\": \"a\", \"id\": \"{}\"}}", "x".repeat(201));
        assert!(manifest(long).unwrap_err().to_string().contains("at most 200"));
        let twice = "{\"prompt\": \"a\", \"id\": \"A\"}\n{\"prompt\": \"a\", \"id\": \"a\"}";
        assert!(manifest(twice).unwrap_err().to_string().contains("prompts.jsonl:2: id \"a\" is that of line 1"));
        for empty in ["", "\n \n"] {
            assert!(manifest(empty).unwrap_err().to_string().contains("has no lines"));
        }
        assert!(manifest(b"{\"prompt\": \"\xff\"}").unwrap_err().to_string().contains(":1: is not UTF-8"));
        assert!(manifest(vec![b' '; 1 << 21]).unwrap_err().to_string().contains("longer than 1048576 bytes"));
        let missing = read(Path::new("no/such.jsonl")).unwrap_err().to_string();
        assert!(missing.contains("no/such.jsonl: no such file"), "{missing}");
    }

    #[test]
    fn shards_are_disjoint_and_together_the_whole() {
        for count in 1..12 {
            let shards: Vec<Shard> =
                (1..=count).map(|index| Shard::parse(&format!("{index}/{count}")).unwrap()).collect();
            for position in 0..100 {
                assert_eq!(shards.iter().filter(|shard| shard.has(position)).count(), 1, "{position} of {count}");
            }
        }
        for text in ["", "1", "0/2", "3/2", "a/b", "1/0", "-1/2", "1/2/3", "1 / 2"] {
            assert!(Shard::parse(text).is_err(), "{text}");
        }
        assert_eq!(Shard::parse("2/8").unwrap().file_name("failed", "jsonl"), "failed-2-of-8.jsonl");
        assert_eq!(Shard::WHOLE.file_name("failed", "jsonl"), "failed.jsonl");
    }
}
