//! `bench kernels --kernel my.cu`: a reader's own kernel against the contract of an op: compiled, checked against the cpu on
//! random inputs of odd sizes, raced on the emulated card, and on a card timed in turns with ours.
//!
//! The file includes kernels/common/device.cuh, like ours, and says in comments what it is, in one or several lines:
//!
//! ```text
//! // bench: op linear, entry my_gemm, grid ceil(n / 128) by ceil(m / 64), block 128, shared 98304
//! // bench: map x 64 by 64 swizzle 128, map weight 64 by 128 swizzle 128, multiple k 8, cluster 2 by 1
//! ```
//!
//! | word | means |
//! |---|---|
//! | `op` | whose contract: a line of the table below |
//! | `entry` | the kernels are my_gemm_f32, my_gemm_f16, my_gemm_bf16, those that there are |
//! | `grid` | up to three lists of factors with `by` between them: numbers, the op's sizes, ceil(size / number) |
//! | `block` | threads per block |
//! | `shared` | bytes of dynamic shared memory per block; 0 if it is left out |
//! | `cluster` | blocks per cluster in up to three dimensions with `by` between them; one if it is left out |
//! | `map` | an operand's TMA map is a further argument: its box, innermost dimension first, and its swizzle in bytes |
//! | `multiple` | a size is always a multiple of this number; there may be several |
//!
//! Arguments, in this order; then one `GRID_CONST TensorMap` per `map`, in their order:
//!
//! | op | arguments | sizes |
//! |---|---|---|
//! | rms_norm | T* y, const T* x, const T* gamma, int64_t rows, int channels, float eps | rows, channels |
//! | layer_norm | T* y, const T* x, const T* gamma, const T* beta, int64_t rows, int channels, float eps | rows, channels |
//! | add | T* y, const T* a, const T* b, int64_t count | count |
//! | silu | T* y, const T* x, int64_t count | count |
//! | linear | T* y, const T* x, const T* weight, const T* bias, int m, int n, int k | m, n, k |

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use megafuse::ops::cases::{Call, Inputs};
use megafuse::ops::{self, Activation, LayerNorm, Linear, RmsNorm};
use megafuse::runtime::cuda::{self, Arg, DevicePtr, Launch, Swizzle, TensorMap, TensorView};
use megafuse::runtime::{CudaDevice, CudaOptions, Work};
use megafuse::{DType, Device, Error, Result, Tensor};
use serde_json::json;

use super::args::KernelArgs;
use super::clock::Clock;
use super::cublaslt::CublasLt;
use super::errors::Errors;
use super::peaks::Peaks;
use crate::cli::check::describe;
use crate::cli::console::say;
use crate::cli::output::print_line;
use crate::cli::values::DeviceChoice;

/// An op that a kernel can be written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Contract {
    RmsNorm,
    LayerNorm,
    Add,
    Silu,
    Linear,
}

const CONTRACTS: [(&str, Contract); 5] = [
    ("rms_norm", Contract::RmsNorm),
    ("layer_norm", Contract::LayerNorm),
    ("add", Contract::Add),
    ("silu", Contract::Silu),
    ("linear", Contract::Linear),
];

const EPS: f32 = 1e-5;

impl Contract {
    /// Names of the sizes, as `grid` uses them.
    fn sizes(self) -> &'static [&'static str] {
        match self {
            Contract::RmsNorm | Contract::LayerNorm => &["rows", "channels"],
            Contract::Add | Contract::Silu => &["count"],
            Contract::Linear => &["m", "n", "k"],
        }
    }

    /// Names of the tensors, the result first, as `map` uses them.
    fn operands(self) -> &'static [&'static str] {
        match self {
            Contract::RmsNorm => &["y", "x", "gamma"],
            Contract::LayerNorm => &["y", "x", "gamma", "beta"],
            Contract::Add => &["y", "a", "b"],
            Contract::Silu => &["y", "x"],
            Contract::Linear => &["y", "x", "weight", "bias"],
        }
    }

    /// One element; primes; one off a warp, a vector and a block; what kernels like best; for linear sums that are longer
    /// than a ring, and several blocks in each dimension.
    fn checked(self) -> &'static [&'static [usize]] {
        match self {
            Contract::RmsNorm | Contract::LayerNorm => {
                &[&[1, 1], &[3, 7], &[5, 33], &[2, 97], &[7, 64], &[2, 1025], &[19, 320], &[1, 4096]]
            }
            Contract::Add | Contract::Silu => &[&[1], &[31], &[257], &[1024], &[1025], &[4999]],
            Contract::Linear => &[
                &[1, 1, 1],
                &[3, 5, 7],
                &[33, 65, 17],
                &[64, 64, 64],
                &[59, 97, 111],
                &[128, 160, 64],
                &[17, 40, 1000],
                &[300, 265, 72],
            ],
        }
    }

    /// The models' own.
    fn timed(self) -> &'static [&'static [usize]] {
        match self {
            Contract::RmsNorm => &[&[512, 4096], &[204_000, 64]],
            Contract::LayerNorm => &[&[8192, 320], &[2048, 1280], &[8192, 640]],
            Contract::Add | Contract::Silu => &[&[2 * 64 * 64 * 320], &[2 * 128 * 128 * 320]],
            Contract::Linear => &[&[8192, 960, 320], &[2048, 1280, 1280], &[2048, 3840, 1280], &[8192, 640, 2560]],
        }
    }

    fn inputs(self, inputs: &Inputs, size: &[usize]) -> Result<Vec<Tensor>> {
        let shapes: Vec<Vec<usize>> = match (self, size) {
            (Contract::RmsNorm, &[rows, c]) => vec![vec![rows, c], vec![c]],
            (Contract::LayerNorm, &[rows, c]) => vec![vec![rows, c], vec![c], vec![c]],
            (Contract::Add, &[count]) => vec![vec![count]; 2],
            (Contract::Silu, &[count]) => vec![vec![count]],
            (Contract::Linear, &[m, n, k]) => vec![vec![m, k], vec![n, k], vec![n]],
            _ => vec![],
        };
        shapes.iter().map(|shape| inputs.tensor(shape)).collect()
    }

    /// By this program's own op.
    fn ours(self, tensors: &[Tensor]) -> Result<Tensor> {
        match (self, tensors) {
            (Contract::RmsNorm, [x, gamma]) => ops::rms_norm(RmsNorm { x, gamma, eps: EPS }),
            (Contract::LayerNorm, [x, gamma, beta]) => {
                ops::layer_norm(LayerNorm { gamma: Some(gamma), beta: Some(beta), ..LayerNorm::new(x, EPS) })
            }
            (Contract::Add, [a, b]) => ops::add(a, b),
            (Contract::Silu, [x]) => ops::activation(x, Activation::Silu),
            (Contract::Linear, [x, weight, bias]) => ops::linear(Linear { bias: Some(bias), ..Linear::new(x, weight) }),
            _ => Err(Error::config("bench --kernel", "an op without its tensors")),
        }
    }

    /// A result to be written: NaN everywhere, so that what a kernel leaves out shows.
    fn output(self, device: &Device, dtype: DType, size: &[usize]) -> Result<Tensor> {
        let shape = match (self, size) {
            (Contract::Linear, &[m, n, _]) => vec![m, n],
            _ => size.to_vec(),
        };
        Tensor::from_f32(device, &shape, dtype, &vec![f32::NAN; shape.iter().product()])
    }

    /// # Safety
    /// The kernel's arguments are those of the contract's, and it stays within them.
    unsafe fn launch(
        self,
        card: &CudaDevice,
        own: &Own,
        dtype: DType,
        size: &[usize],
        tensors: &[Tensor],
        y: &Tensor,
    ) -> Result<()> {
        let entry = format!("{}_{dtype}", own.entry);
        let launch = own.launch(size)?;
        let operands: Vec<&Tensor> = [y].into_iter().chain(tensors).collect();
        let addresses: Vec<DevicePtr> = operands.iter().map(|tensor| DevicePtr::or_null(Some(tensor))).collect();
        let maps: Vec<TensorMap> =
            own.maps.iter().map(|map| map.of(card, operands[map.operand])).collect::<Result<_>>()?;
        let int = |value: usize| {
            i32::try_from(value).map_err(|_| Error::argument("bench --kernel", "size", value, "at most 2147483647"))
        };
        let sizes: Vec<i32> =
            size.iter().skip(usize::from(self != Contract::Linear)).map(|&s| int(s)).collect::<Result<_>>()?;
        let (first, eps) = (size[0] as i64, EPS);
        let mut args: Vec<Arg> = addresses.iter().map(Arg::of).collect();
        if self != Contract::Linear {
            args.push(Arg::of(&first));
        }
        args.extend(sizes.iter().map(Arg::of));
        if matches!(self, Contract::RmsNorm | Contract::LayerNorm) {
            args.push(Arg::of(&eps));
        }
        args.extend(maps.iter().map(Arg::of));
        // SAFETY: the caller's; count and sizes of the arguments are compared with the kernel's.
        unsafe { card.launch(MODULE, &entry, launch, &args) }
    }
}

/// The name under which the file's kernels are loaded.
const MODULE: &str = "bench --kernel";

/// A tensor map that a kernel gets.
#[derive(Clone, Debug, PartialEq)]
struct Map {
    /// Its place among the contract's.
    operand: usize,
    /// Elements of a box, the innermost dimension first.
    boxes: Vec<usize>,
    swizzle: Swizzle,
}

impl Map {
    /// `x 64 by 128 swizzle 128`
    fn parse(text: &str, contract: Contract) -> std::result::Result<Map, String> {
        let wanted = "expected an operand, its box and its swizzle, such as: map x 64 by 128 swizzle 128";
        let (name, rest) = text.split_once(' ').ok_or_else(|| format!("map {text:?}: {wanted}"))?;
        let operand = contract.operands().iter().position(|operand| *operand == name).ok_or_else(|| {
            format!("map {text:?}: there is no operand {name:?}; there are {}", contract.operands().join(", "))
        })?;
        let (boxes, swizzle) = match rest.split_once("swizzle") {
            None => (rest, Swizzle::None),
            Some((boxes, bytes)) => {
                let swizzle = match bytes.trim() {
                    "32" => Swizzle::Bytes32,
                    "64" => Swizzle::Bytes64,
                    "128" => Swizzle::Bytes128,
                    other => return Err(format!("map {text:?}: a swizzle of {other:?}; there are 32, 64 and 128")),
                };
                (boxes, swizzle)
            }
        };
        let boxes = boxes.split(" by ").map(|side| side.trim().parse().map_err(|_| format!("map {text:?}: {wanted}")));
        Ok(Map { operand, boxes: boxes.collect::<std::result::Result<_, _>>()?, swizzle })
    }

    /// Of a tensor whose elements lie one behind the other.
    fn of(&self, card: &CudaDevice, tensor: &Tensor) -> Result<TensorMap> {
        let dims: Vec<usize> = tensor.shape().iter().rev().copied().collect();
        let bytes = dims.iter().scan(tensor.dtype().size_bytes(), |bytes, elements| {
            *bytes *= elements;
            Some(*bytes)
        });
        let strides_bytes: Vec<usize> = bytes.take(dims.len().saturating_sub(1)).collect();
        let base = DevicePtr::or_null(Some(tensor));
        let view = TensorView { base, dtype: tensor.dtype(), dims: &dims, strides_bytes: &strides_bytes };
        TensorMap::tiled(card, view, &self.boxes, self.swizzle)
    }
}

/// What the comments of the file say.
#[derive(Clone, Debug, PartialEq)]
struct Own {
    contract: Contract,
    entry: String,
    grid: [String; 3],
    block: usize,
    shared: usize,
    cluster: [usize; 3],
    maps: Vec<Map>,
    /// Of each of the contract's sizes: it is always a multiple of this.
    multiples: Vec<usize>,
}

impl Own {
    fn read(path: &Path) -> Result<Own> {
        let text = fs::read_to_string(path).map_err(|error| Error::io(path, error))?;
        Own::parse(&text).map_err(|reason| Error::file(path, reason))
    }

    fn parse(text: &str) -> std::result::Result<Own, String> {
        const WANTED: &str = "a comment such as \"// bench: op rms_norm, entry my_norm, grid rows, block 256, shared 0\" says what it is";
        let lines: Vec<&str> = text.lines().filter_map(|line| line.trim().strip_prefix("// bench:")).collect();
        if lines.is_empty() {
            return Err(format!("{WANTED}; there is none"));
        }
        let mut words = Vec::new();
        for part in lines.iter().flat_map(|line| line.split(',')).map(str::trim) {
            let (key, value) =
                part.split_once(' ').ok_or_else(|| format!("{part:?} is no word and its value; {WANTED}"))?;
            words.push((key, value.trim()));
        }
        // What an operand and a size are, only the op knows.
        let op = words.iter().find(|(key, _)| *key == "op").ok_or_else(|| format!("it names no op; {WANTED}"))?.1;
        let found = CONTRACTS.iter().find(|(name, _)| *name == op);
        let names: Vec<&str> = CONTRACTS.iter().map(|(name, _)| *name).collect();
        let contract = found.ok_or_else(|| format!("no contract for op {op:?}; there are {}", names.join(", ")))?.1;
        let sizes = contract.sizes();
        let mut own = Own {
            contract,
            entry: String::new(),
            grid: ["1", "1", "1"].map(String::from),
            block: 0,
            shared: 0,
            cluster: [1; 3],
            maps: Vec::new(),
            multiples: vec![1; sizes.len()],
        };
        for (key, value) in words {
            let count = |text: &str| text.trim().parse().map_err(|_| format!("{key} is {value:?}, expected a number"));
            let dimensions = || {
                let parts: Vec<&str> = value.split(" by ").map(str::trim).collect();
                match parts.len() {
                    1..=3 => Ok(parts),
                    more => Err(format!("{key} {value:?} has {more} dimensions, at most 3")),
                }
            };
            match key {
                "op" => {}
                "entry" => own.entry = value.into(),
                "grid" => {
                    for (at, part) in dimensions()?.into_iter().enumerate() {
                        own.grid[at] = part.into();
                    }
                }
                "cluster" => {
                    for (at, part) in dimensions()?.into_iter().enumerate() {
                        own.cluster[at] = count(part)?;
                    }
                }
                "block" => own.block = count(value)?,
                "shared" => own.shared = count(value)?,
                "map" => own.maps.push(Map::parse(value, contract)?),
                "multiple" => {
                    let (name, number) = value.split_once(' ').unwrap_or((value, ""));
                    let at = sizes.iter().position(|size| *size == name).ok_or_else(|| {
                        format!("multiple {value:?}: there is no size {name:?}; there are {}", sizes.join(", "))
                    })?;
                    own.multiples[at] = count(number).ok().filter(|&number| number > 0).ok_or_else(|| {
                        format!("multiple {value:?}: expected a size and a number, such as: multiple k 8")
                    })?;
                }
                _ => return Err(format!("{key:?} is not known; {WANTED}")),
            }
        }
        if own.entry.is_empty() || own.block == 0 {
            return Err(format!("it names no {}; {WANTED}", if own.block == 0 { "block" } else { "entry" }));
        }
        own.launch(&vec![1; sizes.len()]).map_err(|error| error.to_string())?;
        Ok(own)
    }

    fn launch(&self, size: &[usize]) -> Result<Launch> {
        let names = self.contract.sizes();
        let mut grid = [1; 3];
        for (blocks, text) in grid.iter_mut().zip(&self.grid) {
            *blocks = evaluate(text, names, size).ok_or_else(|| {
                let reason = format!("is no product of numbers, {} and ceil(size / number)", names.join(", "));
                Error::config(format!("grid {text}"), reason)
            })?;
        }
        Ok(Launch::grid(grid).block(self.block).shared(self.shared).cluster(self.cluster))
    }

    /// These sizes, each rounded up to what the kernel takes, and each once.
    fn sizes(&self, sizes: &[&[usize]]) -> Vec<Vec<usize>> {
        let mut rounded: Vec<Vec<usize>> = Vec::new();
        for size in sizes {
            let size: Vec<usize> =
                size.iter().zip(&self.multiples).map(|(size, &of)| size.next_multiple_of(of)).collect();
            if !rounded.contains(&size) {
                rounded.push(size);
            }
        }
        rounded
    }
}

/// `rows`, `4`, `ceil(rows / 8)`, and products of them.
fn evaluate(text: &str, names: &[&str], size: &[usize]) -> Option<usize> {
    let value = |text: &str| match names.iter().position(|name| *name == text) {
        Some(at) => Some(size[at]),
        None => text.parse().ok(),
    };
    text.split('*').map(str::trim).try_fold(1usize, |product, factor| {
        let factor = match factor.strip_prefix("ceil(").and_then(|inside| inside.strip_suffix(')')) {
            Some(inside) => {
                let (whole, part) = inside.split_once('/')?;
                let part = value(part.trim()).filter(|&part| part > 0)?;
                value(whole.trim())?.div_ceil(part)
            }
            None => value(factor)?,
        };
        product.checked_mul(factor)
    })
}

/// The headers that kernels include.
fn headers() -> Result<PathBuf> {
    let folder = std::env::var_os("MEGAFUSE_KERNELS")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels"), PathBuf::from);
    if folder.join("common/device.cuh").is_file() {
        return Ok(folder);
    }
    let reason = "common/device.cuh is not there: name the folder kernels of the program's source in MEGAFUSE_KERNELS";
    Err(Error::file(&folder, reason))
}

/// Runs a compiler; what it says is the reason where it fails.
fn compile(path: &Path, command: &mut Command) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|error| Error::config(program.clone(), error.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).trim().to_string());
    Err(Error::file(path, format!("{program} does not compile it:\n{}", said.join("\n").trim())))
}

/// Which build of the emulated card runs: `plain`, `race`.
fn emulated_build() -> Result<(PathBuf, String)> {
    let library = cuda::emulated_library()?;
    let folder = library.parent().unwrap_or(Path::new("."));
    let name = folder.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    Ok((library, name))
}

/// Compiles the file with the commands that made this program's kernels, and loads it beside them.
fn load_emulated(path: &Path, folder: &Path) -> Result<()> {
    let (library, build) = emulated_build()?;
    let commands = library.parent().and_then(Path::parent).map(|folder| folder.join("commands.tsv"));
    let commands = commands.unwrap_or_default();
    let text = fs::read_to_string(&commands).map_err(|error| Error::io(&commands, error))?;
    let start = format!("compile\t{build}\tkernels/");
    let Some(line) = text.lines().find(|line| line.starts_with(&start)) else {
        return Err(Error::file(&commands, format!("no kernel of a build {build:?} is in it")));
    };
    let words: Vec<&str> = line.split('\t').collect();
    let [_, _, _, _, program, arguments @ ..] = &words[..] else {
        return Err(Error::file(&commands, format!("a line that is no command: {line}")));
    };
    let headers = headers()?;
    let (object, own) = (folder.join("own.o"), folder.join("own.so"));
    let path = fs::canonicalize(path).map_err(|error| Error::io(path, error))?;
    let mut command = Command::new(program);
    command.args(arguments.iter().filter(|word| **word != "-Ikernels")).arg("-I").arg(&headers).arg("-o").arg(&object);
    compile(&path, command.arg(&path))?;
    let mut link = Command::new(program);
    link.args(["-shared", "-o"]).arg(&own).arg(&object).arg(&library);
    compile(&path, &mut link)?;
    // SAFETY: it runs nothing at load but the registration of its kernels, with the emulated card that is loaded already.
    match unsafe { libloading::Library::new(&own) } {
        Ok(library) => {
            std::mem::forget(library); // its kernels stay registered
            Ok(())
        }
        Err(error) => Err(Error::file(&path, format!("it does not load: {error}"))),
    }
}

/// Compiles the file with nvcc for this card.
fn cubin(path: &Path, folder: &Path, card: &CudaDevice) -> Result<Vec<u8>> {
    let home = std::env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin/nvcc"));
    let nvcc = std::env::var_os("NVCC").map(PathBuf::from).or(home).unwrap_or_else(|| "nvcc".into());
    let (major, minor) = card.compute_capability();
    let arch = format!("-arch=sm_{major}{minor}{}", if major == 9 { "a" } else { "" });
    let output = folder.join("own.cubin");
    let mut command = Command::new(nvcc);
    command.args(["-std=c++20", "-O3", "-cubin", &arch, "-I"]).arg(headers()?).arg("-o").arg(&output).arg(path);
    compile(path, &mut command)?;
    fs::read(&output).map_err(|error| Error::io(&output, error))
}

/// Everything that `--kernel` asks for.
pub fn run(path: &Path, args: &KernelArgs) -> Result<()> {
    let own = Own::read(path)?;
    let device = match args.device {
        DeviceChoice::Auto => Device::cuda(0).or_else(|_| open_emulated())?,
        DeviceChoice::Emu => open_emulated()?,
        choice => choice.open()?,
    };
    let Device::Cuda(card) = &device else {
        let reason = "a kernel runs on a card: choose cuda, cuda:N or emu".into();
        return Err(Error::Request { field: "--device", value: args.device.to_string(), reason });
    };
    let folder = tempfile::tempdir().map_err(|error| Error::io(&std::env::temp_dir(), error))?;
    if cuda::is_emulated() {
        load_emulated(path, folder.path())?;
        card.load(MODULE, b"emulated\0")?;
        let (_, build) = emulated_build()?;
        // First in the race build: it names a write beyond a tensor by its line, where here it may end the program.
        if build == "plain" {
            race(path, args)?;
        }
        right(&own, &check(&own, card, &device, args, &build)?)?;
        return if build == "plain" { library(&own, card, &device, args).map(drop) } else { Ok(()) };
    }
    card.load(MODULE, &cubin(path, folder.path(), card)?)?;
    right(&own, &check(&own, card, &device, args, "card")?)?;
    let library = library(&own, card, &device, args)?;
    time(&own, card, &device, args, library.as_ref())
}

/// With every tensor in an allocation of its own: what a kernel reads or writes beyond one is seen.
fn open_emulated() -> Result<Device> {
    DeviceChoice::Emu.open_with(CudaOptions { separate_allocations: true, ..CudaOptions::default() })
}

/// In another process, as one process has one emulated card.
fn race(path: &Path, args: &KernelArgs) -> Result<()> {
    let (plain, _) = emulated_build()?;
    let library = plain.parent().and_then(Path::parent).map(|folder| folder.join("race/libcuda.so.1"));
    let Some(library) = library.filter(|library| library.is_file()) else {
        say!("not raced: this program was built without the emulated card's race build (cargo build, not --release)");
        return Ok(());
    };
    let program = std::env::current_exe().map_err(|error| Error::io(Path::new("this program"), error))?;
    let mut command = Command::new(program);
    command.args(["bench", "kernels", "--device", "emu", "--kernel"]).arg(path);
    command.args(["--dtype", args.dtype.name()]).args(args.json.then_some("--json"));
    let status = command.env("MEGAFUSE_EMU_LIBRARY", &library).status();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(Error::file(path, format!("it failed in the race build ({status}), see above"))),
        Err(error) => Err(Error::config("the race build", error.to_string())),
    }
}

fn right(own: &Own, wrong: &[String]) -> Result<()> {
    if wrong.is_empty() {
        return Ok(());
    }
    Err(Error::Kernel { kernel: own.entry.clone(), reason: format!("wrong results for {}", wrong.join("; ")) })
}

/// Every size on fresh inputs against the cpu in f32: those whose results are wrong.
fn check(own: &Own, card: &CudaDevice, device: &Device, args: &KernelArgs, build: &str) -> Result<Vec<String>> {
    if !args.json {
        print_line(format!("{} ({build}), compared with the cpu", describe(card)));
    }
    let mut wrong = Vec::new();
    for (seed, size) in own.sizes(own.contract.checked()).iter().enumerate() {
        let seed = 1 + seed as u64;
        let tensors = own.contract.inputs(&Inputs::new(device, args.dtype, seed), size)?;
        let y = own.contract.output(device, args.dtype, size)?;
        // SAFETY: the contract's arguments; where the kernel goes beyond them, the emulated card says so.
        unsafe { own.contract.launch(card, own, args.dtype, size, &tensors, &y)? };
        let cpu = Device::cpu();
        let want = own.contract.ours(&own.contract.inputs(&Inputs::in_f32(&cpu, args.dtype, seed), size)?)?;
        let errors = Errors::of(&y.to_f32_vec()?, &want.to_f32_vec()?);
        let right = errors.right(args.dtype);
        let verdict = if right { "ok" } else { "WRONG" };
        let sizes: Vec<String> =
            own.contract.sizes().iter().zip(size).map(|(name, size)| format!("{name} {size}")).collect();
        if args.json {
            print_line(json!({
                "kind": "own", "entry": own.entry, "dtype": args.dtype.name(), "size": size, "build": build,
                "error": { "rms": errors.rms, "worst": errors.worst, "allowed_rms": Errors::allowed(args.dtype) },
                "verdict": verdict, "emulated": cuda::is_emulated(),
            }));
        } else {
            let (entry, dtype, sizes) = (&own.entry, args.dtype, sizes.join(", "));
            print_line(format!("{entry} {dtype} {sizes:32} error {:9.1e}  {verdict}", errors.rms));
        }
        if !right {
            wrong.push(sizes.join(", "));
        }
    }
    Ok(wrong)
}

/// cuBLASLt, where the contract is one that it has and it is there; what it makes is compared with the cpu as well.
fn library(own: &Own, card: &CudaDevice, device: &Device, args: &KernelArgs) -> Result<Option<CublasLt>> {
    /// Sizes that it takes in every dtype.
    const CHECKED: [[usize; 3]; 2] = [[64, 64, 64], [40, 136, 72]];
    if own.contract != Contract::Linear {
        return Ok(None);
    }
    let library = match CublasLt::open(device, card) {
        Ok(library) => library,
        Err(reason) => {
            // Of a table for people; on the emulated card nobody expects it.
            if !args.json && !cuda::is_emulated() {
                print_line(format!("without cuBLASLt beside it: {reason}"));
            }
            return Ok(None);
        }
    };
    for (seed, size) in CHECKED.into_iter().enumerate() {
        let seed = 100 + seed as u64;
        let tensors = own.contract.inputs(&Inputs::new(device, args.dtype, seed), &size)?;
        let y = own.contract.output(device, args.dtype, &size)?;
        let product = library.linear(size, &tensors, &y)?;
        card.synchronize()?;
        let made = product.launch()?.to_f32_vec()?;
        let cpu = Device::cpu();
        let want = own.contract.ours(&own.contract.inputs(&Inputs::in_f32(&cpu, args.dtype, seed), &size)?)?;
        let errors = Errors::of(&made, &want.to_f32_vec()?);
        let right = errors.right(args.dtype);
        let verdict = if right { "ok" } else { "WRONG" };
        if args.json {
            print_line(json!({
                "kind": "own", "entry": "cuBLASLt", "dtype": args.dtype.name(), "size": size, "build": "library",
                "error": { "rms": errors.rms, "worst": errors.worst, "allowed_rms": Errors::allowed(args.dtype) },
                "verdict": verdict, "emulated": cuda::is_emulated(),
            }));
        } else {
            let [m, n, k] = size;
            let sizes = format!("m {m}, n {n}, k {k}");
            print_line(format!("cuBLASLt {} {sizes:32} error {:9.1e}  {verdict}", args.dtype, errors.rms));
        }
        if !right {
            let reason = format!("cuBLASLt's result for {size:?} is not the cpu's: it was asked something else");
            return Err(Error::Kernel { kernel: "cublasLtMatmul".into(), reason });
        }
    }
    Ok(Some(library))
}

/// In turns with ours and the library's, at the models' sizes.
fn time(own: &Own, card: &CudaDevice, device: &Device, args: &KernelArgs, library: Option<&CublasLt>) -> Result<()> {
    let clock = Clock::new(device, args.seconds)?;
    let peak = Peaks::measure(&clock, args.dtype)?;
    if !args.json {
        let theirs = if library.is_some() { "cuBLASLt" } else { "" };
        let header = ["floor", "ours", theirs, &own.entry].map(|name| format!("{name:>11}")).join(" ");
        print_line(format!("{:24} {header} {:>6} {:>10}", "size", "share", "ours/own"));
    }
    for size in &own.sizes(own.contract.timed()) {
        let work = work(own, args.dtype, size)?;
        let copies = 2 * card.l2_bytes()? / work.bytes.max(1) + 2;
        let [mut ours, mut theirs, mut libraries]: [Vec<Call>; 3] = Default::default();
        for copy in 0..copies.min(256) {
            let inputs = || own.contract.inputs(&Inputs::new(device, args.dtype, 3 + copy), size);
            let (contract, tensors) = (own.contract, inputs()?);
            ours.push(Box::new(move || contract.ours(&tensors)));
            if let (Some(library), &[m, n, k]) = (library, &size[..]) {
                let product = library.linear([m, n, k], &inputs()?, &contract.output(device, args.dtype, size)?)?;
                libraries.push(Box::new(move || product.launch()));
            }
            let (own, tensors, size, dtype, card) = (own.clone(), inputs()?, size.to_vec(), args.dtype, card.clone());
            let y = contract.output(device, dtype, &size)?;
            theirs.push(Box::new(move || {
                // SAFETY: as in check, where the same kernel went through every size.
                unsafe { contract.launch(&card, &own, dtype, &size, &tensors, &y)? };
                Ok(y.clone())
            }));
        }
        let calls = [ours, theirs, libraries].into_iter().filter(|calls| !calls.is_empty());
        let ready: Vec<_> = calls.map(|calls| clock.ready("", calls)).collect::<Result<_>>()?;
        let mut timed: Vec<_> = ready.into_iter().flatten().collect();
        clock.sample(&mut timed)?;
        let medians: Vec<f64> =
            timed.iter().map(|timed| timed.rotated().unwrap_or_else(|| timed.single()).median()).collect();
        let [ours, theirs, library @ ..] = &medians[..] else { continue };
        let library = library.first();
        let floor = (work.flops as f64 / peak.flops).max(work.bytes as f64 / peak.bytes);
        if args.json {
            print_line(json!({
                "kind": "own", "entry": own.entry, "dtype": args.dtype.name(), "size": size, "floor_us": floor * 1e6,
                "ours_us": ours * 1e6, "own_us": theirs * 1e6, "library_us": library.map(|library| library * 1e6),
                "share_of_peak": floor / theirs, "emulated": false,
            }));
        } else {
            let us = |seconds: &f64| format!("{:8.1} us", seconds * 1e6);
            let (size, share, ratio) = (format!("{size:?}"), 100.0 * floor / theirs, ours / theirs);
            let library = library.map(us).unwrap_or_default();
            let times = [us(&floor), us(ours), library, us(theirs)].map(|time| format!("{time:>11}")).join(" ");
            print_line(format!("{size:24} {times} {share:5.0}% {ratio:10.2}"));
        }
    }
    Ok(())
}

/// Flops and bytes of our op at this size.
fn work(own: &Own, dtype: DType, size: &[usize]) -> Result<Work> {
    let meta = Device::meta();
    let tensors = own.contract.inputs(&Inputs::new(&meta, dtype, 0), size)?;
    let Device::Meta(recorder) = &meta else { unreachable!("just made") };
    recorder.take_report();
    own.contract.ours(&tensors)?;
    Ok(recorder.take_report().total())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_say_what_a_kernel_is() {
        let text = "x\n// bench: op linear, entry my_gemm, grid ceil(n / 64) by ceil(m / 16) * 2, block 128, shared 512\n\
                    y\n// bench: map weight 64 by 128 swizzle 128, map y 8 by 16, cluster 1 by 2, multiple k 8, multiple n 16";
        let own = Own::parse(text).unwrap();
        assert_eq!((own.contract, own.entry.as_str(), own.block, own.shared), (Contract::Linear, "my_gemm", 128, 512));
        let names = own.contract.sizes();
        let grid: Vec<_> = own.grid.iter().map(|text| evaluate(text, names, &[33, 65, 7])).collect();
        assert_eq!(grid, [Some(2), Some(6), Some(1)]);
        let map = |operand, boxes: [usize; 2], swizzle| Map { operand, boxes: boxes.to_vec(), swizzle };
        assert_eq!(own.maps, [map(2, [64, 128], Swizzle::Bytes128), map(0, [8, 16], Swizzle::None)]);
        assert_eq!((own.cluster, &own.multiples[..]), ([1, 2, 1], &[1, 16, 8][..]));
        assert!(format!("{:?}", own.launch(&[33, 65, 7]).unwrap()).contains("cluster: [1, 2, 1]"));
        assert_eq!(own.sizes(&[&[3, 5, 7], &[3, 16, 8], &[3, 17, 8]]), [[3, 16, 8], [3, 32, 8]]);
        for (text, words) in [
            ("", "there is none"),
            ("// bench: op gemm, entry x, block 1", "no contract for op \"gemm\"; there are rms_norm"),
            ("// bench: op add, entry x", "it names no block"),
            ("// bench: op add, block 1", "it names no entry"),
            ("// bench: entry add, block 1", "it names no op"),
            ("// bench: op add, entry x, block 1, grid rows", "grid rows: is no product of numbers, count"),
            ("// bench: op add, entry x, block 1, grid ceil(count / 0)", "is no product"),
            ("// bench: op add, entry x, block many", "expected a number"),
            ("// bench: op add, entry x, block 1, warps 3", "\"warps\" is not known"),
            ("// bench: op add, entry x, block 1, grid 1 by 1 by 1 by 1", "4 dimensions"),
            ("// bench: op add, entry x, block 1, cluster two", "cluster is \"two\", expected a number"),
            ("// bench: op add, entry x, block 1, map x 64", "there is no operand \"x\"; there are y, a, b"),
            ("// bench: op add, entry x, block 1, map a", "expected an operand, its box and its swizzle"),
            (
                "// bench: op add, entry x, block 1, map a 64 swizzle 16",
                "a swizzle of \"16\"; there are 32, 64 and 128",
            ),
            ("// bench: op add, entry x, block 1, map a many", "expected an operand, its box"),
            ("// bench: op add, entry x, block 1, multiple n 8", "there is no size \"n\"; there are count"),
            ("// bench: op add, entry x, block 1, multiple count 0", "such as: multiple k 8"),
            ("// bench: op add, entry x\n// bench: block", "is no word and its value"),
        ] {
            let error = Own::parse(text).unwrap_err();
            assert!(error.contains(words), "{text}: {error}");
        }
    }
}
