//! Learned words: Gal et al. 2022, arXiv:2208.01618. A file holds the vectors that stand in the text encoder's embedding
//! table for a new word.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};

use crate::error::{Error, Result};
use crate::pickle;

/// Which text encoder of a model the vectors are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoder {
    /// The only one, of SD 1.x and 2.x.
    Single,
    /// SDXL's first, `clip_l` in the file.
    ClipL,
    /// SDXL's second, `clip_g` in the file.
    ClipG,
}

/// Vectors `[n, C]` of one encoder.
#[derive(Clone, Debug, PartialEq)]
struct Vectors {
    key: String,
    rows: usize,
    width: usize,
    values: Vec<f32>,
}

/// One file: the word that stands in prompts and its vectors.
#[derive(Clone, Debug, PartialEq)]
pub struct TextualInversion {
    word: String,
    path: PathBuf,
    tensors: Vec<Vectors>,
}

const SINGLE_KEY: &str = "emb_params";
const SDXL_KEYS: [&str; 2] = ["clip_l", "clip_g"];
/// No prompt holds more tokens; a file with more vectors is something else.
const MOST_VECTORS: usize = 75;

impl TextualInversion {
    /// Reads a file in one of three forms: webui's, a tensor `emb_params` `[n, C]`, or `string_to_param` in a `.pt`; SDXL's,
    /// `clip_l` and `clip_g`; both take their word from the file's name without its ending. Or that of diffusers, one tensor
    /// `[C]` or `[n, C]` whose key is the word. safetensors, or PyTorch's own `.pt` and `.bin`, of which nothing is run; f32,
    /// f16 or bf16.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::File`]: another kind of file, damaged, a pickle that would run commands, no tensor or several,
    /// a name that is no word; [`Error::Weight`]: shape, dtype, values that are not finite.
    pub fn read(path: &Path) -> Result<TextualInversion> {
        let bytes = std::fs::read(path).map_err(|error| Error::io(path, error))?;
        TextualInversion::from_bytes(path, &bytes)
    }

    /// From the bytes of a file; `path` gives the word and stands in errors. Errors as [`read`](TextualInversion::read).
    pub fn from_bytes(path: &Path, bytes: &[u8]) -> Result<TextualInversion> {
        let tensors = stored(bytes).map_err(|reason| Error::file(path, reason))?;
        let keys: Vec<&str> = tensors.keys().map(String::as_str).collect();
        let stem = || path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
        let word = match keys.as_slice() {
            [] => return Err(Error::file(path, "the file holds no tensor; expected a learned word's vectors")),
            [key] if *key != SINGLE_KEY && !SDXL_KEYS.contains(key) => key.to_string(),
            keys if *keys == [SINGLE_KEY] || keys.iter().all(|key| SDXL_KEYS.contains(key)) => stem(),
            keys => {
                let shown = keys.iter().take(4).copied().collect::<Vec<_>>().join(", ");
                let reason = format!(
                    "{} tensors ({shown}{}); a learned word's file has one, or clip_l and clip_g for SDXL",
                    keys.len(),
                    if keys.len() > 4 { ", ..." } else { "" }
                );
                return Err(Error::file(path, reason));
            }
        };
        let word = word.trim().to_string();
        if word.is_empty() {
            return Err(Error::file(path, "the learned word is empty; it is the tensor's key or the file's name"));
        }
        let tensors = tensors.iter().map(|(key, tensor)| vectors(path, key, tensor)).collect::<Result<_>>()?;
        Ok(TextualInversion { word, path: path.to_path_buf(), tensors })
    }

    /// Tells these vectors from others: the first 16 hexadecimal digits of BLAKE3 over them.
    pub fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for Vectors { key, values, .. } in &self.tensors {
            hasher.update(key.as_bytes());
            values.iter().for_each(|value| {
                hasher.update(&value.to_le_bytes());
            });
        }
        hasher.finalize().to_hex()[..16].to_string()
    }

    /// The word that stands for the vectors in a prompt.
    pub fn word(&self) -> &str {
        &self.word
    }

    fn vectors(&self, encoder: Encoder, hidden_size: usize) -> Result<&Vectors> {
        let named = |key: &str| self.tensors.iter().find(|tensor| tensor.key == key);
        let sdxl = self.tensors.iter().any(|tensor| SDXL_KEYS.contains(&tensor.key.as_str()));
        let found = match encoder {
            Encoder::Single if !sdxl => self.tensors.first(),
            Encoder::Single => None,
            Encoder::ClipL => named("clip_l"),
            Encoder::ClipG => named("clip_g"),
        };
        let Some(found) = found else {
            let reason = match encoder {
                Encoder::Single => "a learned word of SDXL (clip_l, clip_g); this model has one text encoder",
                _ => "SDXL needs a file with both clip_l and clip_g",
            };
            return Err(Error::file(&self.path, reason));
        };
        if found.width != hidden_size {
            let reason = format!(
                "its vectors have {} values, the text encoder's have {hidden_size}; it was learned for another model \
                 (768: SD 1.x, 1024: SD 2.x)",
                found.width
            );
            return Err(Error::Weight { file: self.path.clone(), key: found.key.clone(), reason });
        }
        Ok(found)
    }
}

/// A tensor of a file.
struct Stored<'a> {
    dtype: Dtype,
    shape: Vec<usize>,
    data: Cow<'a, [u8]>,
}

/// The tensors of a file by their keys; what webui calls `string_to_param` in a `.pt` under the key that it has in safetensors.
fn stored(bytes: &[u8]) -> std::result::Result<BTreeMap<String, Stored<'_>>, String> {
    if !pickle::is_pickle(bytes) {
        let file = SafeTensors::deserialize(bytes)
            .map_err(|error| format!("not a complete .safetensors file nor one that torch.save wrote: {error}"))?;
        let names: Vec<String> = file.names().into_iter().map(String::from).collect();
        let mut tensors = BTreeMap::new();
        for key in names {
            let view = file.tensor(&key).map_err(|error| error.to_string())?;
            let (dtype, shape, data) = (view.dtype(), view.shape().to_vec(), Cow::Owned(view.data().to_vec()));
            tensors.insert(key, Stored { dtype, shape, data });
        }
        return Ok(tensors);
    }
    let mut read = pickle::read(bytes)?;
    let of_webui = |key: &String| key.starts_with("string_to_param.");
    if read.tensors.keys().any(of_webui) {
        let (vectors, others): (Vec<_>, Vec<_>) = read.tensors.into_iter().partition(|(key, _)| of_webui(key));
        // The token that a training gave its word.
        let mut left: BTreeMap<_, _> =
            others.into_iter().filter(|(key, _)| !key.starts_with("string_to_token.")).collect();
        match <[_; 1]>::try_from(vectors) {
            Ok([(_, vectors)]) => drop(left.insert(SINGLE_KEY.to_string(), vectors)),
            Err(several) => left.extend(several),
        }
        read.tensors = left;
    }
    let stored =
        |tensor: pickle::PickledTensor| Stored { data: tensor.data(bytes), dtype: tensor.dtype, shape: tensor.shape };
    Ok(read.tensors.into_iter().map(|(key, tensor)| (key, stored(tensor))).collect())
}

fn vectors(path: &Path, key: &str, tensor: &Stored) -> Result<Vectors> {
    let broken = |reason: String| Error::Weight { file: path.to_path_buf(), key: key.to_string(), reason };
    let (rows, width) = match tensor.shape[..] {
        [width] if width > 0 => (1, width),
        [rows, width] if (1..=MOST_VECTORS).contains(&rows) && width > 0 => (rows, width),
        _ => {
            let want = format!("expected [C] or [n, C] with n of 1 to {MOST_VECTORS}");
            return Err(broken(format!("shape {:?}; {want}", tensor.shape)));
        }
    };
    let data = &*tensor.data;
    let pairs = || data.as_chunks::<2>().0.iter();
    let values: Vec<f32> = match tensor.dtype {
        Dtype::F32 => data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        Dtype::F16 => pairs().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
        Dtype::BF16 => pairs().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
        other => return Err(broken(format!("dtype {other:?}; expected F32, F16 or BF16"))),
    };
    match values.iter().filter(|value| !value.is_finite()).count() {
        0 => Ok(Vectors { key: key.to_string(), rows, width, values }),
        count => Err(broken(format!("{count} of {} values are not finite; the file is damaged", values.len()))),
    }
}

/// The learned words of one text encoder and the rows that they add to its embedding table.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LearnedWords {
    /// Each word with its number of vectors, in the order of the rows.
    words: Vec<(String, usize)>,
    table: Vec<f32>,
    width: usize,
}

impl LearnedWords {
    /// Joins files for the text encoder `encoder`, whose embeddings have `hidden_size` values.
    ///
    /// # Errors
    /// [`Error::Weight`]: vectors of another width; [`Error::File`]: a file without vectors for this encoder, two files
    /// with one word (letters' case does not count).
    pub fn new(files: &[TextualInversion], encoder: Encoder, hidden_size: usize) -> Result<LearnedWords> {
        let mut learned = LearnedWords { width: hidden_size, ..LearnedWords::default() };
        for (i, file) in files.iter().enumerate() {
            let same = |other: &&TextualInversion| other.word.to_lowercase() == file.word.to_lowercase();
            if let Some(other) = files[..i].iter().find(same) {
                let reason = format!("the learned word {:?} is also that of {}", file.word, other.path.display());
                return Err(Error::file(&file.path, format!("{reason}; rename one of them")));
            }
            let vectors = file.vectors(encoder, hidden_size)?;
            learned.words.push((file.word.clone(), vectors.rows));
            learned.table.extend_from_slice(&vectors.values);
        }
        Ok(learned)
    }

    /// Rows `[K, C]` that follow the embedding table's own: id `vocab_size + k` is row k.
    pub fn table(&self) -> (&[f32], [usize; 2]) {
        (&self.table, [self.words.iter().map(|(_, rows)| rows).sum(), self.width])
    }

    pub fn words(&self) -> &[(String, usize)] {
        &self.words
    }
}
