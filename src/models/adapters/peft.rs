//! The configuration that PEFT keeps of an adapter: from it comes the scale of what has no alpha among its tensors.

use regex::Regex;
use serde_json::{Map, Value};

use super::{AdapterFile, Part};
use crate::error::{Error, Result};

/// alpha and rank of one module, as its configuration has them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scaling {
    alpha: f64,
    rank: f64,
    /// The scale is alpha / sqrt(rank). Kalajdzievski 2023, arXiv:2312.03732.
    rank_stabilized: bool,
}

impl Scaling {
    /// The scale; `rank`: that of the tensors, which only a Kronecker product of two whole factors does not have.
    pub fn scale(self, rank: Option<usize>) -> f32 {
        let rank = rank.map_or(self.rank, |rank| rank as f64).max(1.0);
        (self.alpha / if self.rank_stabilized { rank.sqrt() } else { rank }) as f32
    }
}

/// Where diffusers writes the configurations into the metadata of a safetensors file.
const METADATA: &str = "lora_adapter_metadata";
/// What PEFT writes, and its configuration beside it.
const FILES: [&str; 2] = ["adapter_model.safetensors", "adapter_model.bin"];
const CONFIG: &str = "adapter_config.json";

/// Gives every module the scaling that the file's configuration has for it, if there is one: of the file's metadata, with
/// the part's name before each key or, where only one network was saved, without; else the adapter_config.json beside it.
///
/// # Errors
/// [`Error::File`]: a configuration that is no JSON object, or in which a value is of the wrong kind.
pub(super) fn configure(file: &mut AdapterFile) -> Result<()> {
    let path = file.file.path.clone();
    if let Some(text) = file.file.metadata().remove(METADATA) {
        let all = object(&text).map_err(|reason| Error::file(&path, format!("its metadata {METADATA} {reason}")))?;
        for part in Part::ALL {
            let start = format!("{}.", part.folder());
            let own =
                all.iter().filter_map(|(key, value)| Some((key.strip_prefix(&start)?.to_string(), value.clone())));
            let own: Map<String, Value> = own.collect();
            let config = if own.is_empty() { &all } else { &own };
            if ["r", "lora_alpha", "alpha", "alpha_pattern"].iter().any(|key| config.contains_key(*key)) {
                give(file, part, config)
                    .map_err(|reason| Error::file(&path, format!("its metadata {METADATA}: {reason}")))?;
            }
        }
    } else if path.file_name().is_some_and(|name| FILES.iter().any(|file| name == *file)) {
        let beside = path.with_file_name(CONFIG);
        let text = match std::fs::read_to_string(&beside) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            text => text.map_err(|source| Error::io(&beside, source))?,
        };
        let config = object(&text).map_err(|reason| Error::file(&beside, reason))?;
        for part in Part::ALL {
            give(file, part, &config).map_err(|reason| Error::file(&beside, reason))?;
        }
    }
    Ok(())
}

fn object(text: &str) -> std::result::Result<Map<String, Value>, String> {
    serde_json::from_str(text).map_err(|error| format!("is no JSON object: {error}"))
}

/// Sets the scaling of the part's modules. `lora_alpha` (`alpha` of LoHa and LoKr) and `r` hold for all modules but those
/// that `alpha_pattern` and `rank_pattern` name; PEFT's default is 8.
fn give(file: &mut AdapterFile, part: Part, config: &Map<String, Value>) -> std::result::Result<(), String> {
    let own = config.get("lora_alpha").map(|alpha| ("lora_alpha", alpha));
    let (key, alpha) = own.or_else(|| Some(("alpha", config.get("alpha")?))).unwrap_or(("lora_alpha", &Value::Null));
    let alpha = if alpha.is_null() { 8.0 } else { number(key, alpha)? };
    let rank = config.get("r").filter(|rank| !rank.is_null()).map_or(Ok(8.0), |rank| number("r", rank))?;
    let rank_stabilized = match config.get("use_rslora") {
        None | Some(Value::Null) => false,
        Some(Value::Bool(flag)) => *flag,
        Some(other) => return Err(format!("use_rslora is {other}, expected true or false")),
    };
    let mut modules: Vec<_> =
        file.modules.iter_mut().filter(|((of, _), _)| *of == part).map(|(_, module)| module).collect();
    let paths: Vec<String> = modules.iter().map(|module| module.path.clone()).collect();
    let alphas = by_pattern(config, "alpha_pattern", &paths)?;
    let ranks = by_pattern(config, "rank_pattern", &paths)?;
    for (module, (own_alpha, own_rank)) in modules.iter_mut().zip(alphas.into_iter().zip(ranks)) {
        let (alpha, rank) = (own_alpha.unwrap_or(alpha), own_rank.unwrap_or(rank));
        module.scaling = Some(Scaling { alpha, rank, rank_stabilized });
    }
    Ok(())
}

/// What the table `key` has for each path: the value of the first pattern, in the order of the file, that is the path or what
/// follows one of its dots. A pattern is a regular expression, so that the dots of a name in it match themselves and more.
fn by_pattern(
    config: &Map<String, Value>,
    key: &str,
    paths: &[String],
) -> std::result::Result<Vec<Option<f64>>, String> {
    let mut found = vec![None; paths.len()];
    let table = match config.get(key) {
        None | Some(Value::Null) => return Ok(found),
        Some(Value::Object(table)) => table,
        Some(other) => return Err(format!("{key} is {other}, expected names with their numbers")),
    };
    for (pattern, value) in table {
        let value = number(&format!("{key} of {pattern}"), value)?;
        let regex = Regex::new(&format!(r"^(?:.*\.)?(?:{pattern})$"))
            .map_err(|_| format!("{key} has {pattern:?}, which is no regular expression that is understood"))?;
        for (found, path) in found.iter_mut().zip(paths) {
            if found.is_none() && regex.is_match(path) {
                *found = Some(value);
            }
        }
    }
    Ok(found)
}

fn number(key: &str, value: &Value) -> std::result::Result<f64, String> {
    value.as_f64().ok_or_else(|| format!("{key} is {value}, expected a number"))
}
