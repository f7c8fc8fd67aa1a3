//! Single-file checkpoints and adapters against the directory form and PyTorch's sums (tools/oracle/single_file.py, whose
//! files diffusers' own conversion has read back).

use std::path::{Path, PathBuf};

use megafuse::models::single_file::open_vae;
use megafuse::models::{Adapters, Family, Part, SingleFile, WeightStore};
use megafuse::text::{ClipTokenizer, ClipVocabulary, TokenizerFiles};
use megafuse::{DType, Device};

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
    for (model, family) in [("sd15", Family::Sd1), ("sd21", Family::Sd2)] {
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
