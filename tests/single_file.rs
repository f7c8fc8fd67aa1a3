//! Single-file checkpoints and adapters against the directory form and PyTorch's sums (tools/oracle/single_file.py, whose
//! files diffusers' own conversion has read back).

#[path = "common/drawn.rs"]
mod drawn;
#[path = "common/torch_file.rs"]
mod torch_file;

use std::path::{Path, PathBuf};

use megafuse::models::single_file::{open_vae, published_config};
use megafuse::models::{
    Adapters, ClipTextConfig, ClipTextModel, Family, Mmdit, MmditConfig, Part, SingleFile, T5Config, T5Encoder, Unet,
    UnetConfig, Vae, VaeConfig, WeightStore,
};
use megafuse::pipeline::{self, InitImage, InputPicture, Lora, ModelSource, Pipeline, Plain, Request, Silent, Size};
use megafuse::schedulers::{Sampler, SchedulerConfig};
use megafuse::text::{ClipTokenizer, ClipVocabulary, TokenizerFiles};
use megafuse::{DType, Device};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

fn directory(model: &str, part: Part) -> WeightStore {
    let stem = if matches!(part, Part::Unet | Part::Vae) { "diffusion_pytorch_model" } else { "model" };
    let folder = drawn::folder(model).join(part.folder());
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
        for part in file.part_list() {
            let store = file.store(part, &Device::cpu(), DType::F32).expect("has the part");
            assert_same(&store, &directory(model, part), &format!("{model} {}", part.folder()));
        }
        let vae = open_vae(&data(&format!("single-file/{model}.safetensors")), &Device::cpu(), DType::F32);
        assert_same(&vae.expect("has a VAE"), &directory(model, Part::Vae), model);
    }
}

/// The same tensors as a `.ckpt`, of which the training that it is of tells how SD 2.x predicts.
#[test]
fn a_checkpoint_of_torch_holds_what_the_directory_holds() {
    let place = tempfile::tempdir().expect("a folder");
    let path = place.path().join("it.ckpt");
    for (model, steps, prediction) in
        [("sd15", 7, "epsilon"), ("sd21", 875_000, "epsilon"), ("sd21", 7, "v_prediction")]
    {
        let stored = data(&format!("single-file/{model}.safetensors"));
        std::fs::write(&path, torch_file::checkpoint(&stored, steps, &[])).expect("writes");
        let file = SingleFile::open(&path).expect("opens");
        assert_eq!(file.unused(), &[] as &[String]);
        assert!(file.config("scheduler/scheduler_config.json").expect("published").contains(prediction), "{model}");
        for part in file.part_list() {
            let store = file.store(part, &Device::cpu(), DType::F32).expect("has the part");
            assert_same(&store, &directory(model, part), &format!("{model} {}", part.folder()));
        }
        let vae = open_vae(&path, &Device::cpu(), DType::F32);
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
    type Tensors<'a> = &'a [(&'a str, &'a [usize])];
    let cases: &[(Tensors, &str)] = &[
        (&[(UNET, &[384, 4, 3, 3]), (REFINER, one)], "is the SDXL refiner, which is not supported; use the base model"),
        (&[unet, (REFINER, one)], "is the SDXL refiner"),
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
        (&[("joint_blocks.37.x_block.mlp.fc1.weight", one)], "is the transformer of a Stable Diffusion 3 alone"),
        (
            &[("transformer_blocks.0.norm1_context.linear.bias", one)],
            "is the transformer of a Stable Diffusion 3 alone",
        ),
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
    let path = match adapter.ends_with(".pt") {
        true => data(&format!("pickles/lora-{adapter}")),
        false => data(&format!("single-file/lora-{adapter}.safetensors")),
    };
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
    for dialect in ["kohya", "old-diffusers", "peft", "kohya.pt"] {
        assert_merged(dialect, "lora-merged", &[Part::TextEncoder, Part::Unet]);
    }
}

/// `lora_adapter_metadata` of diffusers: per part alpha, `alpha_pattern`, ranks of their own, `use_rslora`.
#[test]
fn alphas_by_pattern_in_the_metadata() {
    assert_merged("patterns", "lora-patterns-merged", &[Part::TextEncoder, Part::Unet]);
}

#[test]
fn dora_loha_lokr_and_convolutions_under_ldm_names() {
    assert_merged("relatives", "lora-merged-relatives", &[Part::Unet]);
}

/// The single file of a small model, which is of no published size: the directory's configurations and tokenizers go into
/// its metadata.
fn described_file(model: &str, to: &Path) -> ModelSource {
    described_file_with(model, &drawn::folder(model), &[], to)
}

/// The same with the configurations of another directory, and with further tensors.
fn described_file_with(model: &str, folder: &Path, further: &[(&str, TensorView)], to: &Path) -> ModelSource {
    let bytes = std::fs::read(data(&format!("single-file/{model}.safetensors"))).expect("a test file");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let mut metadata = std::collections::HashMap::new();
    for part in ["", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae", "scheduler"] {
        for file in std::fs::read_dir(folder.join(part)).into_iter().flatten().flatten() {
            let name = file.file_name().to_string_lossy().into_owned();
            if !name.starts_with("oracle") && (name.ends_with(".json") || name.ends_with(".txt")) {
                let key = if part.is_empty() { name } else { format!("{part}/{name}") };
                metadata.insert(key, std::fs::read_to_string(file.path()).expect("text"));
            }
        }
    }
    let path = to.join(format!("{model}.safetensors"));
    let further = further.iter().map(|(key, view)| (key.to_string(), view.clone()));
    let tensors = file.tensors().into_iter().chain(further);
    std::fs::write(&path, safetensors::serialize(tensors, Some(metadata)).expect("serializes")).expect("writes");
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
        let (file, folder) = (described_file(model, place.path()), ModelSource::Directory(drawn::folder(model)));
        let picture_of_file = picture(&file);
        assert_eq!(picture_of_file.rgb, picture(&folder).rgb, "{model}");
        assert_eq!(picture_of_file.parameters.json["model"], model);
        let plan = |source| pipeline::plan(source, DType::BF16, &request()).expect("plans");
        assert_eq!(plan(&file), plan(&folder), "{model}");
    }
}

/// The projection of a guidance scale, in both forms of one model: the same picture, and not that of the scale left out.
#[test]
fn a_single_file_with_a_guidance_embedding_makes_the_picture_of_its_directory() {
    let place = tempfile::tempdir().expect("a folder");
    let folder = place.path().join("model");
    for part in ["", "text_encoder", "tokenizer", "unet", "vae", "scheduler"] {
        std::fs::create_dir_all(folder.join(part)).expect("a folder");
        for file in std::fs::read_dir(data("sd15").join(part)).expect("a folder").flatten() {
            if file.path().is_file() {
                std::fs::copy(file.path(), folder.join(part).join(file.file_name())).expect("copies");
            }
        }
    }
    let bytes: Vec<u8> = (0..8 * 14).flat_map(|i| (0.6 * (0.37 * i as f32).sin()).to_le_bytes()).collect();
    let projection = TensorView::new(safetensors::Dtype::F32, vec![8, 14], &bytes).expect("fits");
    let weights = folder.join("unet/diffusion_pytorch_model.safetensors");
    let unet = std::fs::read(&weights).expect("a UNet");
    let unet = SafeTensors::deserialize(&unet).expect("safetensors");
    let further = [("time_embedding.cond_proj.weight".to_string(), projection.clone())];
    let tensors = unet.tensors().into_iter().chain(further);
    std::fs::write(&weights, safetensors::serialize(tensors, None).expect("serializes")).expect("writes");
    let config = folder.join("unet/config.json");
    let text = std::fs::read_to_string(&config).expect("a text");
    let mut json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    json["time_cond_proj_dim"] = 14.into();
    std::fs::write(&config, json.to_string()).expect("writes");

    let further = [("model.diffusion_model.time_embed.cond_proj.weight", projection)];
    let file = described_file_with("sd15", &folder, &further, place.path());
    let of_directory = picture(&ModelSource::Directory(folder)).rgb;
    assert_eq!(picture(&file).rgb, of_directory);
    let pipeline = Pipeline::load(file, Device::cpu(), DType::F32).expect("loads");
    let other = Request { guidance: 11.0, ..request() };
    assert_ne!(pipeline.generate(&other, &mut Silent).expect("makes a picture").remove(0).rgb, of_directory);
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

#[test]
fn a_learned_word_that_no_prompt_holds_is_told_once() {
    let place = tempfile::tempdir().expect("a folder");
    let lines = "{\"prompt\": \"a cat\"}\n{\"prompt\": \"a dog\"}\n";
    std::fs::write(place.path().join("cats.jsonl"), lines).expect("writes");
    std::fs::write(place.path().join("toys.jsonl"), lines.replace("dog", "toy")).expect("writes");
    let told = |args: &[&str]| {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_megafuse"))
            .current_dir(place.path())
            .args(args)
            .args(["--device", "cpu", "--stages", "16x16:1", "--guidance", "3", "--embedding"])
            .arg(data("prompts/sd15/toy.safetensors"))
            .arg("--model")
            .arg(data("sd15"))
            .output()
            .expect("runs");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said}");
        said.matches("warning: the word \"toy\" of --embedding stands in no prompt\n").count()
    };
    let generate = ["generate", "--method", "plain", "--out", "a.png"];
    let manifest = ["generate", "--method", "plain"];
    let grid = ["grid", "--methods", "plain", "--out", "g.png"];
    assert_eq!(told(&[&generate[..], &["a cat"]].concat()), 1);
    assert_eq!(told(&[&generate[..], &["a toy"]].concat()), 0);
    assert_eq!(told(&[&generate[..], &["a cat", "--negative", "toy"]].concat()), 0);
    assert_eq!(told(&[&manifest[..], &["--manifest", "cats.jsonl", "--out", "cats"]].concat()), 1);
    assert_eq!(told(&[&manifest[..], &["--manifest", "toys.jsonl", "--out", "toys"]].concat()), 0);
    assert_eq!(told(&[&grid[..], &["a cat"]].concat()), 1);
    assert_eq!(told(&[&grid[..], &["a toy"]].concat()), 0);
}

/// Grid and probe merge a LoRA as generate does, and warn as it does; a part that probe did not load is not missed.
#[test]
fn grid_and_probe_take_loras() {
    let place = tempfile::tempdir().expect("a folder");
    let bytes = std::fs::read(data("single-file/lora-kohya.safetensors")).expect("a LoRA");
    let lora = SafeTensors::deserialize(&bytes).expect("safetensors");
    let mut tensors: Vec<(String, TensorView)> = lora.tensors();
    tensors.retain(|(key, _)| key.starts_with("lora_unet_"));
    let extra = tensors[0].1.clone();
    tensors.push(("lora_unet_elsewhere.lora_up.weight".into(), extra.clone()));
    let write = |name: &str, tensors: &[(String, TensorView)]| {
        let tensors = tensors.iter().map(|(key, view)| (key, view));
        std::fs::write(place.path().join(name), safetensors::serialize(tensors, None).expect("serializes"))
            .expect("writes");
    };
    write("unet.safetensors", &tensors);
    write("none.safetensors", &[("lora_unet_elsewhere.lora_up.weight".into(), extra)]);
    let run = |args: &[&str]| {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_megafuse"))
            .current_dir(place.path())
            .args(args)
            .args(["--device", "cpu", "--model"])
            .arg(data("sd15"))
            .output()
            .expect("runs");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.success(), said)
    };
    let warning = "warning: unet.safetensors: no part of the model uses 1 tensor: lora_unet_elsewhere.lora_up.weight\n";
    let grid = ["grid", "a cat", "--methods", "plain", "--stages", "16x16:1", "--out"];
    let (ok, said) = run(&[&grid[..], &["plain.png"]].concat());
    assert!(ok, "{said}");
    let (ok, said) = run(&[&grid[..], &["lora.png", "--lora", "unet.safetensors:0.9"]].concat());
    assert!(ok && said.matches(warning).count() == 1, "{said}");
    let read = |name: &str| std::fs::read(place.path().join(name)).expect("written");
    assert_ne!(read("plain.png"), read("lora.png"));

    // What the UNet says of its inputs, without and with the LoRA.
    let f32s = |values: usize| (0..values).flat_map(|i| (i as f32 * 0.37).sin().to_le_bytes()).collect::<Vec<u8>>();
    let inputs = [("sample", vec![1, 4, 8, 8]), ("prompt_embeds", vec![1, 77, 16]), ("timestep", vec![1])];
    let inputs = inputs.map(|(name, shape)| (name, f32s(shape.iter().product()), shape));
    let views = inputs.iter().map(|(name, bytes, shape)| {
        (*name, TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).expect("a tensor"))
    });
    std::fs::write(place.path().join("in.safetensors"), safetensors::serialize(views, None).expect("serializes"))
        .expect("writes");
    let probe = ["probe", "--module", "unet", "--in", "in.safetensors", "--out"];
    let (ok, said) = run(&[&probe[..], &["plain.safetensors"]].concat());
    assert!(ok && !said.contains("warning"), "{said}");
    let (ok, said) = run(&[&probe[..], &["lora.safetensors", "--lora", "unet.safetensors"]].concat());
    assert!(ok && said.matches(warning).count() == 1, "{said}");
    assert_ne!(read("plain.safetensors"), read("lora.safetensors"));

    // The text encoder is not what this LoRA changes: no error, and no word about keys for the UNet.
    let text = ["probe", "--module", "text", "--prompt", "a cat", "--out", "text.safetensors"];
    let (ok, said) = run(&[&text[..], &["--lora", "unet.safetensors"]].concat());
    assert!(ok && !said.contains("warning"), "{said}");
    // What belongs to nothing is an error where everything is loaded.
    let (ok, said) = run(&[&grid[..], &["none.png", "--lora", "none.safetensors"]].concat());
    assert!(!ok && said.contains("none.safetensors: no key of this adapter"), "{said}");
}

/// Values of a tensor by its bytes, whatever its dtype.
fn raw<'a>(file: &'a SafeTensors, name: &str) -> (&'a [u8], Vec<usize>) {
    let view = file.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}"));
    (view.data(), view.shape().to_vec())
}

fn f32s(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

/// Every code of both 8-bit floats against torch; those that are no numbers are refused.
#[test]
fn all_codes_of_8_bit_floats_are_torchs_values() {
    let bytes = std::fs::read(data("single-file/fp8.safetensors")).expect("torch's values");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    for (name, dtype, numbers) in
        [("e4m3", safetensors::Dtype::F8_E4M3, 254), ("e5m2", safetensors::Dtype::F8_E5M2, 248)]
    {
        let codes = raw(&file, &format!("codes.{name}")).0;
        assert_eq!(codes, (0..=255).collect::<Vec<u8>>());
        let want = f32s(raw(&file, &format!("values.{name}")).0);
        let load = |codes: &[u8]| {
            let view = TensorView::new(dtype, vec![codes.len()], codes).expect("a tensor");
            let bytes: &'static [u8] = safetensors::serialize([("x", view)], None).expect("serializes").leak();
            let store = WeightStore::from_bytes("x", bytes, &Device::cpu(), DType::F32).expect("a good file");
            store.root().tensor("x", &[codes.len()]).and_then(|x| x.to_f32_vec()).map_err(|error| error.to_string())
        };
        let finite: Vec<u8> = (0..=255u8).filter(|&code| want[usize::from(code)].is_finite()).collect();
        assert_eq!(finite.len(), numbers, "{name}");
        let got = load(&finite).expect("numbers");
        for (code, got) in finite.iter().zip(got) {
            assert_eq!(got.to_bits(), want[usize::from(*code)].to_bits(), "{name} {code:#04x}");
        }
        for code in (0..=255u8).filter(|code| !finite.contains(code)) {
            let error = load(&[code]).expect_err("no number");
            assert!(error.contains("not finite"), "{name} {code:#04x}: {error}");
        }
    }
}

/// The form of ComfyUI: `scaled_fp8` marks the file, `X.scale_weight` stands beside `X.weight`; one scale or one per row.
#[test]
fn scaled_8_bit_weights_are_torchs_values() {
    let bytes = std::fs::read(data("single-file/fp8.safetensors")).expect("torch's values");
    let scaled = SafeTensors::deserialize(&bytes).expect("safetensors");
    let place = tempfile::tempdir().expect("a folder");
    for (model, marker) in [("sd15", safetensors::Dtype::F8_E4M3), ("sd21", safetensors::Dtype::F8_E5M2)] {
        let bytes = std::fs::read(data(&format!("single-file/{model}.safetensors"))).expect("a test file");
        let own = SafeTensors::deserialize(&bytes).expect("safetensors");
        let prefix = format!("{model}/");
        let mut tensors: Vec<(String, TensorView)> = own.tensors();
        for name in scaled.names().into_iter().filter(|name| name.starts_with(&prefix)) {
            let key = &name[prefix.len()..];
            tensors.retain(|(own, _)| own != key);
            tensors.push((key.to_string(), scaled.tensor(name).expect("a tensor")));
            if let Some(module) = key.strip_suffix(".scale_weight") {
                // Of the activations, for arithmetic in 8 bits.
                tensors.push((format!("{module}.scale_input"), scaled.tensor(name).expect("a tensor")));
            }
        }
        let mark = TensorView::new(marker, vec![0], &[]).expect("a tensor");
        tensors.push(("model.diffusion_model.scaled_fp8".into(), mark));
        let path = place.path().join(format!("{model}.safetensors"));
        std::fs::write(&path, safetensors::serialize(tensors, None).expect("serializes")).expect("writes");

        let file = SingleFile::open(&path).expect("opens");
        assert_eq!(file.unused(), &[] as &[String], "{model}");
        let plain = SingleFile::open(&data(&format!("single-file/{model}.safetensors"))).expect("opens");
        let mut changed = 0;
        for part in file.part_list() {
            let [got, plain] =
                [&file, &plain].map(|file| file.store(part, &Device::cpu(), DType::F32).expect("a part"));
            for (name, key, shape) in shapes(&plain) {
                let (got, plain) = (values(&got, &key, &shape), values(&plain, &key, &shape));
                if got == plain {
                    continue;
                }
                changed += 1;
                // The nearest of 8 bits, near the stored value: a wrong scale is far off. Of E5M2 an eighth.
                let largest = plain.iter().fold(0f32, |most, value| most.max(value.abs()));
                for (got, plain) in got.iter().zip(&plain) {
                    assert!(
                        (got - plain).abs() <= 0.13 * plain.abs() + 1e-4 * largest,
                        "{model} {name}: {got}, {plain}"
                    );
                }
            }
        }
        assert_eq!(changed, if model == "sd15" { 3 } else { 2 }, "{model}");
        // To the bit: the code's value times the scale, in f32.
        let values_prefix = format!("{model}.values/");
        for name in scaled.names().into_iter().filter(|name| name.starts_with(&values_prefix)) {
            let (want, shape) = raw(&scaled, name);
            let want = f32s(want);
            let key = &name[values_prefix.len()..];
            let (part, name) = match key {
                "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight" => {
                    (Part::Unet, "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight")
                }
                "model.diffusion_model.input_blocks.1.0.in_layers.2.weight" => {
                    (Part::Unet, "down_blocks.0.resnets.0.conv1.weight")
                }
                "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.ff.net.2.weight" => {
                    (Part::Unet, "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2.weight")
                }
                "cond_stage_model.model.transformer.resblocks.0.attn.out_proj.weight" => {
                    (Part::TextEncoder, "text_model.encoder.layers.0.self_attn.out_proj.weight")
                }
                "cond_stage_model.model.transformer.resblocks.1.mlp.c_fc.weight" => {
                    (Part::TextEncoder, "text_model.encoder.layers.1.mlp.fc1.weight")
                }
                other => panic!("{other} is compared with nothing"),
            };
            let store = file.store(part, &Device::cpu(), DType::F32).expect("a part");
            let all = values(&store, name, &shape);
            assert_eq!(all, want, "{model} {key}");
        }
    }
}

/// Longer than what a thread decodes at once, with a scale of each row under its other name, to the bit; a LoRA on top; and
/// what is no scale: beside a weight that has no 8 bits, or of another length.
#[test]
fn long_8_bit_tensors_and_their_neighbours() {
    let bytes = std::fs::read(data("single-file/fp8.safetensors")).expect("torch's values");
    let torch = SafeTensors::deserialize(&bytes).expect("safetensors");
    let value = f32s(raw(&torch, "values.e4m3").0);
    let (rows, columns) = (150, 700);
    // Every code but the two that are no numbers.
    let codes: Vec<u8> =
        (0..rows * columns).map(|i| (i * i % 251) as u8).map(|c| if c & 127 == 127 { 1 } else { c }).collect();
    let scales: Vec<f32> = (0..rows).map(|row| 0.01 + (row * 7 % 13) as f32).collect();
    let of = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
    let (up, down) = (vec![0.5; rows], (0..columns).map(|i| (i as f32 * 0.1).sin()).collect::<Vec<f32>>());
    let (scale_bytes, plain_bytes, up_bytes, down_bytes) = (of(&scales), of(&[2.0; 6]), of(&up), of(&down));
    let f8 =
        |shape: &[usize], bytes| TensorView::new(safetensors::Dtype::F8_E4M3, shape.to_vec(), bytes).expect("fits");
    let f32 = |shape: &[usize], bytes| TensorView::new(safetensors::Dtype::F32, shape.to_vec(), bytes).expect("fits");
    let tensors = [
        ("long.weight", f8(&[rows, columns], &codes)),
        ("long.weight_scale", f32(&[rows, 1], &scale_bytes)),
        ("long.input_scale", f32(&[], &scale_bytes[..4])),
        ("plain.weight", f32(&[2, 3], &plain_bytes)),
        ("plain.scale_weight", f32(&[2], &scale_bytes[..8])),
        ("short.weight", f8(&[2, 3], &[0x38; 6])),
        ("short.scale_weight", f32(&[3], &scale_bytes[..12])),
    ];
    let place = tempfile::tempdir().expect("a folder");
    let write = |name: &str, tensors: &[(&str, TensorView)]| {
        let bytes = safetensors::serialize(tensors.iter().cloned(), None).expect("serializes");
        std::fs::write(place.path().join(name), bytes).expect("writes");
    };
    write("x.safetensors", &tensors);
    let open = || WeightStore::open(place.path(), "x", &Device::cpu(), DType::F32).expect("opens");
    let store = open();
    let scaled: Vec<f32> =
        codes.iter().enumerate().map(|(i, &c)| value[usize::from(c)] * scales[i / columns]).collect();
    assert!(values(&store, "long.weight", &[rows, columns]) == scaled);
    assert_eq!(values(&store, "plain.weight", &[2, 3]), [2.0; 6]);
    assert_eq!(values(&store, "short.weight", &[2, 3]), [1.0; 6]);
    let unused: Vec<String> = store.unused().into_iter().flat_map(|unused| unused.keys).collect();
    assert_eq!(unused, ["plain.scale_weight", "short.scale_weight"]);

    write(
        "lora.safetensors",
        &[("long.lora_A.weight", f32(&[1, columns], &down_bytes)), ("long.lora_B.weight", f32(&[rows, 1], &up_bytes))],
    );
    let adapters = Adapters::open(&[(place.path().join("lora.safetensors"), 1.0)]).expect("opens");
    let merged = open().with_adapters(Part::Unet, &adapters).expect("fits");
    for (i, got) in values(&merged, "long.weight", &[rows, columns]).into_iter().enumerate() {
        let want = f64::from(scaled[i]) + 0.5 * f64::from(down[i % columns]);
        assert!((f64::from(got) - want).abs() <= 1e-6 * (1.0 + want.abs()), "{i}: {got}, expected {want}");
    }
}

/// Keys and shapes of a published single file.
fn published_file(name: &str) -> Vec<(String, Vec<usize>)> {
    let mut text = String::new();
    let bytes = std::fs::read(data(&format!("manifest/ldm-{name}.txt.gz"))).expect("diffusers' list");
    std::io::Read::read_to_string(&mut flate2::read::GzDecoder::new(&bytes[..]), &mut text).expect("a text");
    let shape = |text: &str| -> Vec<usize> { text.split('x').filter_map(|side| side.parse().ok()).collect() };
    text.lines().filter_map(|line| line.split_once(' ')).map(|(key, sides)| (key.into(), shape(sides))).collect()
}

/// A safetensors file of these tensors in 8 bits without data on the disk: what is never written reads as zeros.
fn sparse(path: &Path, tensors: &[(String, Vec<usize>)], metadata: serde_json::Value) {
    let mut header = serde_json::Map::new();
    let mut at = 0;
    for (key, shape) in tensors {
        let end = at + shape.iter().product::<usize>();
        let entry = serde_json::json!({"dtype": "F8_E4M3", "shape": shape, "data_offsets": [at, end]});
        header.insert(key.clone(), entry);
        at = end;
    }
    if !metadata.is_null() {
        header.insert("__metadata__".into(), metadata);
    }
    let header = serde_json::Value::from(header).to_string();
    let begin = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
    std::fs::write(path, &begin).expect("writes");
    let file = std::fs::OpenOptions::new().write(true).open(path).expect("opens");
    file.set_len((begin.len() + at) as u64).expect("a sparse file");
}

/// Every key of the published single files, whose names diffusers' conversion has read: none is left over, and the layers
/// of the published configurations find all that they ask for, of their shapes.
#[test]
fn published_single_files_have_every_tensor_of_their_configurations() {
    let place = tempfile::tempdir().expect("a folder");
    for (name, family, counts) in [
        ("sd15", Family::Sd1, &[123_060_480u64, 859_520_964, 83_653_863][..]),
        ("sd21", Family::Sd2, &[340_387_840, 865_910_724, 83_653_863]),
        ("sdxl", Family::Sdxl, &[123_060_480, 694_659_840, 2_567_463_684, 83_653_863]),
        // With the table of positions.
        ("sd3", Family::Sd3, &[123_060_480, 694_659_840, 4_762_310_656, 2_084_951_104, 83_819_683]),
        ("sd35", Family::Sd35, &[123_060_480, 694_659_840, 4_762_310_656, 2_469_663_936, 83_819_683]),
    ] {
        let path = place.path().join(format!("{name}.safetensors"));
        sparse(&path, &published_file(name), serde_json::Value::Null);
        let file = SingleFile::open(&path).expect("opens");
        assert_eq!((file.family(), file.unused()), (family, &[][..]), "{name}");
        for (&part, &count) in file.part_list().iter().zip(counts) {
            let what = format!("{name} {}", part.folder());
            let store = file.store(part, &Device::meta(), DType::BF16).expect("a part");
            let config = file.config(&format!("{}/config.json", part.folder())).expect("published");
            // The published directories of SD3 have a projection of CLIP-L that single files lack.
            if !(part == Part::TextEncoder && matches!(family, Family::Sd3 | Family::Sd35)) {
                assert_eq!(published_config(family, &format!("{}/config.json", part.folder())).as_ref(), Some(&config));
            }
            let store = match part {
                Part::TextEncoder | Part::TextEncoder2 => {
                    let config = ClipTextConfig::from_json(&what, &config).expect("a good configuration");
                    let store = ClipTextModel::prepared(store, &config).expect("names");
                    ClipTextModel::from_weights(&store.root(), &config).expect(&what);
                    store
                }
                Part::Unet => {
                    let config = UnetConfig::from_json(&what, &config).expect("a good configuration");
                    Unet::from_weights(&store.root(), &config).expect(&what);
                    store
                }
                Part::TextEncoder3 => {
                    let config = T5Config::from_json(&what, &config).expect("a good configuration");
                    let store = T5Encoder::prepared(store).expect("names");
                    T5Encoder::from_weights(&store.root(), &config).expect(&what);
                    store
                }
                Part::Transformer => {
                    let config = MmditConfig::from_json(&what, &config).expect("a good configuration");
                    Mmdit::from_weights(&store.root(), &config).expect(&what);
                    store
                }
                Part::Vae => {
                    let config = VaeConfig::from_json(&what, &config).expect("a good configuration");
                    Vae::from_weights(&store.root(), &config).expect(&what);
                    store
                }
            };
            assert_eq!(store.unused(), [], "{what}");
            let taken = store.manifest().iter().map(|(_, shape)| shape.iter().product::<usize>() as u64).sum::<u64>();
            assert_eq!(taken, count, "{what}");
        }
    }
}

/// A UNet with a projection of its guidance scale: the published files with this one tensor more.
#[test]
fn a_single_file_distilled_for_latent_consistency_is_recognised() {
    let place = tempfile::tempdir().expect("a folder");
    for (name, dim, parameters) in [("sd15", 256, 859_520_964u64), ("sdxl", 64, 2_567_463_684)] {
        let path = place.path().join(format!("{name}.safetensors"));
        let mut tensors = published_file(name);
        tensors.push(("model.diffusion_model.time_embed.cond_proj.weight".into(), vec![320, dim]));
        sparse(&path, &tensors, serde_json::Value::Null);
        let file = SingleFile::open(&path).expect("opens");
        assert_eq!(file.unused(), &[] as &[String], "{name}");
        let config = UnetConfig::from_json(name, &file.config("unet/config.json").expect("published")).expect("good");
        assert_eq!(config.time_cond_proj_dim, Some(dim));
        let store = file.store(Part::Unet, &Device::meta(), DType::BF16).expect("a part");
        Unet::from_weights(&store.root(), &config).expect(name);
        assert_eq!(store.unused(), [], "{name}");
        let planner = pipeline::Planner::new(&ModelSource::File(path.clone()), DType::BF16).expect("plans");
        let suited = Request { prompt: "a cat".into(), ..Request::suited_to(&ModelSource::File(path)) };
        assert_eq!((suited.method.name(), suited.guidance), ("plain", 8.5), "{name}");
        let run = planner.pipeline().resolve(&suited).expect("fits");
        assert_eq!((run.scheduler().sampler(), run.scheduler().timesteps().len()), (Sampler::Lcm, 4), "{name}");
        assert_eq!(run.guidance(), None, "{name}: the network is told the scale");
        let config = file.config("scheduler/scheduler_config.json").expect("published");
        let config = SchedulerConfig::from_json("its scheduler", &config).expect("good");
        assert_eq!(config.sampler(), Sampler::Lcm, "{name}");
        let weights = planner.plan(&suited).expect("plans").weights;
        let unet = weights.into_iter().find(|part| part.module == "unet").expect("a UNet");
        assert_eq!((unet.parameters, unet.unused), (parameters + 320 * dim as u64, vec![]), "{name}");
    }
}

/// An inpainting UNet: the published files with another first convolution.
#[test]
fn a_single_file_for_inpainting_is_recognised() {
    let place = tempfile::tempdir().expect("a folder");
    for (name, parameters) in [("sd15", 859_520_964u64), ("sdxl", 2_567_463_684)] {
        let path = place.path().join(format!("{name}.safetensors"));
        let mut tensors = published_file(name);
        let first = tensors.iter_mut().find(|(key, _)| key == "model.diffusion_model.input_blocks.0.0.weight");
        first.expect("a UNet").1[1] = 9;
        sparse(&path, &tensors, serde_json::Value::Null);
        let file = SingleFile::open(&path).expect("opens");
        let config = UnetConfig::from_json(name, &file.config("unet/config.json").expect("published")).expect("good");
        assert_eq!((config.in_channels, config.out_channels), (9, 4), "{name}");
        let planner = pipeline::Planner::new(&ModelSource::File(path), DType::BF16).expect("plans");
        let request = Request { prompt: "a cat".into(), method: Plain {}.into(), ..Request::default() };
        let error = planner.plan(&request).unwrap_err().to_string();
        assert!(error.contains("mask (none)") && error.contains("request.init_image"), "{name}: {error}");
        let picture =
            |name, value| InputPicture::new(name, Size::new(64, 48), vec![value; 64 * 48 * 3]).expect("a picture");
        let init = InitImage { mask: Some(picture("m.png", 255)), ..InitImage::new(picture("p.png", 9)) };
        let plan = planner.plan(&Request { init_image: Some(init), ..request }).expect("plans");
        let unet = plan.weights.iter().find(|part| part.module == "unet").expect("a UNet");
        assert_eq!((unet.parameters, &unet.unused), (parameters + 320 * 5 * 9, &vec![]), "{name}");
        let names: Vec<&str> = plan.phases.iter().map(|phase| phase.name).collect();
        assert!(names.contains(&"encode") && !names.contains(&"relay encode"), "{name}: {names:?}");
        assert_eq!(plan.stages[0].size, Size::new(64, 48), "{name}: the picture's own size");
    }
}

/// Whether 2.x predicts v at 768 pixels or noise at 512 stands in no key: diffusers assumes v unless `global_step` is 875000.
#[test]
fn what_a_stable_diffusion_2_predicts() {
    let place = tempfile::tempdir().expect("a folder");
    let path = place.path().join("it.safetensors");
    let small = std::fs::read(data("single-file/sd21.safetensors")).expect("a test file");
    let own = SafeTensors::deserialize(&small).expect("safetensors");
    let step = |steps: i64| steps.to_le_bytes();
    let (base, other) = (step(875_000), step(110_000));
    let one =
        |bytes: &'static [u8]| TensorView::new(safetensors::Dtype::U8, vec![bytes.len()], bytes).expect("a tensor");
    let steps = |bytes| TensorView::new(safetensors::Dtype::I64, vec![], bytes).expect("a tensor");
    type Further<'a> = Vec<(&'a str, TensorView<'a>)>;
    let cases: [(Further, Option<&str>, &str, u64, bool); 8] = [
        (vec![], None, "v_prediction", 96, false),
        (vec![("global_step", steps(&base))], None, "epsilon", 64, false),
        (vec![("global_step", steps(&other))], None, "v_prediction", 96, false),
        (vec![], Some("epsilon"), "epsilon", 64, false),
        (vec![], Some("v"), "v_prediction", 96, false),
        (vec![("global_step", steps(&base))], Some("v"), "v_prediction", 96, false),
        (vec![("global_step", steps(&base)), ("v_pred", one(b""))], None, "v_prediction", 96, false),
        (vec![("v_pred", one(b"")), ("ztsnr", one(b""))], None, "v_prediction", 96, true),
    ];
    for (further, metadata, wanted, cells, zero_snr) in cases {
        let tensors =
            own.tensors().into_iter().chain(further.iter().map(|(key, view)| (key.to_string(), view.clone())));
        let metadata = metadata.map(|text| [("modelspec.prediction_type".to_string(), text.to_string())].into());
        std::fs::write(&path, safetensors::serialize(tensors, metadata).expect("serializes")).expect("writes");
        let file = SingleFile::open(&path).expect("opens");
        let config = |name: &str| -> serde_json::Value {
            serde_json::from_str(&file.config(name).expect("published")).expect("JSON")
        };
        let keys: Vec<&str> = further.iter().map(|(key, _)| *key).collect();
        assert_eq!(config("scheduler/scheduler_config.json")["prediction_type"], wanted, "{keys:?}");
        assert_eq!(config("unet/config.json")["sample_size"], cells, "{keys:?}");
        let rescaled = &config("scheduler/scheduler_config.json")["rescale_betas_zero_snr"];
        assert_eq!(rescaled.as_bool().unwrap_or(false), zero_snr, "{keys:?}");
        assert_eq!(file.unused(), &[] as &[String]);
    }
}

/// The published module names in the dialect of kohya's scripts: for Stable Diffusion 1.5 those of diffusers, for SDXL
/// those of LDM; both text encoders by the names of transformers.
#[test]
fn every_module_of_the_published_models_takes_a_lora() {
    let place = tempfile::tempdir().expect("a folder");
    for name in ["sd15", "sdxl"] {
        let path = place.path().join(format!("{name}.safetensors"));
        let tensors = published_file(name);
        sparse(&path, &tensors, serde_json::Value::Null);
        let file = SingleFile::open(&path).expect("opens");
        let mut lora = Vec::new();
        let mut add = |beginning: &str, module: &str, shape: &[usize]| {
            let flat = format!("{beginning}{}", module.replace('.', "_"));
            let kernel = &shape[2..];
            lora.push((format!("{flat}.lora_down.weight"), [&[1, shape[1]], kernel].concat()));
            lora.push((format!("{flat}.lora_up.weight"), [&[shape[0], 1][..], &vec![1; kernel.len()]].concat()));
        };
        let ldm = tensors.iter().filter_map(|(key, shape)| Some((key.strip_prefix("model.diffusion_model.")?, shape)));
        let mut modules = 0;
        for &part in file.part_list().iter().filter(|part| **part != Part::Vae) {
            let store = file.store(part, &Device::meta(), DType::BF16).expect("a part");
            let beginning = match part {
                Part::TextEncoder if name == "sdxl" => "lora_te1_",
                Part::TextEncoder => "lora_te_",
                Part::TextEncoder2 => "lora_te2_",
                _ => "lora_unet_",
            };
            let of_part = store.tensors().filter(|(key, shape)| key.ends_with(".weight") && shape.len() >= 2);
            for (key, shape) in of_part.filter(|(key, _)| !key.contains("embedding.weight")) {
                modules += 1;
                let module = key.strip_suffix(".weight").expect("so filtered");
                // Its names in the single file are written below.
                if !(name == "sdxl" && part == Part::Unet) {
                    add(beginning, module, shape);
                }
            }
        }
        if name == "sdxl" {
            for (key, shape) in ldm.filter(|(key, shape)| key.ends_with(".weight") && shape.len() >= 2) {
                add("lora_unet_", key.strip_suffix(".weight").expect("so filtered"), shape);
            }
        }
        assert_eq!(lora.len(), 2 * modules, "{name}");
        // 12 layers of 6 matrices, 32 more and a projection; the UNets' matrices and convolutions.
        let encoders = if name == "sdxl" { 12 * 6 + 32 * 6 + 1 } else { 12 * 6 };
        assert!(modules > encoders + 250, "{name}: {modules}");
        let adapter = place.path().join(format!("{name}-lora.safetensors"));
        sparse(&adapter, &lora, serde_json::Value::Null);
        let adapters = Adapters::open(&[(adapter, 1.0)]).expect("opens");
        for part in file.part_list() {
            let store = file.store(part, &Device::meta(), DType::BF16).expect("a part");
            store.with_adapters(part, &adapters).expect("shapes agree");
        }
        assert_eq!(adapters.finish(&[]).expect("keys match"), [], "{name}");
    }
}

/// Both text encoders and the UNet, whose names are LDM's.
#[test]
fn a_lora_of_sdxl_gives_the_merged_weights() {
    let adapters = Adapters::open(&[(data("single-file/lora-sdxl.safetensors"), 1.0)]).expect("opens");
    let want = WeightStore::open(&data("single-file"), "lora-sdxl-merged", &Device::cpu(), DType::F32).expect("sums");
    let mut compared = 0;
    for part in [Part::TextEncoder, Part::TextEncoder2, Part::Unet, Part::Vae] {
        let (plain, merged) = (directory("sdxl", part), directory("sdxl", part));
        let merged = merged.with_adapters(part, &adapters).expect("fits");
        for (name, key, shape) in shapes(&plain) {
            let (got, expected) = (values(&merged, &key, &shape), format!("{}/{name}", part.folder()));
            if !want.contains(&expected) {
                assert_eq!(got, values(&plain, &key, &shape), "{name}");
                continue;
            }
            compared += 1;
            for (got, want) in got.iter().zip(values(&want, &expected, &shape)) {
                assert!((got - want).abs() <= 2e-6 * (1.0 + want.abs()), "{name}: {got}, expected {want}");
            }
        }
    }
    assert_eq!(compared, want.tensors().count());
    assert_eq!(adapters.finish(&[]).expect("keys match"), []);
}

/// Three adapters, one of them a DoRA between two others: the sum, in the order of the files.
#[test]
fn several_adapters_are_applied_in_their_order() {
    let merged = |files: [(&str, f32); 3]| {
        let files = files.map(|(name, weight)| (data(&format!("single-file/lora-{name}.safetensors")), weight));
        let adapters = Adapters::open(&files).expect("opens");
        directory("sd15", Part::Unet).with_adapters(Part::Unet, &adapters).expect("fits")
    };
    let near = |store: &WeightStore, key: &str, wanted: &str| {
        let sums = WeightStore::open(&data("single-file"), "lora-several-merged", &Device::cpu(), DType::F32);
        let want = sums.expect("PyTorch's sums");
        let shape = store.tensors().find(|(other, _)| *other == key).expect(key).1.to_vec();
        let pairs = values(store, key, &shape).into_iter().zip(values(&want, wanted, &shape));
        let far = |(got, want): (f32, f32)| (got - want).abs() - 4e-6 * (1.0 + want.abs());
        pairs.map(far).fold(f32::MIN, f32::max) <= 0.0
    };
    let at = "down_blocks.0.attentions.0.transformer_blocks.0.attn1";
    let (q, v) = (format!("{at}.to_q.weight"), format!("{at}.to_v.weight"));
    let store = merged([("kohya", 0.7), ("relatives", 0.5), ("several", -0.4)]);
    assert!(near(&store, &q, &format!("unet/{q}")) && near(&store, &v, &format!("unet/{v}")));
    let store = merged([("several", -0.4), ("kohya", 0.7), ("relatives", 0.5)]);
    assert!(near(&store, &q, &format!("unet/{q}")) && near(&store, &v, &format!("other order/{v}")));
    let store = merged([("several", -0.4), ("kohya", 0.7), ("relatives", 0.5)]);
    assert!(!near(&store, &v, &format!("unet/{v}")), "the order must show");
}

/// PEFT's own form of an adapted text encoder: no name of the part, alpha in the file beside it.
#[test]
fn a_text_encoder_of_peft_takes_alpha_from_its_configuration() {
    let kohya = std::fs::read(data("single-file/lora-kohya.safetensors")).expect("a LoRA");
    let kohya = SafeTensors::deserialize(&kohya).expect("safetensors");
    let at = "encoder.layers.1.self_attn.q_proj";
    let flat = format!("lora_te_text_model_{}", at.replace('.', "_"));
    let place = tempfile::tempdir().expect("a folder");
    let path = place.path().join("adapter_model.safetensors");
    let tensors = [("lora_A", "lora_down"), ("lora_B", "lora_up")].map(|(to, from)| {
        let tensor = kohya.tensor(&format!("{flat}.{from}.weight")).expect("a tensor");
        (format!("base_model.model.text_model.{at}.{to}.weight"), tensor)
    });
    std::fs::write(&path, safetensors::serialize(tensors, None).expect("serializes")).expect("writes");
    let want = WeightStore::open(&data("single-file"), "lora-merged", &Device::cpu(), DType::F32).expect("sums");
    let want = values(&want, &format!("text_encoder/{at}.weight"), &[16, 16]);
    let merged = || {
        let adapters = Adapters::open(&[(path.clone(), 1.0)]).expect("opens");
        let store = directory("sd15", Part::TextEncoder).with_adapters(Part::TextEncoder, &adapters).expect("fits");
        assert_eq!(adapters.finish(&[]).expect("keys match"), []);
        let key = format!("text_model.{at}.weight");
        let key = if store.contains(&key) { key } else { at.to_string() + ".weight" };
        values(&store, &key, &[16, 16])
    };
    let distance = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    // Its rank is 4.
    for (config, right) in [
        (r#"{"peft_type": "LORA", "r": 4, "lora_alpha": 2}"#, true),
        (r#"{"peft_type": "LORA", "r": 4, "lora_alpha": 1, "use_rslora": true}"#, true),
        (r#"{"peft_type": "LORA", "r": 4, "lora_alpha": 4}"#, false),
        (r#"{"r": 4, "lora_alpha": 9, "alpha_pattern": {"k_proj": 8, "self_attn.q_proj": 2, "q_proj": 8}}"#, true),
        (r#"{"r": 4, "lora_alpha": 2, "alpha_pattern": {"j_proj": 8, "roj": 8, "q_proj.": 8, "q": 8}}"#, true),
        (r#"{"r": 4, "lora_alpha": 2, "alpha_pattern": {".*layers\\.[0-9]\\..*": 8}}"#, false),
        (r#"{"r": 4, "lora_alpha": 8, "alpha_pattern": {"^text_model.encoder.layers.1.self_attn.q_proj": 2}}"#, true),
        (r#"{"r": 4, "lora_alpha": 2, "alpha_pattern": {"^self_attn.q_proj": 8}}"#, true),
        (r#"{"r": 4, "lora_alpha": 2, "alpha_pattern": null, "use_rslora": null}"#, true),
        (r#"{"r": 8, "lora_alpha": 2, "rank_pattern": {"k_proj": 16}}"#, true), // the tensors know their rank
    ] {
        std::fs::write(place.path().join("adapter_config.json"), config).expect("writes");
        let distance = distance(&merged(), &want);
        assert_eq!(distance <= 1e-5, right, "{config}: {distance}");
    }
    for (config, says) in [
        ("[]", "is no JSON object"),
        (r#"{"lora_alpha": "2"}"#, "lora_alpha is \"2\", expected a number"),
        (r#"{"r": [4]}"#, "r is [4], expected a number"),
        (r#"{"use_rslora": 1}"#, "use_rslora is 1, expected true or false"),
        (r#"{"alpha_pattern": 3}"#, "alpha_pattern is 3, expected names with their numbers"),
        (r#"{"alpha_pattern": {"q_proj": "a"}}"#, "alpha_pattern of q_proj is \"a\", expected a number"),
        (r#"{"alpha_pattern": {"(q_proj": 4}}"#, "alpha_pattern has \"(q_proj\""),
    ] {
        std::fs::write(place.path().join("adapter_config.json"), config).expect("writes");
        let error = Adapters::open(&[(path.clone(), 1.0)]).expect_err(config).to_string();
        assert!(error.contains(says) && error.contains("adapter_config.json"), "{config}: {error}");
    }
}

/// A Kronecker product of two whole factors: its tensors have no rank, so alpha and the rank of the configuration scale it,
/// and without a configuration nothing does.
#[test]
fn whole_factors_are_scaled_by_the_configuration() {
    let module = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q";
    let plain = directory("sd15", Part::Unet);
    let key = format!("{module}.weight");
    let shape = plain.tensors().find(|(other, _)| *other == key).expect("a weight").1.to_vec();
    let (rows, columns) = (shape[0], shape[1]);
    let w = values(&plain, &key, &shape);
    let factor = |of: f32, count: usize| (0..count).map(|i| (of * i as f32).sin()).collect::<Vec<f32>>();
    let (w1, w2) = (factor(0.7, 4), factor(1.3, rows / 2 * (columns / 2)));
    let bytes = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
    let (b1, b2) = (bytes(&w1), bytes(&w2));
    let view =
        |shape: [usize; 2], bytes| TensorView::new(safetensors::Dtype::F32, shape.to_vec(), bytes).expect("fits");
    let tensors = [
        (format!("base_model.model.{module}.lokr_w1"), view([2, 2], &b1)),
        (format!("base_model.model.{module}.lokr_w2"), view([rows / 2, columns / 2], &b2)),
    ];
    let place = tempfile::tempdir().expect("a folder");
    let path = place.path().join("adapter_model.safetensors");
    std::fs::write(&path, safetensors::serialize(tensors, None).expect("serializes")).expect("writes");
    for (config, scale) in [
        (None, 1.0),
        (Some(r#"{"peft_type": "LOKR", "r": 16, "alpha": 24}"#), 1.5),
        (Some(r#"{"peft_type": "LOKR", "r": 16, "alpha": 24, "rank_pattern": {"to_q": 12}}"#), 2.0),
        (Some(r#"{"peft_type": "LOKR", "alpha_pattern": {"attn1.to_q": 4}}"#), 0.5),
    ] {
        if let Some(config) = config {
            std::fs::write(place.path().join("adapter_config.json"), config).expect("writes");
        }
        let adapters = Adapters::open(&[(path.clone(), 1.0)]).expect("opens");
        let store = directory("sd15", Part::Unet).with_adapters(Part::Unet, &adapters).expect("fits");
        for (i, got) in values(&store, &key, &shape).into_iter().enumerate() {
            let (row, column) = (i / columns, i % columns);
            let of_1 = f64::from(w1[row / (rows / 2) * 2 + column / (columns / 2)]);
            let of_2 = f64::from(w2[row % (rows / 2) * (columns / 2) + column % (columns / 2)]);
            let want = f64::from(w[i]) + scale * of_1 * of_2;
            assert!((f64::from(got) - want).abs() <= 1e-6 * (1.0 + want.abs()), "{config:?} {i}: {got}, {want}");
        }
    }
}
