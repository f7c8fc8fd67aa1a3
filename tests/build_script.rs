//! What build.rs does before anything is compiled: reading lists, versions and what compilers print; deciding what is
//! out of date.

#[allow(dead_code)]
#[path = "../build/archs.rs"]
mod archs;
#[path = "../build/depfile.rs"]
mod depfile;
#[allow(dead_code)]
#[path = "../build/jobs.rs"]
mod jobs;
#[path = "../build/ptx.rs"]
mod ptx;
#[path = "../build/resources.rs"]
mod resources;
#[path = "../build/sources.rs"]
mod sources;
#[allow(dead_code)]
#[path = "../build/toolchain.rs"]
mod toolchain;

use std::fs;
use std::path::{Path, PathBuf};

use jobs::Job;

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

fn watched(name: &str) -> Option<String> {
    variable(name)
}

#[test]
fn archs_are_read_and_written() {
    for (text, want) in [
        ("80,90a", "80,90a,ptx80"),
        (" 80 , 90a,ptx90", "80,90a,ptx90"),
        ("ptx86", "ptx86"),
        ("80,86,89,90a,100a,120a", "80,86,89,90a,100a,120a,ptx80"),
    ] {
        let archs = archs::parse(text).unwrap();
        assert_eq!(archs.to_string(), want);
        assert_eq!(archs::parse(want).unwrap(), archs);
    }
    let both = archs::parse("80,90a,ptx80,ptx86").unwrap();
    assert_eq!(both.all(), ["80", "90a", "86"], "80 needs one compilation for both");
}

#[test]
fn bad_archs_are_named() {
    for (text, reason) in [
        ("", "\"\" is not a compute capability"),
        ("80,", "\"\" is not"),
        ("sm_80", "\"sm_80\" is not"),
        ("90aa", "\"90aa\" is not"),
        ("9a0", "\"9a0\" is not"),
        ("a", "\"a\" is not"),
        ("ptx", "\"ptx\" is not"),
        ("80;90", "\"80;90\" is not"),
        ("-90", "\"-90\" is not"),
        ("99999999999", "\"99999999999\" is not"),
        ("75", "\"75\" is older than 80"),
        ("80,ptx70", "\"ptx70\" is older than 80"),
        ("80,90a,80", "\"80\" is named twice"),
    ] {
        let error = archs::parse(text).unwrap_err();
        assert!(error.contains(reason) && error.contains("MEGAFUSE_CUDA_ARCHS"), "{text:?}: {error}");
    }
}

#[test]
fn depfiles_as_compilers_write_them() {
    let gcc = "out/x.o: kernels/x.cu \\\n kernels/common/device.cuh /usr/include/stdint.h\n";
    assert_eq!(depfile::parse(gcc).unwrap(), ["kernels/x.cu", "kernels/common/device.cuh", "/usr/include/stdint.h"]);
    let nvcc = "\nout/x.fatbin : kernels/x.cu \\\r\n    a\\ b.h c\\#.h d$$.h\n\nsecond: rule\n";
    assert_eq!(depfile::parse(nvcc).unwrap(), ["kernels/x.cu", "a b.h", "c#.h", "d$.h"]);
    let windows = "C:\\out\\x.o: C:\\in\\x.cu\n";
    assert_eq!(depfile::parse(windows).unwrap(), ["C:\\in\\x.cu"]);
    assert_eq!(depfile::parse("x.o: \n").unwrap(), Vec::<String>::new());
    for bad in ["", "\n\n", "no target"] {
        depfile::parse(bad).unwrap_err();
    }
}

/// A folder `kernels` with these files.
fn kernels_folder(files: &[&str]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in files {
        let path = folder.path().join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "").unwrap();
    }
    folder
}

#[test]
fn sources_are_for_every_card_or_for_one_instruction_set() {
    let folder = kernels_folder(&[
        "norm.cu",
        "linear.cu",
        "sm90/linear.cu",
        "sm90/loop.cuh",
        "common/math.cuh",
        "emu/x.cpp",
        "tutorial/01.cu",
    ]);
    let found = sources::find(folder.path().to_str().unwrap()).unwrap();
    let archs = |source: &sources::Source, wanted| {
        let own = source.archs(&archs::parse(wanted).unwrap());
        (own.sass.join(","), own.ptx.join(","))
    };
    let names: Vec<(&str, &str)> = found.iter().map(|source| (&*source.name, source.isa())).collect();
    assert_eq!(names, [("linear", "Sm80"), ("norm", "Sm80"), ("sm90/linear", "Sm90a")]);
    assert_eq!(found[2].path, folder.path().join("sm90/linear.cu"));
    let [portable, _, hopper] = &found[..] else { panic!("{found:?}") };
    let made_from: Vec<String> = ["80", "86", "89", "90a", "120a"].iter().map(|arch| portable.ptx_for(arch)).collect();
    assert_eq!(
        made_from,
        ["80", "80", "89", "90", "90"],
        "the front end runs once for cards that it says the same for"
    );
    assert_eq!(hopper.ptx_for("90a"), "90a");
    assert_eq!(archs(portable, "80,90a,ptx90a"), ("80,90a".into(), "90a".into()));
    assert_eq!(archs(hopper, "80,90a"), ("90a".into(), "".into()), "and no PTX of 80");
    assert_eq!(archs(hopper, "80,ptx90a"), ("".into(), "90a".into()));
    for without in ["80", "80,90,100a", "ptx80"] {
        assert_eq!(archs(hopper, without), ("".into(), "".into()), "{without}");
        assert!(hopper.archs(&archs::parse(without).unwrap()).is_empty());
    }
    assert!(!portable.archs(&archs::parse("ptx80").unwrap()).is_empty());
}

#[test]
fn a_kernel_that_nothing_would_compile_is_named() {
    let folder = kernels_folder(&["norm.cu", "sm91/linear.cu"]);
    let error = sources::find(folder.path().to_str().unwrap()).unwrap_err();
    assert!(error.contains("sm91/linear.cu: nothing compiles this folder") && error.contains("sm90"), "{error}");
}

const PTXAS: &str = "\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'linear_bf16' for 'sm_90a'
ptxas info    : Function properties for helper
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for linear_bf16
    16 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 127 registers, used 1 barriers, 16 bytes cumulative stack size, 1152 bytes smem, 384 bytes cmem[0]
ptxas info    : Compile time = 15.563 ms
ptxas info    : Compiling entry function 'add_f32' for 'sm_80'
ptxas info    : Function properties for add_f32
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers
";

#[test]
fn resources_of_every_kernel() {
    let found = resources::parse(PTXAS).unwrap();
    assert_eq!(resources::table(found), "80\tadd_f32\t12\t0\t0\t0\t0\n90a\tlinear_bf16\t127\t1152\t4\t12\t16\n");
    assert_eq!(resources::parse("ptxas info    : 0 bytes gmem\n").unwrap(), []);
}

#[test]
fn resources_that_cannot_be_read() {
    for (from, to) in [
        ("Used 127 registers", "Used many registers"),
        ("    16 bytes stack frame", "    no bytes stack frame"),
        (", 12 bytes spill loads", ""),
        ("' for 'sm_90a'", ""),
        ("ptxas info    : Used 127", "nothing used 127"),
        ("ptxas info    : Used 12 registers\n", ""),
        ("ptxas info    : Compiling entry function 'add_f32' for 'sm_80'\n", ""),
    ] {
        let text = PTXAS.replace(from, to);
        assert_ne!(text, PTXAS, "{from}");
        let error = resources::parse(&text).unwrap_err();
        assert!(error.starts_with("ptxas -v"), "{from}: {error}");
    }
}

#[test]
fn what_makes_kernels_slow_is_an_error() {
    let clean =
        PTXAS.replace("4 bytes spill stores, 12 bytes spill loads", "0 bytes spill stores, 0 bytes spill loads");
    let slow = |text: &str| resources::slowed_down(text, &resources::parse(text).unwrap());
    assert_eq!(slow(&clean), Vec::<String>::new());
    let spills = "linear_bf16 for 90a has 127 registers and spills: 4 bytes stored, 12 loaded";
    assert_eq!(slow(PTXAS), [spills]);
    for note in [
        "ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored to maintain minimum register requirements.",
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to x in 'f'",
        "ptxas info    : (C7512) wgmma and other words",
    ] {
        assert_eq!(slow(&format!("{note}\n{clean}")), [note]);
    }
}

#[test]
fn a_kernels_name_is_in_one_file() {
    let kernels = resources::parse(PTXAS).unwrap();
    let in_file = |file: &'static str| kernels.iter().map(move |kernel| (Path::new(file), kernel.clone()));
    // As for several architectures.
    let mut found: Vec<_> = in_file("linear.cu").chain(in_file("linear.cu")).collect();
    assert_eq!(resources::name_twice(&found), None);
    found.extend(in_file("sm90/linear.cu"));
    assert_eq!(resources::name_twice(&found).unwrap(), "linear_bf16 is in linear.cu and in sm90/linear.cu");
}

#[test]
fn nvcc_versions() {
    let text = "Cuda compilation tools, release 13.0, V13.0.88\nBuild cuda_13.0.r13.0/compiler.36424714_0\n";
    assert_eq!(toolchain::parse_nvcc_version(text), Some(([13, 0], "13.0.88".into())));
    for bad in ["", "release", "release 13", "release 13.0, V", "release 13.0, V13", "release 13.0, Vx.y"] {
        assert_eq!(toolchain::parse_nvcc_version(bad), None, "{bad}");
    }
}

/// A folder with a source, a header and the compilation of them.
struct Scratch {
    folder: tempfile::TempDir,
    job: Job,
}

impl Scratch {
    fn new() -> Self {
        let compiler = toolchain::host_compiler().expect("the tests need a C++ compiler, as tools/test says");
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("a b.cpp"), "#include \"value.h\"\nint value() { return VALUE; }\n").unwrap();
        fs::write(at("value.h"), "#define VALUE 1\n").unwrap();
        let job = Job {
            identity: compiler.version,
            program: compiler.program,
            arguments: ["-c", "-x", "c++"].map(Into::into).to_vec(),
            source: at("a b.cpp"),
            output: at("out/value.o"),
            steps: vec![],
        };
        let scratch = Scratch { folder, job };
        scratch.age();
        scratch
    }

    /// As if the files had been saved a while ago: those saved during a compilation are compiled again.
    fn age(&self) {
        for name in ["a b.cpp", "value.h"] {
            let past = std::time::SystemTime::now() - std::time::Duration::from_secs(10);
            fs::File::options().append(true).open(self.at(name)).unwrap().set_modified(past).unwrap();
        }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Whether it compiled, or the compiler's text.
    fn run(&self) -> Result<bool, String> {
        let time = |path: &Path| fs::metadata(path).and_then(|data| data.modified()).ok();
        let before = time(&self.job.output);
        let log = jobs::run([&self.job].into_iter()).unwrap().remove(0);
        log.map(|_| time(&self.job.output) != before)
    }
}

#[test]
fn only_what_changed_is_compiled() {
    let mut scratch = Scratch::new();
    assert!(scratch.run().unwrap(), "the first time");
    assert!(!scratch.run().unwrap(), "nothing changed");

    fs::write(scratch.at("value.h"), "#define VALUE 2\n").unwrap();
    scratch.age();
    assert!(scratch.run().unwrap(), "a header changed");
    assert!(!scratch.run().unwrap(), "nothing changed");

    scratch.age();
    assert!(!scratch.run().unwrap(), "only the time changed");

    scratch.job.arguments.push("-O1".into());
    assert!(scratch.run().unwrap(), "an option changed");
    scratch.job.identity.push('!');
    assert!(scratch.run().unwrap(), "another compiler");

    fs::remove_file(&scratch.job.output).unwrap();
    assert!(scratch.run().unwrap(), "the output is gone");
}

#[test]
fn further_steps_are_part_of_the_compilation() {
    let mut scratch = Scratch::new();
    assert!(scratch.run().unwrap());
    scratch.job.arguments[0] = "-S".into();
    scratch.job.output = scratch.at("out/value.s");
    let arguments = ["-c", "-x", "assembler"].map(Into::into).to_vec();
    let output = scratch.at("out/second.o");
    scratch.job.steps = vec![jobs::Step { arguments, output: output.clone() }];
    assert!(scratch.run().unwrap());
    assert!(output.is_file());
    assert!(!scratch.run().unwrap(), "nothing changed");
    fs::remove_file(&output).unwrap();
    assert!(scratch.run().unwrap(), "the second output is gone");
    scratch.job.steps[0].arguments.push("-no-such-option".into());
    scratch.run().unwrap_err();
}

#[test]
fn a_failed_compilation_is_tried_again() {
    let scratch = Scratch::new();
    assert!(scratch.run().unwrap());
    fs::write(scratch.at("value.h"), "#define VALUE wrong\n").unwrap();
    scratch.age();
    for _ in 0..2 {
        let text = scratch.run().unwrap_err();
        assert!(text.contains("value.h:1"), "{text}");
    }
    fs::write(scratch.at("value.h"), "#define VALUE 1\n").unwrap();
    scratch.age();
    assert!(scratch.run().unwrap(), "mended, though the old output was of the same text");
    fs::remove_file(scratch.at("value.h")).unwrap();
    scratch.run().unwrap_err();
}

#[test]
fn a_missing_compiler_is_named() {
    let mut scratch = Scratch::new();
    scratch.job.program = "/nowhere/c++".into();
    let text = scratch.run().unwrap_err();
    assert!(text.contains("cannot run /nowhere/c++"), "{text}");
}

#[test]
fn ptx_says_how_many_parameters_a_kernel_has_and_whether_it_waits() {
    let text = ".version 9.0\n.target sm_80\n\t// .globl\tadd_bf16\n\
                .visible .entry add_bf16(\n\t.param .u64 .ptr .align 1 add_bf16_param_0,\n\t.param .align 4 .b8 \
                add_bf16_param_1[16],\n\t.param .u32 add_bf16_param_2\n)\n.maxntid 256\n{\n\
                \tgriddepcontrol.launch_dependents;\n\tgriddepcontrol.wait;\n\tld.param.b64 \t%rd1, \
                [add_bf16_param_0];\n}\n.entry advance()\n{\n\tgriddepcontrol.launch_dependents;\n\tret;\n}\n";
    let found: Vec<(String, ptx::Entry)> = ptx::entries(text).unwrap().into_iter().collect();
    let entry = |name: &str, parameters, waits| (name.to_owned(), ptx::Entry { parameters, waits });
    assert_eq!(found, [entry("add_bf16", 3, true), entry("advance", 0, false)]);
    assert!(ptx::entries(".entry add_bf16(.param .u64 x").unwrap_err().contains("add_bf16"));
    assert!(ptx::entries("nothing").unwrap().is_empty());
}
