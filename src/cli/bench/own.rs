//! `bench kernels --kernel my.cu`: a reader's own kernel against the contract of an op: compiled, checked against the cpu on
//! random inputs of odd sizes, raced on the emulated card, and on a card timed in turns with ours.
//!
//! The file includes kernels/common/device.cuh, like ours, and says in a comment what it is:
//!
//! ```text
//! // bench: op rms_norm, entry my_norm, grid rows, block 256, shared 0
//! ```
//!
//! `entry`: the kernels are my_norm_f32, my_norm_f16, my_norm_bf16, those that there are. `grid`: up to three factors-lists
//! with `by` between them, made of numbers, the op's sizes and ceil(size / number). Arguments, in this order:
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
use megafuse::runtime::cuda::{self, Arg, DevicePtr, Launch};
use megafuse::runtime::{CudaDevice, Work};
use megafuse::{DType, Device, Error, Result, Tensor};
use serde_json::json;

use super::args::KernelArgs;
use super::clock::Clock;
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

    /// One element; primes; one off a warp, a vector and a block; what kernels like best.
    fn checked(self) -> &'static [&'static [usize]] {
        match self {
            Contract::RmsNorm | Contract::LayerNorm => {
                &[&[1, 1], &[3, 7], &[5, 33], &[2, 97], &[7, 64], &[2, 1025], &[19, 320], &[1, 4096]]
            }
            Contract::Add | Contract::Silu => &[&[1], &[31], &[257], &[1024], &[1025], &[4999]],
            Contract::Linear => {
                &[&[1, 1, 1], &[3, 5, 7], &[33, 65, 17], &[64, 64, 64], &[59, 97, 111], &[128, 160, 64]]
            }
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
            (Contract::LayerNorm, [x, gamma, beta]) => ops::layer_norm(LayerNorm { x, gamma, beta, eps: EPS }),
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
        let addresses: Vec<DevicePtr> =
            [y].into_iter().chain(tensors).map(|tensor| DevicePtr::or_null(Some(tensor))).collect();
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
        // SAFETY: the caller's; count and sizes of the arguments are compared with the kernel's.
        unsafe { card.launch(MODULE, &entry, launch, &args) }
    }
}

/// The name under which the file's kernels are loaded.
const MODULE: &str = "bench --kernel";

/// What the comment of the file says.
#[derive(Clone, Debug, PartialEq)]
struct Own {
    contract: Contract,
    entry: String,
    grid: [String; 3],
    block: usize,
    shared: usize,
}

impl Own {
    fn read(path: &Path) -> Result<Own> {
        let text = fs::read_to_string(path).map_err(|error| Error::io(path, error))?;
        Own::parse(&text).map_err(|reason| Error::file(path, reason))
    }

    fn parse(text: &str) -> std::result::Result<Own, String> {
        const WANTED: &str = "a comment such as \"// bench: op rms_norm, entry my_norm, grid rows, block 256, shared 0\" says what it is";
        let line = text.lines().find_map(|line| line.trim().strip_prefix("// bench:"));
        let line = line.ok_or_else(|| format!("{WANTED}; there is none"))?;
        let mut own = Own {
            contract: Contract::Add,
            entry: String::new(),
            grid: ["1", "1", "1"].map(String::from),
            block: 0,
            shared: 0,
        };
        let mut op = None;
        for part in line.split(',').map(str::trim) {
            let (key, value) =
                part.split_once(' ').ok_or_else(|| format!("{part:?} is no word and its value; {WANTED}"))?;
            let number = || value.trim().parse().map_err(|_| format!("{key} is {value:?}, expected a number"));
            match key {
                "op" => {
                    let found = CONTRACTS.iter().find(|(name, _)| *name == value.trim());
                    let names: Vec<&str> = CONTRACTS.iter().map(|(name, _)| *name).collect();
                    let unknown = || format!("no contract for op {value:?}; there are {}", names.join(", "));
                    op = Some(found.ok_or_else(unknown)?.1);
                }
                "entry" => own.entry = value.trim().into(),
                "grid" => {
                    let parts: Vec<&str> = value.split(" by ").map(str::trim).collect();
                    if parts.len() > 3 {
                        return Err(format!("grid {value:?} has {} dimensions, at most 3", parts.len()));
                    }
                    for (at, part) in parts.into_iter().enumerate() {
                        own.grid[at] = part.into();
                    }
                }
                "block" => own.block = number()?,
                "shared" => own.shared = number()?,
                _ => return Err(format!("{key:?} is not known; {WANTED}")),
            }
        }
        own.contract = op.ok_or_else(|| format!("it names no op; {WANTED}"))?;
        if own.entry.is_empty() || own.block == 0 {
            return Err(format!("it names no {}; {WANTED}", if own.block == 0 { "block" } else { "entry" }));
        }
        let ones: Vec<usize> = vec![1; own.contract.sizes().len()];
        own.launch(&ones).map_err(|error| error.to_string())?;
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
        Ok(Launch::grid(grid).block(self.block).shared(self.shared))
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
        DeviceChoice::Auto => Device::cuda(0).or_else(|_| DeviceChoice::Emu.open())?,
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
        let wrong = check(&own, card, &device, args, &build)?;
        // Also where results are wrong: a race may be why.
        let raced = if build == "plain" { race(path, args) } else { Ok(()) };
        return right(&own, &wrong).and(raced);
    }
    card.load(MODULE, &cubin(path, folder.path(), card)?)?;
    right(&own, &check(&own, card, &device, args, "card")?)?;
    time(&own, card, &device, args)
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
    for (seed, &size) in own.contract.checked().iter().enumerate() {
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

/// In turns with ours, at the models' sizes.
fn time(own: &Own, card: &CudaDevice, device: &Device, args: &KernelArgs) -> Result<()> {
    let clock = Clock::new(device, args.seconds)?;
    let peak = Peaks::measure(&clock, args.dtype)?;
    if !args.json {
        print_line(format!(
            "{:40} {:>11} {:>11} {:>11} {:>6} {:>6}",
            "size", "floor", "ours", own.entry, "share", "ratio"
        ));
    }
    for &size in own.contract.timed() {
        let work = work(own, args.dtype, size)?;
        let copies = 2 * card.l2_bytes()? / work.bytes.max(1) + 2;
        let (mut ours, mut theirs): (Vec<Call>, Vec<Call>) = (Vec::new(), Vec::new());
        for copy in 0..copies.min(256) {
            let inputs = || own.contract.inputs(&Inputs::new(device, args.dtype, 3 + copy), size);
            let (contract, tensors) = (own.contract, inputs()?);
            ours.push(Box::new(move || contract.ours(&tensors)));
            let (own, tensors, size, dtype, card) = (own.clone(), inputs()?, size.to_vec(), args.dtype, card.clone());
            let y = contract.output(device, dtype, &size)?;
            theirs.push(Box::new(move || {
                // SAFETY: as in check, where the same kernel went through every size.
                unsafe { contract.launch(&card, &own, dtype, &size, &tensors, &y)? };
                Ok(y.clone())
            }));
        }
        let mut timed: Vec<_> = [clock.ready("", ours)?, clock.ready("", theirs)?].into_iter().flatten().collect();
        clock.sample(&mut timed)?;
        let [ours, theirs] =
            [&timed[0], &timed[1]].map(|timed| timed.rotated().unwrap_or_else(|| timed.single()).median());
        let floor = (work.flops as f64 / peak.flops).max(work.bytes as f64 / peak.bytes);
        if args.json {
            print_line(json!({
                "kind": "own", "entry": own.entry, "dtype": args.dtype.name(), "size": size, "floor_us": floor * 1e6,
                "ours_us": ours * 1e6, "own_us": theirs * 1e6, "share_of_peak": floor / theirs, "emulated": false,
            }));
        } else {
            let us = |seconds: f64| format!("{:8.1} us", seconds * 1e6);
            let (size, share, ratio) = (format!("{size:?}"), 100.0 * floor / theirs, ours / theirs);
            print_line(format!("{size:40} {} {} {} {share:5.0}% {ratio:6.2}", us(floor), us(ours), us(theirs)));
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
    fn a_comment_says_what_a_kernel_is() {
        let text =
            "x\n// bench: op linear, entry my_gemm, grid ceil(n / 64) by ceil(m / 16) * 2, block 128, shared 512\n";
        let own = Own::parse(text).unwrap();
        assert_eq!((own.contract, own.entry.as_str(), own.block, own.shared), (Contract::Linear, "my_gemm", 128, 512));
        let names = own.contract.sizes();
        let grid: Vec<_> = own.grid.iter().map(|text| evaluate(text, names, &[33, 65, 7])).collect();
        assert_eq!(grid, [Some(2), Some(6), Some(1)]);
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
        ] {
            let error = Own::parse(text).unwrap_err();
            assert!(error.contains(words), "{text}: {error}");
        }
    }
}
