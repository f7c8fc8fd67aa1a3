//! Single-file checkpoints and adapters against the directory form and PyTorch's sums (tools/oracle/single_file.py, whose
//! files diffusers' own conversion has read back).

use std::path::{Path, PathBuf};

use megafuse::models::single_file::open_vae;
use megafuse::models::{Adapters, Family, Part, SingleFile, WeightStore};
use megafuse::pipeline::{self, Lora, ModelSource, Pipeline, Plain, Request, Silent, Size};
use megafuse::text::{ClipTokenizer, ClipVocabulary, TokenizerFiles};
use megafuse::{DType, Device};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

fn directory(model: &str, part: Part) -> WeightStore {
    let stem = if matches!(part, Part::Unet | Part::Vae) { "diffusion_pytorch_model" } else { "model" };
    let folder = data(model).join(part.folder());
    WeightStore::open(&folder, stem, &Device::cpu(), DType::F32).expect("a test model")
}

fn values(store: &WeightStore, key: &str, shape: &[usize]) -> Vec<f32> {
    store.root().tensor(key, shape).expect("loads").to_f32_vec().expect("cpu")
}

/// One name for both spellings of text encoders and of VAE attentions.
fn modern(key: &str) -> String {
    let key = key.strip_prefix("text_model.").unwrap_or(key);
    [(".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0.")]
        .iter()
        .fold(key.to_string(), |key, (old, new)| key.replace(old, new))
}

fn shapes(store: &WeightStore) -> Vec<(String, String, Vec<usize>)> {
    let mut list: Vec<_> = store.tensors().map(|(key, shape)| (modern(key), key.to_string(), shape.to_vec())).collect();
    list.retain(|(name, ..)| !name.ends_with("position_ids"));
    list.sort();
    list
}

/// Every tensor, both ways.
fn assert_same(one: &WeightStore, other: &WeightStore, what: &str) {
    let (a, b) = (shapes(one), shapes(other));
    let names = |list: &[(String, String, Vec<usize>)]| list.iter().map(|(name, ..)| name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&a), names(&b), "{what}");
    for ((name, key, shape), (_, other_key, other_shape)) in a.iter().zip(&b) {
        assert_eq!(values(one, key, shape), values(other, other_key, other_shape), "{what}: {name}");
    }
}

#[test]
fn a_single_file_holds_what_the_directory_holds() {
    for (model, family) in [("sd15", Family::Sd1), ("sd21", Family::Sd2), ("sdxl", Family::Sdxl)] {
        let file = SingleFile::open(&data(&format!("single-file/{model}.safetensors"))).expect("opens");
        assert_eq!((file.family(), file.unused()), (family, &[][..]));
        for &part in file.part_list() {
            let store = file.store(part, &Device::cpu(), DType::F32).expect("has the part");
            assert_same(&store, &directory(model, part), &format!("{model} {}", part.folder()));
        }
        let vae = open_vae(&data(&format!("single-file/{model}.safetensors")), &Device::cpu(), DType::F32);
        assert_same(&vae.expect("has a VAE"), &directory(model, Part::Vae), model);
    }
}

#[test]
fn the_built_in_vocabulary_gives_the_published_ids() {
    let vocabulary = ClipVocabulary::published();
    let files = TokenizerFiles {
        vocab: Some(&vocabulary.vocab),
        merges: Some(&vocabulary.merges),
        ..TokenizerFiles::default()
    };
    let tokenizer = ClipTokenizer::from_bytes(Path::new("built-in"), &files).expect("a good vocabulary");
    let encoding = tokenizer.encode("a photo of a cat").expect("encodes");
    assert_eq!(encoding.ids[..7], [49406, 320, 1125, 539, 320, 2368, 49407]);
}

/// The merged tensors within rounding of f32, and every other tensor as it was.
fn assert_merged(adapter: &str, want: &str, parts: &[Part]) {
    let path = data(&format!("single-file/lora-{adapter}.safetensors"));
    let adapters = Adapters::open(&[(path, 1.0)]).expect("opens");
    let folder = data("single-file");
    let want = WeightStore::open(&folder, want, &Device::cpu(), DType::F32).expect("PyTorch's sums");
    let mut compared = 0;
    for &part in parts {
        let (plain, merged) = (directory("sd15", part), directory("sd15", part));
        let merged = merged.with_adapters(part, &adapters).expect("fits");
        for (name, key, shape) in shapes(&plain) {
            let got = values(&merged, &key, &shape);
            let expected = format!("{}/{name}", part.folder());
            if want.contains(&expected) {
                compared += 1;
                for (got, want) in got.iter().zip(values(&want, &expected, &shape)) {
                    assert!(
                        (got - want).abs() <= 2e-6 * (1.0 + want.abs()),
                        "{adapter} {name}: {got}, expected {want}"
                    );
                }
            } else {
                assert_eq!(got, values(&plain, &key, &shape), "{adapter} {name}");
            }
        }
    }
    assert_eq!(compared, want.tensors().count(), "{adapter}");
    assert_eq!(adapters.finish().expect("keys match"), []);
}

#[test]
fn three_dialects_of_a_lora_give_the_same_weights() {
    for dialect in ["kohya", "old-diffusers", "peft"] {
        assert_merged(dialect, "lora-merged", &[Part::TextEncoder, Part::Unet]);
    }
}

#[test]
fn dora_loha_lokr_and_convolutions_under_ldm_names() {
    assert_merged("relatives", "lora-merged-relatives", &[Part::Unet]);
}

/// The single file of a small model, which is of no published size: the directory's configurations and tokenizers go into
/// its metadata.
fn described_file(model: &str, to: &Path) -> ModelSource {
    let bytes = std::fs::read(data(&format!("single-file/{model}.safetensors"))).expect("a test file");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let mut metadata = std::collections::HashMap::new();
    for folder in ["", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae", "scheduler"] {
        for file in std::fs::read_dir(data(model).join(folder)).into_iter().flatten().flatten() {
            let name = file.file_name().to_string_lossy().into_owned();
            if !name.starts_with("oracle") && (name.ends_with(".json") || name.ends_with(".txt")) {
                let key = if folder.is_empty() { name } else { format!("{folder}/{name}") };
                metadata.insert(key, std::fs::read_to_string(file.path()).expect("text"));
            }
        }
    }
    let path = to.join(format!("{model}.safetensors"));
    std::fs::write(&path, safetensors::serialize(file.tensors(), Some(metadata)).expect("serializes")).expect("writes");
    let source = ModelSource::at(&path);
    assert_eq!(source, ModelSource::File(path));
    source
}

fn request() -> Request {
    let (method, size) = (Plain {}.into(), Some(Size::new(32, 32)));
    Request { prompt: "a cat".into(), method, size, steps: Some(3), guidance: 3.0, ..Request::default() }
}

fn picture(source: &ModelSource) -> pipeline::Picture {
    let pipeline = Pipeline::load(source.clone(), Device::cpu(), DType::F32).expect("loads");
    assert_eq!(pipeline.warnings(), &[] as &[String]);
    pipeline.generate(&request(), &mut Silent).expect("makes a picture").remove(0)
}

#[test]
fn a_single_file_makes_the_picture_of_its_directory() {
    let place = tempfile::tempdir().expect("a folder");
    for model in ["sd15", "sd21", "sdxl"] {
        let (file, folder) = (described_file(model, place.path()), ModelSource::Directory(data(model)));
        let picture_of_file = picture(&file);
        assert_eq!(picture_of_file.rgb, picture(&folder).rgb, "{model}");
        assert_eq!(picture_of_file.parameters.json["model"], model);
        let plan = |source| pipeline::plan(source, DType::BF16, &request()).expect("plans");
        assert_eq!(plan(&file), plan(&folder), "{model}");
    }
}

#[test]
fn published_single_files_are_planned_without_configurations() {
    // The small sd15 has the keys of the published one; only plans ask for no weights.
    let source = ModelSource::File(data("single-file/sd15.safetensors"));
    let plan = pipeline::plan(&source, DType::F16, &Request::default()).expect("plans");
    let parameters = plan.weights.iter().map(|part| (part.module, part.parameters)).collect::<Vec<_>>();
    // Published counts of runwayml/stable-diffusion-v1-5.
    assert_eq!(parameters, [("text_encoder", 123_060_480), ("unet", 859_520_964), ("vae", 83_653_863)]);
}

/// A copy of sd15 whose tensors are PyTorch's merged ones.
fn merged_directory(to: &Path) -> ModelSource {
    let bytes = std::fs::read(data("single-file/lora-merged.safetensors")).expect("PyTorch's sums");
    let merged = SafeTensors::deserialize(&bytes).expect("safetensors");
    for folder in ["text_encoder", "tokenizer", "unet", "vae", "scheduler"] {
        std::fs::create_dir_all(to.join(folder)).expect("a folder");
        for file in std::fs::read_dir(data("sd15").join(folder)).expect("a folder").flatten() {
            let bytes = std::fs::read(file.path()).expect("a file");
            let path = to.join(folder).join(file.file_name());
            if path.extension().is_none_or(|end| end != "safetensors") {
                std::fs::write(path, bytes).expect("writes");
                continue;
            }
            let own = SafeTensors::deserialize(&bytes).expect("safetensors");
            let tensors: Vec<(String, TensorView)> = own
                .tensors()
                .into_iter()
                .map(|(key, view)| match merged.tensor(&format!("{folder}/{}", modern(&key))) {
                    Ok(sum) => (key, sum),
                    Err(_) => (key, view),
                })
                .collect();
            std::fs::write(path, safetensors::serialize(tensors, None).expect("serializes")).expect("writes");
        }
    }
    ModelSource::Directory(to.to_path_buf())
}

#[test]
fn a_lora_makes_the_picture_of_the_merged_weights_and_is_named_in_it() {
    let place = tempfile::tempdir().expect("a folder");
    let sd15 = || ModelSource::Directory(data("sd15"));
    let with = |weight| {
        let path = data("single-file/lora-kohya.safetensors");
        picture(&sd15().with(vec![Lora { path, weight }], Vec::new(), None))
    };
    let distance = |a: &[u8], b: &[u8]| a.iter().zip(b).map(|(a, b)| a.abs_diff(*b)).max().unwrap_or(0);
    let (plain, merged, full) = (picture(&sd15()), picture(&merged_directory(place.path())), with(1.0));
    assert!(distance(&full.rgb, &merged.rgb) <= 1, "rounding of f32 alone");
    assert!(distance(&plain.rgb, &merged.rgb) > 8, "the LoRA must show");
    assert!(distance(&with(0.5).rgb, &plain.rgb) > 4);
    assert_eq!(with(0.0).rgb, plain.rgb);
    assert!(full.parameters.text.contains("Lora: \"lora-kohya:1\""), "{}", full.parameters.text);
    assert_eq!(full.parameters.json["loras"], serde_json::json!([{"name": "lora-kohya", "weight": 1.0}]));
    assert_eq!(plain.parameters.json.get("loras"), None);
}

#[test]
fn the_weights_of_another_vae_stand_for_the_models_own() {
    let own = ModelSource::Directory(data("sd15"));
    let file = data("single-file/sd15.safetensors");
    let same = picture(&own.clone().with(Vec::new(), Vec::new(), Some(file)));
    assert_eq!(same.rgb, picture(&own).rgb);
    assert_eq!(same.parameters.json["vae"], "sd15");
    // One value of the decoder's last bias moves a colour everywhere.
    let place = tempfile::tempdir().expect("a folder");
    let path = place.path().join("other.safetensors");
    let bytes = std::fs::read(data("sd15/vae/diffusion_pytorch_model.safetensors")).expect("a VAE");
    let vae = SafeTensors::deserialize(&bytes).expect("safetensors");
    let red = [1f32, 0.0, 0.0].map(f32::to_le_bytes).concat();
    let red = TensorView::new(safetensors::Dtype::F32, vec![3], &red).expect("a tensor");
    let tensors = vae.tensors().into_iter();
    let tensors =
        tensors.map(|(key, view)| if key == "decoder.conv_out.bias" { (key, red.clone()) } else { (key, view) });
    std::fs::write(&path, safetensors::serialize(tensors, None).expect("serializes")).expect("writes");
    assert_ne!(picture(&own.clone().with(Vec::new(), Vec::new(), Some(path))).rgb, picture(&own).rgb);
}

#[test]
fn the_command_line_warns_of_unused_keys_and_describes_loras_in_run_json() {
    let place = tempfile::tempdir().expect("a folder");
    // The second key is for a module that sd15 does not have.
    let bytes = std::fs::read(data("single-file/lora-kohya.safetensors")).expect("a LoRA");
    let lora = SafeTensors::deserialize(&bytes).expect("safetensors");
    let mut tensors: Vec<(String, TensorView)> = lora.tensors();
    let extra = tensors[0].1.clone();
    tensors.push(("lora_unet_elsewhere.lora_up.weight".into(), extra));
    let path = place.path().join("style.safetensors");
    let written = safetensors::serialize(tensors, None).expect("serializes");
    std::fs::write(&path, &written).expect("writes");
    std::fs::write(place.path().join("prompts.jsonl"), "{\"prompt\": \"a cat\"}\n").expect("writes");
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_megafuse"))
        .current_dir(place.path())
        .args(["generate", "--manifest", "prompts.jsonl", "--out", "pictures", "--method", "plain", "--size", "32x32"])
        .args(["--steps", "1", "--device", "cpu", "--lora", "style.safetensors:0.5", "--model"])
        .arg(data("sd15"))
        .output()
        .expect("runs");
    let messages = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{messages}");
    let wanted = "warning: style.safetensors: no part of the model uses 1 tensors: lora_unet_elsewhere.lora_up.weight";
    assert_eq!(messages.matches(wanted).count(), 1, "{messages}");
    let run = std::fs::read_to_string(place.path().join("pictures/run.json")).expect("a description");
    let run: serde_json::Value = serde_json::from_str(&run).expect("JSON");
    let digest = &blake3::hash(&written).to_hex()[..16];
    assert_eq!(run["loras"], serde_json::json!([{"name": "style", "weight": "0.5", "digest": digest}]));
}
