//! RRDBNet, the generator of ESRGAN (Wang et al. 2018, arXiv:1809.00219, sec. 3.1), as BSRGAN (Zhang et al. 2021,
//! arXiv:2103.14006) and Real-ESRGAN (Wang et al. 2021, arXiv:2107.10833) have it: a picture in [0, 1] to a larger one.
//!
//! ```text
//! dense block   c_j = lrelu(conv_j([x, c_1 .. c_j-1])), j = 1 .. 4;   y = x + 0.2 conv_5([x, c_1 .. c_4])
//! RRDB          y = x + 0.2 dense_3(dense_2(dense_1(x)))
//! network       f = conv_first(x);   f = f + conv_body(RRDBs(f));   for each doubling f = lrelu(conv_up(nearest x2 (f)));
//!               y = conv_last(lrelu(conv_hr(f)))
//! ```
//!
//! All convolutions are 3 x 3 with bias; lrelu has slope 0.2 below zero. Models for x2 and x1 end like one for x4 and read the
//! picture at half or a quarter of its edges, with the pixels of a square as channels (pixel unshuffle).
//!
//! Every value depends on the rows around it alone, so a part of the picture at a time is the same picture, bit for bit:
//! convolutions make the rows that their input allows, fewer by one at each edge that is a cut and not the picture's.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use super::layers::Conv2d;
use super::weights::{WeightStore, Weights};
use crate::error::{Error, Result};
use crate::ops::{self, Source, Stripe};
use crate::runtime::{DType, Device, Tensor};

/// Of LeakyReLU, below zero.
const SLOPE: f32 = 0.2;
/// What a dense block and an RRDB add to their input is multiplied by this.
const RESIDUAL_SCALE: f32 = 0.2;
/// Dicts that training puts the weights into, the moving average first.
const WRAPPERS: [&str; 4] = ["params_ema", "params", "state_dict", "model_state_dict"];

/// The sizes of a network, as its tensors have them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RrdbNetConfig {
    /// Residual-in-residual dense blocks: 23, or 6 for the anime model.
    pub blocks: usize,
    /// Channels between the blocks: 64.
    pub features: usize,
    /// Channels that a convolution of a dense block adds: 32.
    pub growth: usize,
    /// Edges of the square of pixels that the first convolution reads as channels: 1, 2 or 4.
    pub unshuffle: usize,
    /// How often the edges double: 2 for x4, and for x2 and x1 after an unshuffle.
    pub doublings: usize,
}

impl RrdbNetConfig {
    /// RealESRGAN_x4plus and BSRGAN.
    pub const X4: RrdbNetConfig = RrdbNetConfig { blocks: 23, features: 64, growth: 32, unshuffle: 1, doublings: 2 };

    /// How many times the edges of the picture become longer.
    pub fn scale(&self) -> usize {
        (1 << self.doublings) / self.unshuffle
    }

    /// Of a picture's three channels.
    fn inputs(&self) -> usize {
        3 * self.unshuffle * self.unshuffle
    }

    /// Rows above and below, at the resolution of the blocks, that a row of their result depends on.
    fn reach(&self) -> usize {
        15 * self.blocks + 2
    }

    /// By the tensors of a file whose keys are [`layer_key`]s.
    fn of(path: &Path, shapes: &BTreeMap<String, Vec<usize>>) -> Result<RrdbNetConfig> {
        let refuse = |reason: String| Error::file(path, reason);
        let shape = |key: &str| -> Result<[usize; 2]> {
            match shapes.get(key).map(Vec::as_slice) {
                Some(&[outputs, inputs, 3, 3]) => Ok([outputs, inputs]),
                Some(other) => Err(refuse(format!("tensor {key} has shape {other:?}, expected [O, I, 3, 3]"))),
                None => Err(refuse(format!("tensor {key} is missing: not a whole RRDBNet"))),
            }
        };
        let [features, inputs] = shape("conv_first.weight")?;
        let [growth, _] = shape("body.0.rdb1.conv1.weight")?;
        let count = |layer: &dyn Fn(usize) -> String| (0..).take_while(|&i| shapes.contains_key(&layer(i))).count();
        let blocks = count(&|i| format!("body.{i}.rdb1.conv1.weight"));
        let doublings = count(&|i| format!("conv_up{}.weight", i + 1));
        let unshuffle = match inputs {
            3 => 1,
            12 => 2,
            48 => 4,
            _ => {
                let reason = format!(
                    "its first convolution reads {inputs} channels; a colour picture has 3, or 12 and 48 by squares of pixels"
                );
                return Err(refuse(reason));
            }
        };
        let [outputs, _] = shape("conv_last.weight")?;
        if outputs != 3 {
            return Err(refuse(format!("it makes {outputs} channels; a colour picture has 3")));
        }
        if features == 0 || growth == 0 {
            return Err(refuse(format!("{features} features and {growth} of growth: expected at least 1 of each")));
        }
        if !(unshuffle..=8).contains(&(1 << doublings.min(8))) {
            let reason = format!(
                "{doublings} upsampling convolutions after squares of {unshuffle}: expected to enlarge by 1, 2, 4 or 8"
            );
            return Err(refuse(reason));
        }
        Ok(RrdbNetConfig { blocks, features, growth, unshuffle, doublings })
    }
}

/// How a picture goes through the network: the result has the same bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tiling {
    /// The blocks at once; the enlarged maps, whose rows depend on few others, in stripes of a bounded size.
    #[default]
    Automatic,
    /// At once.
    Whole,
    /// The blocks in stripes too, of so many rows of the picture that is enlarged. Each stripe also computes rows around it that
    /// become fewer from layer to layer, 347 of them above and below with 23 blocks: with small stripes most of the work is
    /// done several times.
    Stripes(usize),
}

/// The enlarged maps of an automatic stripe have this size each, at most.
const MAP_BYTES: usize = 1 << 28;

/// A network that enlarges pictures.
pub struct RrdbNet {
    config: RrdbNetConfig,
    device: Device,
    dtype: DType,
    conv_first: Conv2d, // [F, 3, 3, 3 u u]
    body: Vec<Rrdb>,
    conv_body: Conv2d,    // [F, 3, 3, F]
    conv_up: Vec<Conv2d>, // [F, 3, 3, F]
    conv_hr: Conv2d,      // [F, 3, 3, F]
    conv_last: Conv2d,    // [3, 3, 3, F]
}

impl RrdbNet {
    /// Reads a safetensors or `.pth` file with the keys of Real-ESRGAN (BasicSR), of BSRGAN and later ESRGAN, or of the first
    /// ESRGAN (`model.1.sub.0.RDB1.conv1.0`); its sizes are those of its tensors. Also tells what no layer uses, a sentence each.
    ///
    /// # Errors
    /// [`Error::File`]: unreadable, or another network, which is named; [`Error::Weight`]: missing, of another shape, not finite;
    /// [`Error::OutOfMemory`].
    pub fn open(path: &Path, device: &Device, dtype: DType) -> Result<(RrdbNet, Vec<String>)> {
        let mut store = WeightStore::open_state_dict(path, &WRAPPERS, device, dtype)?;
        let keys: Vec<String> = store.tensors().map(|(key, _)| key.to_string()).collect();
        if let Some(other) = other_network(&keys) {
            let reason = format!("is {other}, which is not supported; ESRGAN, Real-ESRGAN and BSRGAN (RRDBNet) are");
            return Err(Error::file(path, reason));
        }
        let numbered = numbered_layers(&keys);
        store.rename(|key| Some(layer_key(key, &numbered)))?;
        let shapes = store.tensors().map(|(key, shape)| (key.to_string(), shape.to_vec())).collect();
        let config = RrdbNetConfig::of(path, &shapes)?;
        let net = RrdbNet::load(&mut store, &config)?;
        Ok((net, store.unused().iter().map(ToString::to_string).collect()))
    }

    /// Takes the tensors of `store` by the keys of Real-ESRGAN.
    ///
    /// # Errors
    /// [`Error::Weight`]: missing, of another shape, not finite; [`Error::OutOfMemory`].
    pub fn load(store: &mut WeightStore, config: &RrdbNetConfig) -> Result<RrdbNet> {
        // y = x + 0.2 (w * h + b) = x + (0.2 w) * h + 0.2 b: the products are made in f32 before the weights are rounded, so
        // each weight is still rounded to the dtype once, by half an ulp of its own; and the sum with x is rounded once, where
        // three ops would round three times.
        store.scale(|key| if key.contains(".conv5.") { RESIDUAL_SCALE } else { 1.0 });
        let w = store.root();
        let &RrdbNetConfig { blocks, features, growth, doublings, .. } = config;
        let conv = |name: &str, outputs, inputs| Conv2d::load(&w.at(name), outputs, inputs, 3);
        Ok(RrdbNet {
            conv_first: conv("conv_first", features, config.inputs())?,
            body: (0..blocks)
                .map(|i| Rrdb::load(&w.at(format!("body.{i}")), features, growth))
                .collect::<Result<_>>()?,
            conv_body: conv("conv_body", features, features)?,
            conv_up: (1..=doublings)
                .map(|i| conv(&format!("conv_up{i}"), features, features))
                .collect::<Result<_>>()?,
            conv_hr: conv("conv_hr", features, features)?,
            conv_last: conv("conv_last", 3, features)?,
            device: w.device().clone(),
            dtype: w.dtype(),
            config: *config,
        })
    }

    pub fn config(&self) -> &RrdbNetConfig {
        &self.config
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Weights and biases.
    pub fn parameters(&self) -> u64 {
        let blocks = self.body.iter().flat_map(|block| &block.dense).flat_map(|dense| &dense.convs);
        let others = [&self.conv_first, &self.conv_body, &self.conv_hr, &self.conv_last];
        let convs = blocks.chain(others).chain(&self.conv_up);
        convs.map(|conv| (conv.weight.numel() + conv.bias.numel()) as u64).sum()
    }

    /// `picture: [1, H, W, 3]` in [0, 1] to `[1, scale H, scale W, 3]`, not clamped, on the host in f32. H and W must be
    /// multiples of the unshuffle's edge.
    ///
    /// # Errors
    /// As [`forward_rows`](RrdbNet::forward_rows).
    pub fn forward(&self, picture: &Tensor, tiling: Tiling) -> Result<Vec<f32>> {
        let mut values = Vec::new();
        self.forward_rows(picture, tiling, &mut |rows| {
            values.extend(rows.to_f32_vec()?);
            Ok(())
        })?;
        Ok(values)
    }

    /// The same row by row: `take` is called with `[1, rows, scale W, 3]` from the top down, so that no more than a stripe of
    /// the result is on the device. An error of `take` ends it.
    ///
    /// Beside the weights, some 7 maps of `features` channels are there at the most in the blocks, of `H W / unshuffle^2` pixels
    /// or of a stripe; then one of these and a stripe of two enlarged maps.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Dtype`], [`Error::Device`]: `picture`; [`Error::Argument`]: stripes of no rows;
    /// [`Error::OutOfMemory`].
    pub fn forward_rows(
        &self,
        picture: &Tensor,
        tiling: Tiling,
        take: &mut dyn FnMut(&Tensor) -> Result<()>,
    ) -> Result<()> {
        const OP: &str = "rrdbnet";
        let [_, height, width, _] = picture.dims(OP, "picture")?;
        picture.expect(OP, "picture", &[1, height, width, 3], self.dtype, &self.device)?;
        let u = self.config.unshuffle;
        if height == 0 || width == 0 || !height.is_multiple_of(u) || !width.is_multiple_of(u) {
            return Err(Error::shape(OP, "picture", picture, format!("height and width from 1 on, divisible by {u}")));
        }
        let [height, width] = [height / u, width / u];
        let (trunk_rows, rows) = match tiling {
            Tiling::Automatic => (height, self.rows_within(MAP_BYTES, width)),
            Tiling::Whole => (height, height),
            Tiling::Stripes(0) => return Err(Error::argument(OP, "rows of a stripe", 0, "at least 1")),
            Tiling::Stripes(rows) => (rows.div_ceil(u), rows.div_ceil(u).min(self.rows_within(MAP_BYTES, width))),
        };
        let trunk = {
            let input = Part { rows: unshuffled(picture, u)?, at: Extent { height, first: 0, end: height } };
            self.trunk(&input, trunk_rows)?
        };
        for range in stripes(height, rows) {
            // The result reads at most two rows of the blocks beyond its own.
            let part = trunk.part(trunk.at.around(&range, 2))?;
            let grown = 1 << self.config.doublings;
            let wanted = Extent { height: grown * height, first: grown * range.start, end: grown * range.end };
            take(&self.enlarged(part)?.cut(wanted)?)?;
        }
        Ok(())
    }

    /// Rows of the blocks' result whose enlarged maps are within so many bytes each, at least 1.
    fn rows_within(&self, bytes: usize, width: usize) -> usize {
        let grown = 1usize << self.config.doublings;
        let row = width * grown * grown * self.config.features * self.dtype.size_bytes();
        (bytes / row.max(1)).max(1)
    }

    /// First convolution, blocks and the sum behind them.
    fn trunk(&self, input: &Part, rows: usize) -> Result<Part> {
        let (at, [_, _, width, _]) = (input.at, input.rows.dims("rrdbnet", "x")?);
        if rows >= at.height {
            return self.trunk_part(input.clone());
        }
        let features = self.config.features;
        let mut trunk = Tensor::uninit(&self.device, &[at.height, width, features], self.dtype)?;
        for range in stripes(at.height, rows) {
            let part = self.trunk_part(input.part(at.around(&range, self.config.reach()))?)?;
            let part = part.cut(Extent { first: range.start, end: range.end, ..at })?;
            trunk.copy_rows_from(range.start, &part.reshape(&[range.len(), width, features])?)?;
        }
        Ok(Part { rows: trunk.reshape(&[1, at.height, width, features])?, at })
    }

    fn trunk_part(&self, input: Part) -> Result<Part> {
        let first = conv(&self.conv_first, Source::One(&input.rows), input.at, None, 1.0)?;
        drop(input);
        let mut x = first.clone();
        for block in &self.body {
            x = block.forward(x)?;
        }
        conv(&self.conv_body, Source::One(&x.rows), x.at, Some(&first), 1.0)
    }

    /// Doublings and the last two convolutions.
    fn enlarged(&self, mut x: Part) -> Result<Part> {
        for up in &self.conv_up {
            x = doubled(up, &x)?;
        }
        x = conv(&self.conv_hr, Source::One(&x.rows), x.at, None, SLOPE)?;
        conv(&self.conv_last, Source::One(&x.rows), x.at, None, 1.0)
    }
}

/// Residual-in-residual dense block, `body.{i}`.
struct Rrdb {
    dense: [DenseBlock; 3], // rdb1, rdb2, rdb3
}

impl Rrdb {
    fn load(w: &Weights, features: usize, growth: usize) -> Result<Rrdb> {
        let dense = |i: usize| DenseBlock::load(&w.at(format!("rdb{i}")), features, growth);
        Ok(Rrdb { dense: [dense(1)?, dense(2)?, dense(3)?] })
    }

    fn forward(&self, x: Part) -> Result<Part> {
        let mut h = x.clone();
        for dense in &self.dense {
            h = dense.forward(h)?;
        }
        let rows = ops::add_scaled(&x.cut(h.at)?, &h.rows, RESIDUAL_SCALE)?;
        Ok(Part { rows, at: h.at })
    }
}

/// Five convolutions, each of which reads all maps before it.
struct DenseBlock {
    convs: [Conv2d; 5], // [G, 3, 3, F + j G], j = 0 .. 3; [F, 3, 3, F + 4 G], times 0.2
}

impl DenseBlock {
    fn load(w: &Weights, features: usize, growth: usize) -> Result<DenseBlock> {
        let conv = |j: usize, outputs| Conv2d::load(&w.at(format!("conv{}", j + 1)), outputs, features + j * growth, 3);
        Ok(DenseBlock {
            convs: [conv(0, growth)?, conv(1, growth)?, conv(2, growth)?, conv(3, growth)?, conv(4, features)?],
        })
    }

    /// A convolution reads two maps side by side without a copy; three are put together first. With 64 features and a growth of
    /// 32 these copies are 256 channels per pixel of the blocks: 512 bytes read and 512 written in 16 bits, per dense block,
    /// beside some 480 kFLOP.
    fn forward(&self, x: Part) -> Result<Part> {
        let [conv1, conv2, conv3, conv4, conv5] = &self.convs;
        let c1 = conv(conv1, Source::One(&x.rows), x.at, None, SLOPE)?;
        let at = c1.at;
        let c2 = conv(conv2, Source::Two(&x.cut(at)?, &c1.rows), at, None, SLOPE)?;
        let at = c2.at;
        let c12 = Part { rows: ops::concat(&c1.cut(at)?, &c2.rows)?, at };
        drop((c1, c2));
        let c3 = conv(conv3, Source::Two(&x.cut(at)?, &c12.rows), at, None, SLOPE)?;
        let at = c3.at;
        let x12 = Part { rows: ops::concat(&x.cut(at)?, &c12.cut(at)?)?, at };
        drop(c12);
        let c4 = conv(conv4, Source::Two(&x12.rows, &c3.rows), at, None, SLOPE)?;
        let at = c4.at;
        let c34 = ops::concat(&c3.cut(at)?, &c4.rows)?;
        drop((c3, c4));
        conv(conv5, Source::Two(&x12.cut(at)?, &c34), at, Some(&x), 1.0)
    }
}

/// Rows `first..end` of a map of `height` rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Extent {
    height: usize,
    first: usize,
    end: usize,
}

impl Extent {
    /// What a 3 x 3 convolution can make of it: a row less at each edge that is a cut.
    fn convolved(self) -> Extent {
        let first = self.first + usize::from(self.first > 0);
        Extent { first, end: (self.end - usize::from(self.end < self.height)).max(first), ..self }
    }

    fn doubled(self) -> Extent {
        Extent { height: 2 * self.height, first: 2 * self.first, end: 2 * self.end }
    }

    /// These rows and so many around them, as far as there are.
    fn around(self, range: &Range<usize>, rows: usize) -> Extent {
        let (first, end) = (range.start.saturating_sub(rows), range.end.saturating_add(rows).min(self.height));
        Extent { first, end, ..self }
    }

    fn is_whole(self) -> bool {
        (self.first, self.end) == (0, self.height)
    }
}

/// Some rows of a map, `[1, at.end - at.first, W, C]`.
#[derive(Clone)]
struct Part {
    rows: Tensor,
    at: Extent,
}

impl Part {
    /// Fewer rows of it, sharing its storage.
    fn cut(&self, to: Extent) -> Result<Tensor> {
        if to == self.at {
            return Ok(self.rows.clone());
        }
        let [_, held, w, c] = self.rows.dims("rrdbnet", "x")?;
        let range = to.first - self.at.first..to.end - self.at.first;
        let count = range.len();
        self.rows.reshape(&[held, w, c])?.rows(range)?.reshape(&[1, count, w, c])
    }

    fn part(&self, at: Extent) -> Result<Part> {
        Ok(Part { rows: self.cut(at)?, at })
    }
}

/// A 3 x 3 convolution of what is there of `x`, with the rows of `residual` added that it makes.
fn conv(layer: &Conv2d, x: Source, at: Extent, residual: Option<&Part>, negative_slope: f32) -> Result<Part> {
    let made = at.convolved();
    let residual = residual.map(|residual| residual.cut(made)).transpose()?;
    let stripe = (!at.is_whole()).then_some(Stripe {
        height: at.height,
        first_row: at.first,
        output: [made.first, made.end],
        statistics: None,
    });
    let residual = residual.as_ref();
    let rows = ops::conv2d(ops::Conv2d { residual, negative_slope, stripe, ..layer.args(x) })?;
    Ok(Part { rows, at: made })
}

/// Twice the edges by nearest neighbour, then a convolution.
fn doubled(layer: &Conv2d, x: &Part) -> Result<Part> {
    let [_, _, width, _] = x.rows.dims("rrdbnet", "x")?;
    let made = x.at.doubled().convolved();
    let stripe = (!x.at.is_whole()).then_some(Stripe {
        height: x.at.height,
        first_row: x.at.first,
        output: [made.first, made.end],
        statistics: None,
    });
    let resize_to = Some([2 * x.at.height, 2 * width]);
    let rows = ops::conv2d(ops::Conv2d { resize_to, negative_slope: SLOPE, stripe, ..layer.args(&x.rows) })?;
    Ok(Part { rows, at: made })
}

/// `0..height` in ranges of `rows`, the last of which may be shorter.
fn stripes(height: usize, rows: usize) -> impl Iterator<Item = Range<usize>> {
    (0..height).step_by(rows).map(move |first| first..height.min(first.saturating_add(rows)))
}

/// `[1, H, W, 3]` to `[1, H / u, W / u, 3 u u]`, channel `(c u + y) u + x` the pixel (y, x) of the square: torch's
/// `pixel_unshuffle`. On the host: it is a permutation of the picture's own few values.
fn unshuffled(picture: &Tensor, u: usize) -> Result<Tensor> {
    let [_, height, width, c] = picture.dims("rrdbnet", "picture")?;
    let shape = [1, height / u, width / u, c * u * u];
    match picture.device() {
        _ if u == 1 => Ok(picture.clone()),
        Device::Meta(_) => Tensor::uninit(picture.device(), &shape, picture.dtype()),
        device => {
            let values = picture.to_f32_vec()?;
            let mut to = Vec::with_capacity(values.len());
            for (y, x) in (0..height / u).flat_map(|y| (0..width / u).map(move |x| (y, x))) {
                for c_in in 0..c {
                    for square in 0..u * u {
                        to.push(values[((y * u + square / u) * width + x * u + square % u) * c + c_in]);
                    }
                }
            }
            Tensor::from_f32(device, &shape, picture.dtype(), &to)
        }
    }
}

/// The numbers of the first ESRGAN's layers behind its blocks (`3.weight`, `6.weight`, ...), in order; none in other files.
fn numbered_layers(keys: &[String]) -> Vec<usize> {
    let number = |key: &String| key.strip_suffix(".weight")?.parse::<usize>().ok().filter(|&number| number > 1);
    let mut numbers: Vec<usize> = keys.iter().filter_map(number).collect();
    numbers.sort_unstable();
    numbers
}

/// A key of any form as Real-ESRGAN has it. `numbered`: the file's [`numbered_layers`]; `model.` is already away from its keys.
fn layer_key(key: &str, numbered: &[usize]) -> String {
    let Some((layer, kind)) = key.rsplit_once('.') else { return key.to_string() };
    let in_block = |path: &str| Some(format!("body.{}.{kind}", path.replace(".RDB", ".rdb")));
    let named = || -> Option<String> {
        if let Some(path) = layer.strip_prefix("RRDB_trunk.") {
            return in_block(path);
        }
        // `1.sub.0.RDB1.conv1.0`; behind the blocks `1.sub.23`.
        if let Some(path) = layer.strip_prefix("1.sub.") {
            return match path.strip_suffix(".0") {
                Some(path) if path.contains('.') => in_block(path),
                _ if path.parse::<usize>().is_ok() => Some(format!("conv_body.{kind}")),
                _ => None,
            };
        }
        if let Ok(number) = layer.parse::<usize>() {
            let place = numbered.iter().position(|&other| other == number);
            return match place.map(|place| numbered.len() - place) {
                _ if number == 0 => Some(format!("conv_first.{kind}")),
                Some(1) => Some(format!("conv_last.{kind}")),
                Some(2) => Some(format!("conv_hr.{kind}")),
                Some(from_end) => Some(format!("conv_up{}.{kind}", numbered.len() - from_end + 1)),
                None => None,
            };
        }
        let same = [("trunk_conv", "conv_body"), ("HRconv", "conv_hr")];
        if let Some((_, name)) = same.iter().find(|(other, _)| *other == layer) {
            return Some(format!("{name}.{kind}"));
        }
        layer.strip_prefix("upconv").map(|number| format!("conv_up{number}.{kind}"))
    };
    named().unwrap_or_else(|| key.to_string())
}

/// Networks for the same purpose that are not this one: what their keys hold, all of an entry, and their names. Earlier
/// entries are more special.
const OTHERS: &[(&[&str], &str)] = &[
    (&["conv1x1.", "RDB1."], "ESRGAN+"),
    (&["conv1x1.", "rdb1."], "ESRGAN+"),
    (&["overlap_attn."], "HAT"),
    (&["relative_position_bias_table", "conv_after_body."], "SwinIR"),
    (&["cpb_mlp.", "conv_after_body."], "Swin2SR"),
    (&[".attn.attns.0."], "DAT"),
    (&["residual_layer.0."], "OmniSR"),
    (&["block_1.c1_r."], "SPAN"),
    (&["unet1.", "conv_bottom."], "Real-CUGAN"),
    (&["gfpganv1"], "a restorer of faces"),
    (&["stylegan_decoder."], "GFPGAN, a restorer of faces,"),
    (&["diffusion_model."], "a diffusion model"),
    (&["down_blocks."], "a part of a diffusion model"),
    (&["lora_"], "a LoRA"),
];

/// What the file is if it is no RRDBNet; `None`: one, or something unknown, for which tensors will be missing.
fn other_network(keys: &[String]) -> Option<&'static str> {
    let holds = |text: &&str| keys.iter().any(|key| key.contains(text));
    let named = OTHERS.iter().find(|(texts, _)| texts.iter().all(holds)).map(|(_, name)| *name);
    let is_compact = || {
        let numbered = |key: &String| key.strip_prefix("body.")?.strip_suffix(".weight")?.parse::<usize>().ok();
        keys.iter().any(|key| numbered(key) == Some(1)) && !keys.iter().any(|key| key.contains("rdb"))
    };
    named.or_else(|| is_compact().then_some("a compact network of Real-ESRGAN (SRVGGNet)"))
}
