//! Stable Diffusion 3 and 3.5 in small: whole runs, and what the transformer is told (tools/oracle/sd3.py).

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::process::Command;

use megafuse::models::{Family, SingleFile};
use megafuse::rng::{Rng, RngKind};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

use crate::drawn;
use crate::files::{self, Array, Arrays, all_passed, compare, data, megafuse};
use crate::modules::TOLERANCE;
use crate::runs::{Run, check_half, check_in, generate, listed};
use crate::skip;

const FOLDER: &str = "sd3";
const EMU: [&str; 4] = ["--device", "emu", "--dtype", "f32"];

fn run(name: &str) -> Run {
    listed("sd3/runs.json", &["runs"], |other| other == name).remove(0)
}

#[test]
fn whole_runs() {
    let runs = listed("sd3/runs.json", &["runs"], |_| true);
    assert_eq!(runs.len(), 8);
    all_passed(runs.iter().map(|run| check_in(FOLDER, run, &[])).collect());
}

/// One run of each kind on the emulated card, whose kernels are those of a card.
#[test]
fn whole_runs_on_the_emulated_card() {
    if !skip::has_emulated_card() {
        return;
    }
    let some = ["plain-negative", "mega-3.5", "mega-dual"];
    let runs = listed("sd3/runs.json", &["runs"], |name| some.contains(&name));
    assert_eq!(runs.len(), some.len());
    all_passed(runs.iter().map(|run| check_in(FOLDER, run, &EMU)).collect());
}

#[test]
fn in_half_precision() {
    if skip::has_emulated_card() {
        all_passed(vec![check_half(FOLDER, &run("plain"))]);
    }
}

/// The second picture's steps are replays, in the memory of the first one's: from another seed, or of another prompt.
#[test]
fn second_pictures_on_the_emulated_card() {
    if !skip::has_emulated_card() {
        return;
    }
    let at = |run: &Run, flag: &str| 1 + run.args.iter().position(|arg| arg == flag).expect("a flag of the run");
    for name in ["plain", "mega-3.5", "mega-dual"] {
        let (folder, mut run) = (tempfile::tempdir().unwrap(), run(name));
        let dump = |name: &str| Arrays::read(folder.path().join(name)).0;
        let seed = at(&run, "--seed");
        generate(folder.path(), &run, &[&EMU[..], &["--count", "2"]].concat()).unwrap();
        run.args[seed] = (run.args[seed].parse::<u64>().unwrap() + 1).to_string();
        generate(folder.path(), &run, &EMU).unwrap();
        assert!(dump("dump-2.safetensors") == dump("dump.safetensors"), "{name}");
    }
    for name in ["plain", "mega-3.5"] {
        let (folder, mut run) = (tempfile::tempdir().unwrap(), run(name));
        let path = |name: &str| folder.path().join(name).display().to_string();
        let prompts = ["a photo of a cat", "an old house by the sea, oil on canvas"];
        let line = |id: usize| serde_json::json!({"id": id.to_string(), "prompt": prompts[id], "seed": 7}).to_string();
        let lines = [0, 1].map(line);
        std::fs::write(path("lines.jsonl"), lines.join("\n")).unwrap();
        let seed = at(&run, "--seed");
        run.args[seed] = "7".into();
        let flags = run.args[1..].iter().map(String::as_str).enumerate();
        let flags: Vec<&str> = flags.filter(|(i, _)| ![seed - 2, seed - 1].contains(i)).map(|(_, flag)| flag).collect();
        let model = drawn::folder(&run.model).display().to_string();
        let files = ["--manifest", &path("lines.jsonl"), "--out", &path("made"), "--model", &model];
        megafuse(&[&["generate"], &flags[..], &files, &EMU].concat()).unwrap();
        for (i, prompt) in prompts.iter().enumerate() {
            run.args[0] = prompt.to_string();
            generate(folder.path(), &run, &EMU).unwrap();
            let read = |name: &str| std::fs::read(folder.path().join(name)).unwrap();
            assert!(read(&format!("made/{i}.png")) == read("out.png"), "{name}: {prompt}");
        }
    }
}

/// Shape and bytes of a tensor.
type Stored = (Vec<usize>, Vec<u8>);

/// The small model in one file, under the names that the oracle's ldm.json says. What a file of these names is taken for is a published
/// model, so that the metadata has the configurations and the tokenizers.
fn single_file(model: &str, to: &Path) {
    let folder = drawn::folder(&format!("{FOLDER}/{model}"));
    let names = files::json(format!("{FOLDER}/{model}/ldm.json"));
    let mut tensors: BTreeMap<String, Stored> = BTreeMap::new();
    let mut thirds: BTreeMap<String, [Option<Stored>; 3]> = BTreeMap::new();
    for (part, prefix) in [("transformer", "model.diffusion_model."), ("vae", "first_stage_model.")] {
        let bytes = std::fs::read(folder.join(part).join("diffusion_pytorch_model.safetensors")).unwrap();
        let drawn = SafeTensors::deserialize(&bytes).unwrap();
        let described = files::json(format!("{FOLDER}/{model}/{part}/diffusion_pytorch_model.drawn.json"));
        let (described, names) = (described["tensors"].as_array().unwrap(), names[part].as_array().unwrap());
        assert_eq!(described.len(), names.len());
        for (tensor, name) in described.iter().zip(names) {
            let view = drawn.tensor(tensor[0].as_str().unwrap()).unwrap();
            let (mut shape, mut bytes) = (view.shape().to_vec(), view.data().to_vec());
            // Products of one pixel were convolutions.
            if name.as_str().is_some_and(|name| name.contains(".attn_1.")) && shape.len() == 2 {
                shape.extend([1, 1]);
            }
            let key = format!("{prefix}{}", name.as_str().or(name[0].as_str()).unwrap());
            if let Some(third) = name[1].as_u64() {
                let before = thirds.entry(key).or_default()[third as usize].replace((shape, bytes));
                assert!(before.is_none());
                continue;
            }
            if name[1] == "swapped" {
                let half = bytes.len() / 2;
                bytes.rotate_left(half);
            }
            assert!(tensors.insert(key, (shape, bytes)).is_none());
        }
    }
    for (key, parts) in thirds {
        let (shapes, parts): (Vec<_>, Vec<_>) = parts.map(|part| part.expect("all thirds")).into_iter().unzip();
        let mut shape = shapes[0].clone();
        shape[0] *= 3;
        tensors.insert(key, (shape, parts.concat()));
    }
    for (part, name) in [("text_encoder", "clip_l"), ("text_encoder_2", "clip_g")] {
        let bytes = std::fs::read(folder.join(part).join("model.safetensors")).unwrap();
        for (key, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            let key = format!("text_encoders.{name}.transformer.{key}");
            tensors.insert(key, (view.shape().to_vec(), view.data().to_vec()));
        }
    }
    let mut metadata = HashMap::new();
    for part in std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()) {
        for file in std::fs::read_dir(&part).unwrap().map(|entry| entry.unwrap().path()) {
            if file.extension().is_some_and(|end| end == "json" || end == "txt") {
                let name = file.strip_prefix(&folder).unwrap().display().to_string();
                metadata.insert(name, std::fs::read_to_string(&file).unwrap());
            }
        }
    }
    let views = tensors.iter().map(|(key, (shape, bytes))| {
        (key, TensorView::new(Dtype::F32, shape.clone(), bytes).expect("values fill the shape"))
    });
    std::fs::write(to, safetensors::serialize(views, Some(metadata)).unwrap()).unwrap();
}

/// Weights of a transformer, a VAE and two text encoders by value: what they make is what the stored run has.
#[test]
fn a_single_file_makes_the_run_of_its_directory() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("medium-3.5.safetensors");
    single_file("medium-3.5", &path);
    let file = SingleFile::open(&path).unwrap();
    assert_eq!((file.family(), file.unused()), (Family::Sd35, &[][..]));
    let mut run = run("plain-3.5");
    run.model = path.display().to_string();
    all_passed(vec![check_in(FOLDER, &run, &[])]);
}

/// The velocity of the first step, from the seed's noise to the stored sample, which Euler's step multiplies by the difference of the
/// sigmas.
#[test]
fn a_step_of_the_transformer() {
    let (folder, run) = (tempfile::tempdir().unwrap(), run("plain-3.5"));
    let path = |name: &str| folder.path().join(name).display().to_string();
    let want = Arrays::read(data(format!("{FOLDER}/{}.safetensors", run.name)));
    let mut text = Arrays::read(data(format!("{FOLDER}/{}-text.safetensors", run.name)));
    // What is cut off of the rows are the zeros of the missing T5.
    let embeds = text.0.get_mut("prompt_embeds").expect("prompt_embeds");
    let (rows, width) = (16 + 77, embeds.shape[2]);
    embeds.shape[1] = rows;
    embeds.values.resize(rows * width, 0.0);
    let (sigmas, timesteps) = (&want.get("sigmas").values, &want.get("timesteps").values);
    let after = want.get("step1");
    let noise = Rng::new(RngKind::TorchCpu, 2).normal(after.values.len());
    let before = Array { shape: after.shape.clone(), values: noise };
    let differences = after.values.iter().zip(&before.values).map(|(after, before)| after - before);
    let velocity = differences.map(|difference| difference / (sigmas[1] - sigmas[0])).collect();
    let velocity = Array { shape: before.shape.clone(), values: velocity };
    let inputs = [
        ("sample", before),
        ("timestep", Array { shape: vec![1], values: vec![timesteps[0]] }),
        ("prompt_embeds", text.get("prompt_embeds").clone()),
        ("pooled_prompt_embeds", text.get("pooled_prompt_embeds").clone()),
    ];
    files::write(&folder.path().join("in.safetensors"), &inputs);
    let model = drawn::folder(&run.model).display().to_string();
    let own = ["--model", &model, "--in", &path("in.safetensors"), "--out", &path("out.safetensors")];
    megafuse(&[&["probe", "--module", "transformer", "--device", "cpu"], &own[..]].concat()).unwrap();
    let got = Arrays::read(path("out.safetensors"));
    compare("plain-3.5 out", got.get("out"), &velocity, TOLERANCE).unwrap();
}

#[test]
fn text_of_three_encoders() {
    let of = |name: &str, model: &str, prompt: &str| {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out.safetensors").display().to_string();
        let model = drawn::folder(&format!("sd3/{model}")).display().to_string();
        let args = ["probe", "--model", &model, "--module", "text", "--dtype", "f32", "--device", "cpu", "--out", &out];
        megafuse(&[&args[..], &["--prompt", prompt]].concat())?;
        let (mut got, want) = (Arrays::read(&out), Arrays::read(data(format!("sd3/{name}-text.safetensors"))));
        // Of the tokens the first 40 are stored: those of CLIP, and the first of T5.
        let embeds = got.0.get_mut("prompt_embeds").expect("the embeddings");
        let [_, _, width] = embeds.shape[..] else { panic!("{:?}", embeds.shape) };
        embeds.shape[1] = 40;
        embeds.values.truncate(40 * width);
        let both = ["prompt_embeds", "pooled_prompt_embeds"];
        both.iter().try_for_each(|key| compare(&format!("{name}: {key}"), got.get(key), want.get(key), TOLERANCE))
    };
    all_passed(vec![
        of("plain", "medium", "a photo of a cat"),
        of("plain-3.5", "medium-3.5", "a photo of a cat"),
        of("plain-negative", "large", "a photo of a cat"),
    ]);
}

/// What is said of a model without T5, once.
#[test]
fn a_missing_t5_is_said() {
    let place = tempfile::tempdir().unwrap();
    let model = drawn::folder("sd3/dual").display().to_string();
    let mut command = Command::new(env!("CARGO_BIN_EXE_megafuse"));
    let args = [
        "generate", "a cat", "--model", &model, "--method", "plain", "--size", "16x16", "--steps", "1", "--device",
        "cpu",
    ];
    let output = command.current_dir(place.path()).args(args).args(["--count", "2"]).output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}");
    assert_eq!(told.matches("the model has no T5 text encoder").count(), 1, "{told}");
}
