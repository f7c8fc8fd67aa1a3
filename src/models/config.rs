//! Reading config.json: typed keys with the published class's defaults, and errors that name key and value.

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// The largest counts that are believed; the published models stay far below. Building what is beyond them would take
/// minutes and all memory before the first tensor is missed.
pub(super) mod most {
    pub const CHANNELS: usize = 1 << 16;
    /// ResNets or transformer blocks in a row.
    pub const LAYERS: usize = 256;
    pub const LEVELS: usize = 16;
    pub const KERNEL: usize = 31;
    /// Of a vocabulary.
    pub const TOKENS: usize = 1 << 20;
    /// Positions of a prompt.
    pub const POSITIONS: usize = 1 << 14;
    /// Pixels or latent cells along a picture's side.
    pub const SIDE: usize = 1 << 14;
}

/// The object of a config.json. An absent key takes the default; `null` is a value of its own. Keys that no reader knows
/// are left alone, as the published library does (training scripts leave some behind).
pub(super) struct JsonConfig<'a> {
    what: &'a str,
    keys: Map<String, Value>,
}

impl<'a> JsonConfig<'a> {
    /// `what` (the path) stands in errors; `class` is the `_class_name` that the file must have if it names one.
    pub(super) fn parse(what: &'a str, json: &str, class: &str) -> Result<JsonConfig<'a>> {
        let keys: Map<String, Value> = serde_json::from_str(json)
            .map_err(|error| Error::config(what, format!("not a JSON object ({error}): download the file again")))?;
        let config = JsonConfig { what, keys };
        match config.keys.get("_class_name") {
            Some(found) if found != class => Err(config.error("_class_name", format!("expected {class:?}"))),
            _ => Ok(config),
        }
    }

    /// `key` is what it is, and `wanted` is what it could be.
    pub(super) fn error(&self, key: &str, wanted: impl AsRef<str>) -> Error {
        let value = self.keys.get(key).map_or("absent".to_string(), Value::to_string);
        Error::config(self.what, format!("{key} is {value}: {}", wanted.as_ref()))
    }

    /// `None`: the key is absent.
    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.keys.get(key)
    }

    /// A count from 1 to `most`.
    pub(super) fn count(&self, key: &str, default: usize, most: usize) -> Result<usize> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => {
                as_count(value, most).ok_or_else(|| self.error(key, format!("expected a number from 1 to {most}")))
            }
        }
    }

    /// A count, or `None` for `null` and absent.
    pub(super) fn optional_count(&self, key: &str, most: usize) -> Result<Option<usize>> {
        match self.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(_) => self.count(key, 0, most).map(Some),
        }
    }

    /// A finite number.
    pub(super) fn number(&self, key: &str, default: f64) -> Result<f64> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value.as_f64().filter(|v| v.is_finite()).ok_or_else(|| self.error(key, "expected a number")),
        }
    }

    /// A number above 0.
    pub(super) fn positive(&self, key: &str, default: f64) -> Result<f64> {
        let value = self.number(key, default)?;
        if value > 0.0 { Ok(value) } else { Err(self.error(key, "expected a number above 0")) }
    }

    pub(super) fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| self.error(key, "expected true or false")),
        }
    }

    /// A list of names.
    pub(super) fn names(&self, key: &str, default: &[&str]) -> Result<Vec<String>> {
        match self.get(key) {
            None => Ok(default.iter().map(|name| name.to_string()).collect()),
            Some(value) => {
                let names = value.as_array().map(|list| list.iter().map(|v| v.as_str().map(String::from)).collect());
                names.flatten().ok_or_else(|| self.error(key, "expected a list of names"))
            }
        }
    }

    /// A list of counts from 1 to `most`, not empty.
    pub(super) fn counts(&self, key: &str, default: &[usize], most: usize) -> Result<Vec<usize>> {
        match self.get(key) {
            None => Ok(default.to_vec()),
            Some(value) => {
                let count = |value| as_count(value, most);
                let counts: Option<Vec<usize>> = value.as_array().and_then(|list| list.iter().map(count).collect());
                let wanted = || self.error(key, format!("expected a list of counts from 1 to {most}"));
                counts.filter(|c| !c.is_empty()).ok_or_else(wanted)
            }
        }
    }

    /// `block_out_channels`: channels of each level, all divisible into `groups` (`norm_num_groups`).
    pub(super) fn levels(&self, default: &[usize], groups: usize) -> Result<Vec<usize>> {
        const KEY: &str = "block_out_channels";
        let channels = self.counts(KEY, default, most::CHANNELS)?;
        if channels.len() > most::LEVELS {
            return Err(self.error(KEY, format!("expected at most {} levels", most::LEVELS)));
        }
        if let Some(channels) = channels.iter().find(|channels| !channels.is_multiple_of(groups)) {
            let wanted = format!("{channels} is not divisible into norm_num_groups = {groups} groups");
            return Err(self.error(KEY, wanted));
        }
        Ok(channels)
    }

    /// A count for every level: one for all, or a list of `levels`.
    pub(super) fn count_per_level(&self, key: &str, levels: usize, default: usize, most: usize) -> Result<Vec<usize>> {
        match self.get(key) {
            Some(Value::Array(_)) => {
                let counts = self.counts(key, &[], most)?;
                if counts.len() == levels { Ok(counts) } else { Err(self.error(key, levels_wanted(levels))) }
            }
            _ => Ok(vec![self.count(key, default, most)?; levels]),
        }
    }

    /// True or false for every level: one for all, or a list of `levels`.
    pub(super) fn flag_per_level(&self, key: &str, levels: usize, default: bool) -> Result<Vec<bool>> {
        match self.get(key) {
            Some(Value::Array(list)) => {
                let flags: Option<Vec<bool>> = list.iter().map(Value::as_bool).collect();
                flags.filter(|f| f.len() == levels).ok_or_else(|| self.error(key, levels_wanted(levels)))
            }
            _ => Ok(vec![self.flag(key, default)?; levels]),
        }
    }

    /// One number or `[height, width]`; `None` for `null` and absent.
    pub(super) fn size(&self, key: &str) -> Result<Option<[usize; 2]>> {
        match self.get(key) {
            Some(Value::Array(_)) => match self.counts(key, &[], most::SIDE)?[..] {
                [height, width] => Ok(Some([height, width])),
                _ => Err(self.error(key, "expected one number or [height, width]")),
            },
            _ => Ok(self.optional_count(key, most::SIDE)?.map(|side| [side, side])),
        }
    }

    /// Is it this text?
    pub(super) fn is(&self, key: &str, text: &str) -> bool {
        self.get(key).is_some_and(|value| value == text)
    }

    /// The key must be absent or one of `supported`.
    pub(super) fn only(&self, key: &str, supported: &[Value]) -> Result<()> {
        match self.get(key) {
            Some(value) if !supported.contains(value) => {
                let list: Vec<String> = supported.iter().map(Value::to_string).collect();
                Err(self.error(key, format!("not supported, only {} is", list.join(" or "))))
            }
            _ => Ok(()),
        }
    }

    /// SiLU is the only activation that the fused norm knows; `swish` is its other name.
    pub(super) fn only_silu(&self, key: &str) -> Result<()> {
        match self.get(key) {
            None => Ok(()),
            Some(Value::String(name)) if ["silu", "swish"].contains(&name.to_lowercase().as_str()) => Ok(()),
            Some(_) => Err(self.error(key, "not supported, only \"silu\" (or \"swish\") is")),
        }
    }
}

/// A whole number from 1 to `most`.
pub(super) fn as_count(value: &Value, most: usize) -> Option<usize> {
    value.as_u64().and_then(|v| usize::try_from(v).ok()).filter(|v| (1..=most).contains(v))
}

fn levels_wanted(levels: usize) -> String {
    format!("expected one value, or a list of {levels}, one for each entry of block_out_channels")
}
