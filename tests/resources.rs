//! What nvcc made of the kernels: no spills, the instructions that a kernel is written for, and the registers, threads
//! and shared memory in tests/data/kernel_resources.tsv, which a change must update: `tools/kernel-resources --update`.
//!
//! The table holds for one version of nvcc, that of tools/nvcc, and for two architectures; the rules for any.
//! Without nvcc nothing is checked, and the test says so, unless CI is set: then it fails.

#[allow(dead_code)]
#[path = "../build/archs.rs"]
mod archs;
#[path = "../build/depfile.rs"]
mod depfile;
#[allow(dead_code)]
#[path = "../build/jobs.rs"]
mod jobs;
#[allow(dead_code)]
#[path = "../build/sources.rs"]
mod sources;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use rayon::prelude::*;

const TABLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/kernel_resources.tsv");
const UPDATE: &str = "MEGAFUSE_UPDATE_KERNEL_RESOURCES";
/// Of these architectures, where the build has both.
const TABLED: [&str; 2] = ["80", "90a"];
const COLUMNS: &str =
    "arch\tkernel\tthreads\tregisters\tstatic_shared\tblocks\tHMMA\tLDSM\tLDGSTS\tHGMMA\tUTMALDG\tUTMASTG";

/// Instructions of the tensor cores by warp (mma), ldmatrix, cp.async; of the tensor cores by warpgroup (wgmma; QGMMA is
/// that of 8 bits), TMA's loads and stores.
const COUNTED: [&str; 7] = ["HMMA", "LDSM", "LDGSTS", "HGMMA", "QGMMA", "UTMALDG", "UTMASTG"];
/// Local memory, which is a spill or an array with an index unknown to the compiler.
const LOCAL: [&str; 2] = ["STL", "LDL"];

/// Kernels on the tensor cores, by name and dtype; but not those that only add up what others computed.
const TENSOR_CORES: [&str; 3] = ["linear", "conv2d", "attention"];
const SUMS: &str = "_join_";
/// Nor what is launched once per relay and bound by its exponentials.
const MAPS: &str = "attention_map_";
/// Files for Hopper: there the tensor cores read shared memory, and TMA fills it.
const HOPPER: &str = "sm90/";
/// Tensor-core kernels for rows that do not begin at 16 bytes, which cp.async cannot copy.
const WITHOUT_CP_ASYNC: &str = "_general_";
/// Products of 8-bit floats, which are exact on the tensor cores; `_f32` is the dtype of the result.
const OF_8_BITS: &str = "linear_fp8_";

#[derive(Default)]
struct Kernel {
    /// Below kernels/, without the extension.
    file: String,
    threads: u32,
    registers: u32,
    static_shared: u32,
    /// Spilled bytes stored and loaded; bytes of stack.
    local: [u32; 3],
    instructions: BTreeMap<String, u32>,
}

/// By architecture and name.
type Kernels = BTreeMap<(String, String), Kernel>;

#[test]
fn kernels_keep_to_their_registers_and_instructions() {
    if env!("MEGAFUSE_NVCC").is_empty() {
        assert!(std::env::var_os("CI").is_none(), "CI must have nvcc; see the build's warnings");
        // Past the test harness, which shows nothing of a test that passes.
        let _ = writeln!(
            std::io::stderr(),
            "\nNOT CHECKED: registers, spills and instructions of the kernels: built without nvcc. Run tools/nvcc.\n"
        );
        return;
    }
    let kernels = compiled_kernels();
    let mut wrong = broken_rules(&kernels);
    let fresh = table(&kernels);
    let archs = archs::parse(env!("MEGAFUSE_CUDA_ARCHS")).expect("what the build says");
    if TABLED.iter().all(|tabled| archs.sass.iter().any(|arch| arch == tabled)) {
        if std::env::var_os(UPDATE).is_some() {
            fs::write(TABLE, &fresh).expect("tests/data is writable");
        }
        let committed = fs::read_to_string(TABLE).unwrap_or_default();
        if first_line(&committed) == first_line(&fresh) {
            wrong.extend(difference(&committed, &fresh));
        } else {
            let [committed, fresh] = [&committed, &fresh].map(|text| first_line(text));
            let note = format!("NOT COMPARED: {TABLE} is for \"{committed}\", this is \"{fresh}\"");
            assert!(std::env::var_os("CI").is_none(), "{note}");
            let _ = writeln!(std::io::stderr(), "\n{note}\n");
        }
    }
    assert!(wrong.is_empty(), "{}\nIf this is meant: tools/kernel-resources --update", wrong.join("\n"));
}

/// What the build left in OUT_DIR: resources.tsv, card/<arch>/<file>.cubin and the .ptx that it is made from.
fn compiled_kernels() -> Kernels {
    let out = Path::new(env!("OUT_DIR"));
    let nvcc = PathBuf::from(read(&out.join("nvcc")));
    let nvcc = nvcc.canonicalize().unwrap_or_else(|error| panic!("{}: {error}", nvcc.display()));
    let mut kernels = Kernels::new();
    for line in read(&out.join("resources.tsv")).lines() {
        let fields: Vec<&str> = line.split('\t').collect();
        let [arch, kernel, numbers @ ..] = &fields[..] else { panic!("resources.tsv: {line}") };
        let numbers: Vec<u32> = numbers.iter().map(|field| field.parse().expect("a number")).collect();
        let &[registers, static_shared, stores, loads, stack] = &numbers[..] else { panic!("resources.tsv: {line}") };
        let kernel = kernels.entry((arch.to_string(), kernel.to_string())).or_default();
        *kernel = Kernel { registers, static_shared, local: [stores, loads, stack], ..Kernel::default() };
    }
    let archs = archs::parse(env!("MEGAFUSE_CUDA_ARCHS")).expect("what the build says");
    let mut cubins = Vec::new();
    for source in sources::find("kernels").expect("tests run in the package's folder") {
        for arch in source.archs(&archs).sass {
            let image = |arch: &str, kind| out.join("card").join(arch).join(&source.name).with_extension(kind);
            let (cubin, ptx) = (image(&arch, "cubin"), image(&source.ptx_for(&arch), "ptx"));
            cubins.push((arch, source.name.clone(), cubin, ptx));
        }
    }
    let disassembled: Vec<_> = cubins
        .par_iter()
        .map(|(arch, file, cubin, ptx)| {
            let output = Command::new(nvcc.with_file_name("cuobjdump")).arg("-sass").arg(cubin).output();
            let output = output.unwrap_or_else(|error| panic!("cuobjdump: {error}; tools/nvcc installs it"));
            assert!(output.status.success(), "{}: {}", cubin.display(), String::from_utf8_lossy(&output.stderr));
            let instructions = count_instructions(&String::from_utf8_lossy(&output.stdout));
            (arch, file, instructions, launch_bounds(&read(ptx)))
        })
        .collect();
    for (arch, file, instructions, threads) in disassembled {
        for (name, count) in instructions {
            let kernel = kernels.get_mut(&(arch.clone(), name.clone()));
            let kernel = kernel.unwrap_or_else(|| panic!("{name} for {arch} is not in resources.tsv"));
            kernel.file.clone_from(file);
            kernel.threads = threads[&name];
            kernel.instructions = count;
        }
    }
    kernels
}

/// The instructions of each function in the output of `cuobjdump -sass`: `/*0080*/  @!P0 HMMA.16816.F32.BF16 R4, ...`.
fn count_instructions(sass: &str) -> BTreeMap<String, BTreeMap<String, u32>> {
    let mut functions = BTreeMap::new();
    let mut current: Option<&mut BTreeMap<String, u32>> = None;
    for line in sass.lines().map(str::trim_start) {
        if let Some(name) = line.strip_prefix("Function : ") {
            current = Some(functions.entry(name.trim().to_owned()).or_default());
        } else if let (Some(counts), true) = (&mut current, line.starts_with("/*")) {
            let words = line.split_whitespace().skip(1).find(|word| !word.starts_with('@'));
            let name = words.and_then(|word| word.split(['.', ';']).next()).unwrap_or_default();
            if COUNTED.contains(&name) || LOCAL.contains(&name) {
                *counts.entry(name.to_owned()).or_default() += 1;
            }
        }
    }
    functions
}

/// The most threads a block of each kernel may have, from the PTX: `.entry add_f32(` and later `.maxntid 256`.
fn launch_bounds(ptx: &str) -> BTreeMap<String, u32> {
    let mut bounds = BTreeMap::new();
    let mut current = None;
    for line in ptx.lines() {
        if let Some((_, entry)) = line.split_once(".entry ") {
            current = Some(entry.trim_end_matches('(').to_owned());
        } else if let Some(threads) = line.strip_prefix(".maxntid ") {
            let threads = threads.split(',').next().and_then(|threads| threads.trim().parse().ok());
            bounds.extend(current.take().zip(threads));
        }
    }
    bounds
}

fn broken_rules(kernels: &Kernels) -> Vec<String> {
    let mut wrong = Vec::new();
    for ((arch, name), kernel) in kernels {
        let count = |instruction: &str| kernel.instructions.get(instruction).copied().unwrap_or(0);
        let mut require = |holds: bool, what: &str| {
            if !holds {
                wrong.push(format!("{name} for {arch} {what}"));
            }
        };
        let [stores, loads, stack] = kernel.local;
        let local = LOCAL.iter().map(|name| count(name)).sum::<u32>();
        let spills = format!("spills: {stores} bytes stored, {loads} loaded, {stack} of stack, {local} instructions");
        require(stores + loads + stack + local == 0, &spills);

        let half = name.ends_with("_f16") || name.ends_with("_bf16");
        let (by_warp, by_warpgroup) = (count("HMMA"), count("HGMMA") + count("QGMMA"));
        if name.ends_with("_f32") && !name.starts_with(OF_8_BITS) {
            require(by_warp + by_warpgroup == 0, "uses the tensor cores, whose f32 has 10 bits");
        } else if half
            && !name.contains(SUMS)
            && !name.starts_with(MAPS)
            && TENSOR_CORES.iter().any(|family| name.starts_with(family))
        {
            if kernel.file.starts_with(HOPPER) {
                require(by_warpgroup > 0 && by_warp == 0, "does not use the tensor cores by wgmma alone");
                require(count("UTMALDG") > 0, "does not load with TMA");
            } else {
                require(by_warp > 0, "does not use the tensor cores");
                require(count("LDSM") > 0, "does not load fragments with ldmatrix");
                require(name.contains(WITHOUT_CP_ASYNC) || count("LDGSTS") > 0, "does not copy with cp.async");
            }
        }
    }
    wrong
}

fn table(kernels: &Kernels) -> String {
    let mut text = format!("# nvcc {}; tools/kernel-resources --update writes this\n", env!("MEGAFUSE_NVCC"));
    text += "# blocks: how many a multiprocessor holds, by threads, registers and static shared memory\n";
    let _ = writeln!(text, "{COLUMNS}");
    for ((arch, name), kernel) in kernels.iter().filter(|((arch, _), _)| TABLED.contains(&arch.as_str())) {
        let Kernel { threads, registers, static_shared, .. } = kernel;
        let count = |name| kernel.instructions.get(name).copied().unwrap_or(0);
        let [mma, ldmatrix, cp_async, hgmma, qgmma, load, store] = COUNTED.map(count);
        let (blocks, wgmma) = (kernel.blocks(arch), hgmma + qgmma);
        let _ = write!(text, "{arch}\t{name}\t{threads}\t{registers}\t{static_shared}\t{blocks}\t");
        let _ = writeln!(text, "{mma}\t{ldmatrix}\t{cp_async}\t{wgmma}\t{load}\t{store}");
    }
    text
}

impl Kernel {
    /// Blocks of `threads` that a multiprocessor holds at once. Dynamic shared memory, which only the launch knows, may
    /// allow fewer. CUDA programming guide, technical specifications per compute capability.
    fn blocks(&self, arch: &str) -> u32 {
        let small = ["86", "89", "120", "121"].iter().any(|small| arch.starts_with(small));
        let (most_warps, most_blocks, shared) = match arch {
            _ if small => (48, 16, 100 * 1024),
            "80" | "87" => (64, 32, 164 * 1024),
            _ => (64, 32, 228 * 1024),
        };
        let warps = self.threads.div_ceil(32).max(1);
        // A warp's registers are given out 256 at a time, from 64 Ki; a block's shared memory has 1 KiB for the system.
        let by_registers = (65536 / (self.registers * 32).next_multiple_of(256)) / warps;
        let by_shared = shared / (self.static_shared + 1024);
        [most_blocks, most_warps / warps, by_registers, by_shared].into_iter().min().expect("four")
    }
}

fn difference(committed: &str, fresh: &str) -> Vec<String> {
    let only = |a: &str, b: &str, mark: char| -> Vec<String> {
        a.lines().filter(|line| !b.lines().any(|other| other == *line)).map(|line| format!("{mark} {line}")).collect()
    };
    let mut lines = only(committed, fresh, '-');
    lines.extend(only(fresh, committed, '+'));
    if !lines.is_empty() {
        lines.insert(0, format!("{TABLE} (-) is not what was compiled (+):\n  {COLUMNS}"));
    }
    lines
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn sass_and_ptx_are_read() {
    let sass = "\tcode for sm_80\n\t\tFunction : add_f32\n\t.headerflags\t@\"EF\"\n\
        /*0000*/    IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;   /* 0x00000a00ff017624 */\n\
        /* 0x000fe400078e00ff */\n\
        /*0010*/    @!P0 STL [R1], R2 ;\n\
        /*0020*/    HMMA.16816.F32.BF16 R4, R8, R12, R4 ;\n\
        \t\tFunction : other\n\
        /*0000*/    LDSM.16.M88.4 R4, [R8] ;\n\
        /*0010*/    LDSM;\n";
    let found = count_instructions(sass);
    assert_eq!(found["add_f32"], BTreeMap::from([("STL".into(), 1), ("HMMA".into(), 1)]));
    assert_eq!(found["other"], BTreeMap::from([("LDSM".into(), 2)]));
    let ptx = ".visible .entry add_f32(\n\t.param .u64 x\n)\n.maxntid 256\n.minnctapersm 1\n{\n}\n\
        .visible .entry other(\n)\n.maxntid 128, 1, 1\n";
    assert_eq!(launch_bounds(ptx), BTreeMap::from([("add_f32".into(), 256), ("other".into(), 128)]));
}

#[test]
fn rules_are_enforced() {
    let kernel = |name: &str, instructions: &[(&str, u32)]| {
        let instructions = instructions.iter().map(|(name, count)| (name.to_string(), *count)).collect();
        (("80".to_owned(), name.to_owned()), Kernel { instructions, ..Kernel::default() })
    };
    let all = [("HMMA", 1), ("LDSM", 1), ("LDGSTS", 1)];
    let good = Kernels::from([
        kernel("linear_64x64_bf16", &all),
        kernel("linear_general_f16", &all[..2]),
        kernel("linear_64x64_f32", &all[2..]),
        kernel("group_norm_bf16", &[]),
        kernel("conv2d_join_bf16", &[]),
        kernel("attention_map_bf16", &[]),
    ]);
    assert_eq!(broken_rules(&good), Vec::<String>::new());
    let mut hopper = Kernels::from([
        kernel("linear_128x160_bf16", &[("HGMMA", 2), ("UTMALDG", 1), ("UTMASTG", 1)]),
        kernel("linear_128x160_e4m3_bf16", &[("QGMMA", 2), ("UTMALDG", 1)]),
    ]);
    hopper.values_mut().for_each(|kernel| kernel.file = "sm90/linear".into());
    assert_eq!(broken_rules(&hopper), Vec::<String>::new());
    hopper.values_mut().for_each(|kernel| kernel.instructions.retain(|name, _| name != "UTMALDG"));
    assert!(broken_rules(&hopper).iter().all(|line| line.contains("does not load with TMA")));
    hopper
        .values_mut()
        .for_each(|kernel| kernel.instructions = BTreeMap::from([("HMMA".into(), 1), ("UTMALDG".into(), 1)]));
    assert!(broken_rules(&hopper).iter().all(|line| line.contains("does not use the tensor cores by wgmma alone")));
    assert_eq!(broken_rules(&hopper).len(), 2);
    for (name, instructions, want) in [
        ("linear_64x64_bf16", &all[1..], "does not use the tensor cores"),
        ("attention_d64_f16", &all[..1], "does not load fragments"),
        ("conv2d_64x64_f16", &all[..2], "does not copy with cp.async"),
        ("linear_f32", &all, "uses the tensor cores"),
        ("add_f32", &[("LDL", 2)], "spills"),
    ] {
        let wrong = broken_rules(&Kernels::from([kernel(name, instructions)]));
        assert!(wrong.first().is_some_and(|line| line.contains(want)), "{name}: {wrong:?}");
    }
    let mut spilling = Kernels::from([kernel("add_f32", &[])]);
    spilling.values_mut().for_each(|kernel| kernel.local = [0, 0, 8]);
    assert_eq!(broken_rules(&spilling).len(), 1);
}

#[test]
fn blocks_a_multiprocessor_holds() {
    let kernel = |threads, registers, static_shared| Kernel { threads, registers, static_shared, ..Kernel::default() };
    assert_eq!(kernel(256, 32, 0).blocks("80"), 8, "2048 threads");
    assert_eq!(kernel(256, 32, 0).blocks("89"), 6, "1536 threads");
    assert_eq!(kernel(32, 16, 0).blocks("90a"), 32, "32 blocks");
    assert_eq!(kernel(256, 127, 0).blocks("90a"), 2, "registers");
    assert_eq!(kernel(256, 129, 0).blocks("90a"), 1, "registers, given out 8 a thread");
    assert_eq!(kernel(128, 32, 47 * 1024).blocks("80"), 3, "shared memory");
    assert_eq!(kernel(128, 32, 47 * 1024).blocks("90a"), 4, "shared memory");
}
