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

/// A file of tensors of one value each shape says, all 0.
fn zeros(path: &Path, tensors: &[(&str, &[usize])]) {
    let most = tensors.iter().map(|(_, shape)| shape.iter().product::<usize>()).max().unwrap_or(0);
    let data = vec![0; most];
    let view = |shape: &[usize]| {
        let count = shape.iter().product::<usize>();
        TensorView::new(safetensors::Dtype::F8_E4M3, shape.to_vec(), &data[..count]).expect("a tensor")
    };
    let tensors = tensors.iter().map(|(key, shape)| (key.to_string(), view(shape)));
    std::fs::write(path, safetensors::serialize(tensors, None).expect("serializes")).expect("writes");
}

/// Each by keys of its published files.
#[test]
fn what_is_no_stable_diffusion_is_named() {
    const UNET: &str = "model.diffusion_model.input_blocks.0.0.weight";
    const CLIP: &str = "cond_stage_model.transformer.text_model.final_layer_norm.bias";
    const OPENCLIP: &str = "cond_stage_model.model.ln_final.bias";
    const SDXL: &str = "conditioner.embedders.1.model.ln_final.bias";
    const REFINER: &str = "conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias";
    let unet = (UNET, &[320, 4, 3, 3][..]);
    let one = &[1][..];
    type Keys<'a> = &'a [(&'a str, &'a [usize])];
    let cases: &[(Keys, &str)] = &[
        (&[(UNET, &[384, 4, 3, 3]), (REFINER, one)], "is the SDXL refiner, which is not supported; use the base model"),
        (&[unet, (REFINER, one)], "is the SDXL refiner"),
        (&[(UNET, &[320, 9, 3, 3]), (CLIP, one)], "is an inpainting model, which is not supported"),
        (&[(UNET, &[320, 9, 3, 3]), (SDXL, one)], "is an inpainting model"),
        (&[(UNET, &[320, 8, 3, 3]), (CLIP, one)], "InstructPix2Pix"),
        (&[(UNET, &[320, 5, 3, 3]), (OPENCLIP, one)], "reads depth"),
        (&[(UNET, &[256, 7, 3, 3]), (OPENCLIP, one)], "is an upscaler"),
        (&[unet, (OPENCLIP, one), ("model.diffusion_model.label_emb.0.0.weight", one)], "is Stable unCLIP"),
        (&[unet, (SDXL, one), ("edm_mean", one)], "is Playground 2.5"),
        (&[unet, (SDXL, one), ("edm_vpred.sigma_max", one)], "is CosXL"),
        (
            &[(UNET, &[320, 8, 3, 3]), ("model.diffusion_model.input_blocks.1.0.time_stack.in_layers.0.bias", one)],
            "is Stable Video Diffusion",
        ),
        (&[unet], "is a UNet alone, or with a VAE; it has no text encoder"),
        (&[("model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias", one)], "Stable Diffusion 3"),
        (&[("joint_blocks.37.x_block.mlp.fc1.weight", one)], "is Stable Diffusion 3"),
        (&[("transformer_blocks.0.norm1_context.linear.bias", one)], "is Stable Diffusion 3"),
        (&[("double_blocks.0.img_attn.norm.key_norm.scale", one)], "is FLUX"),
        (&[("model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale", one)], "is FLUX"),
        (&[("single_transformer_blocks.0.norm.linear.bias", one)], "is FLUX"),
        (&[("transformer_blocks.0.scale_shift_table", one), ("adaln_single.linear.bias", one)], "is PixArt"),
        (&[("y_embedder.y_proj.fc1.bias", one), ("t_block.1.bias", one)], "is PixArt"),
        (&[("clip_txt_mapper.weight", one)], "is Stable Cascade"),
        (&[("down_blocks.1.0.channelwise.0.weight", one)], "is Stable Cascade"),
        (&[("double_layers.0.attn.w2q.weight", one)], "is AuraFlow"),
        (&[("patchify_proj.weight", one), ("adaln_single.x", one), ("transformer_blocks.27.x", one)], "is LTX-Video"),
        (&[("blocks.0.attn.qkv_x.weight", one)], "is Mochi"),
        (&[("txt_in.individual_token_refiner.blocks.0.x", one), ("double_blocks.0.x", one)], "is HunyuanVideo"),
        (
            &[("down_blocks.0.motion_modules.0.temporal_transformer.norm.bias", one)],
            "is a motion module of AnimateDiff",
        ),
        (&[("control_model.time_embed.0.weight", one)], "is a ControlNet alone, not a whole model"),
        (&[("controlnet_cond_embedding.conv_in.weight", one), ("conv_in.weight", one)], "is a ControlNet alone"),
        (&[("first_stage_model.decoder.conv_in.bias", one)], "is a VAE alone"),
        (&[("decoder.mid.attn_1.q.bias", one), ("encoder.mid.attn_1.q.bias", one)], "is a VAE alone"),
        (&[("decoder.mid_block.resnets.0.x", one), ("encoder.mid_block.resnets.0.x", one)], "is a VAE alone"),
        (&[("mid_block.resnets.0.conv1.bias", one), ("conv_in.bias", one)], "is a UNet alone"),
        (&[("text_model.encoder.layers.0.self_attn.q_proj.bias", one)], "is a text encoder alone"),
        (&[("lora_unet_mid_block.lora_up.weight", one)], "is a LoRA, not a model: give it beside a model"),
        (&[("unet.mid_block.attentions.0.proj_in.lora_A.weight", one)], "is a LoRA, not a model"),
        (&[("lora_unet_x.hada_w1_a", one)], "is a LoRA"),
        (&[("image_proj.proj.bias", one), ("ip_adapter.1.to_k_ip.weight", one)], "is an IP-Adapter"),
        (&[("emb_params", one)], "is a file of textual inversion, not a model: give it beside a model"),
        (&[("clip_g", one), ("clip_l", one)], "is a file of textual inversion"),
        (&[("something.weight", one)], "is no Stable Diffusion checkpoint"),
    ];
    let place = tempfile::tempdir().expect("a folder");
    let path = place.path().join("it.safetensors");
    for (tensors, wanted) in cases {
        zeros(&path, tensors);
        let message = SingleFile::open(&path).expect_err(wanted).to_string();
        assert!(message.contains("it.safetensors") && message.contains(wanted), "{wanted} in: {message}");
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
    assert_eq!(adapters.finish(&[]).expect("keys match"), []);
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
    let wanted = "warning: style.safetensors: no part of the model uses 1 tensor: lora_unet_elsewhere.lora_up.weight";
    assert_eq!(messages.matches(wanted).count(), 1, "{messages}");
    let run = std::fs::read_to_string(place.path().join("pictures/run.json")).expect("a description");
    let run: serde_json::Value = serde_json::from_str(&run).expect("JSON");
    let digest = &blake3::hash(&written).to_hex()[..16];
    assert_eq!(run["loras"], serde_json::json!([{"name": "style", "weight": "0.5", "digest": digest}]));
}
