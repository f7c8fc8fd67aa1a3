//! What the methods that change convolutions have in common: the names of convolutions, the published maps of blocks, FreeU.

use std::collections::BTreeSet;

use super::method::{OptionKind, OptionSpec};
use crate::error::{Error, Result};
use crate::models::{ConvPlace, UnetBlock, UnetConfig};
use crate::ops::FreeU;

/// FreeU's factors, or none.
pub(super) const FREEU: OptionSpec = OptionSpec {
    name: "freeu",
    heading: "FreeU",
    value_name: "B1,B2,S1,S2",
    help: "FreeU's factors of backbone and skip connections, or none (default: by model)\n\n\
           Where the backbone of an up block has four (B1, S1) or two times (B2, S2) the channels of the finest level. SD 1.x \
           1.2,1.4,0.9,0.2; SD 2.x 1.1,1.2,0.9,0.2; SDXL 1.1,1.2,0.6,0.4.",
    kind: OptionKind::Text { check: |text| freeu_of(text).map(drop) },
};

/// Names of groups or convolutions.
pub(super) fn names(text: &str) -> std::result::Result<Vec<&str>, String> {
    let parts: Vec<&str> = text.split(',').map(str::trim).collect();
    match parts.iter().all(|part| !part.is_empty() && !part.contains('=')) {
        true => Ok(parts),
        false => Err("expected NAME,..., groups (D2, M, U0) or convolutions".into()),
    }
}

/// Of four and of two times the channels of the finest level.
fn freeu_of(text: &str) -> std::result::Result<Option<[FreeU; 2]>, String> {
    if text == "none" {
        return Ok(None);
    }
    let numbers: Vec<f32> = text.split(',').map_while(|part| part.trim().parse().ok()).collect();
    match numbers[..] {
        [b1, b2, s1, s2]
            if text.split(',').count() == 4 && numbers.iter().all(|number| (0.0..=10.0).contains(number)) =>
        {
            Ok(Some([FreeU { backbone: b1, skip: s1 }, FreeU { backbone: b2, skip: s2 }]))
        }
        _ => Err("expected none, or B1,B2,S1,S2: four numbers from 0 to 10".into()),
    }
}

/// # Errors
/// [`Error::Request`]: what was given is none.
pub(super) fn freeu_for(given: Option<&str>, map: Option<Map>) -> Result<Option<[FreeU; 2]>> {
    let text = given.unwrap_or(map.map_or("none", Map::freeu));
    freeu_of(text).map_err(|reason| Error::Request { field: "freeu", value: text.into(), reason })
}

/// The published maps of blocks.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Map {
    /// Four levels; SD 2.x are those with linear projections.
    Sd1,
    Sd2,
    /// Three levels.
    Sdxl,
}

impl Map {
    pub(super) fn of(unet: &UnetConfig) -> Option<Map> {
        match (unet.down_blocks.len(), unet.use_linear_projection) {
            (4, false) => Some(Map::Sd1),
            (4, true) => Some(Map::Sd2),
            (3, _) => Some(Map::Sdxl),
            _ => None,
        }
    }

    fn freeu(self) -> &'static str {
        match self {
            Map::Sd1 => "1.2,1.4,0.9,0.2",
            Map::Sd2 => "1.1,1.2,0.9,0.2",
            Map::Sdxl => "1.1,1.2,0.6,0.4",
        }
    }
}

/// The convolutions of a UNet, by what a list calls them.
pub(super) struct Names(pub(super) Vec<ConvPlace>);

impl Names {
    /// None: there is no such convolution.
    pub(super) fn get(&self, name: &str) -> Vec<ConvPlace> {
        let number = |prefix| name.strip_prefix(prefix).and_then(|number: &str| number.parse().ok());
        let block = match (name, number('D'), number('U')) {
            ("M", ..) => Some(UnetBlock::Mid),
            (_, Some(i), _) => Some(UnetBlock::Down(i)),
            (_, _, Some(i)) => Some(UnetBlock::Up(i)),
            _ => None,
        };
        let is_meant = |place: &&ConvPlace| match block {
            Some(block) => place.block == block,
            None => place.to_string() == name,
        };
        self.0.iter().filter(is_meant).copied().collect()
    }

    /// # Errors
    /// [`Error::Request`]: there is no such convolution.
    pub(super) fn find(&self, field: &'static str, name: &str) -> Result<Vec<ConvPlace>> {
        let places = self.get(name);
        if !places.is_empty() {
            return Ok(places);
        }
        let blocks: BTreeSet<UnetBlock> = self.0.iter().map(|place| place.block).collect();
        let group = |block: &UnetBlock| match block {
            UnetBlock::Down(i) => format!("D{i}"),
            UnetBlock::Mid => "M".into(),
            UnetBlock::Up(i) => format!("U{i}"),
        };
        let groups: Vec<String> = blocks.iter().map(group).collect();
        let reason = format!(
            "this network has no such convolution; expected {} or a name like {}",
            groups.join(", "),
            self.0[self.0.len() - 1]
        );
        Err(Error::Request { field, value: name.into(), reason })
    }

    /// The convolutions of these groups that the network has.
    pub(super) fn groups(&self, names: &[&str]) -> BTreeSet<ConvPlace> {
        names.iter().flat_map(|name| self.get(name)).collect()
    }

    /// The convolutions of a list.
    ///
    /// # Errors
    /// [`Error::Request`]: no list, or a name that the network does not have.
    pub(super) fn listed(&self, field: &'static str, list: &str) -> Result<BTreeSet<ConvPlace>> {
        let listed = names(list).map_err(|reason| Error::Request { field, value: list.into(), reason })?;
        let places = listed.into_iter().map(|name| self.find(field, name)).collect::<Result<Vec<_>>>()?;
        Ok(places.into_iter().flatten().collect())
    }
}
