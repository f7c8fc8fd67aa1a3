//! Malformed model directories, files, prompts and flags, each against the built program: the message names the file or
//! flag, the key, the value and what to do; the exit status is an error's and no panic's; nothing is left behind.

#[path = "common/place.rs"]
mod place;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use megafuse::image::{PngText, encode_png};
use place::{MODEL, copy};
use serde_json::{Map, Value, json};

/// Failed: a file, a configuration, a device.
const FAILED: i32 = 1;
/// Wrong usage: a flag or its value.
const USAGE: i32 = 2;

/// One broken thing, the command that meets it, and what the message must say.
struct Case {
    name: &'static str,
    /// `MODEL` in it stands for the copy of the model, `DIR` for the working directory.
    command: &'static str,
    status: i32,
    wanted: &'static [&'static str],
    /// Breaks the copy of the model.
    damage: fn(&Model),
}

/// The command of most cases.
const GENERATE: &str = "generate cat --model MODEL --method plain --size 32x32 --steps 1 --out DIR/out.png";

/// A copy of the model that may be broken.
struct Model {
    folder: PathBuf,
}

impl Model {
    /// `""` is the model itself.
    fn path(&self, name: &str) -> PathBuf {
        if name.is_empty() { self.folder.clone() } else { self.folder.join(name) }
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        fs::write(self.path(name), bytes).unwrap_or_else(|error| panic!("{name}: {error}"));
    }

    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    fn remove(&self, name: &str) {
        let path = self.path(name);
        let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
        removed.unwrap_or_else(|error| panic!("{name}: {error}"));
    }

    fn keep_half(&self, name: &str) {
        let bytes = self.read(name);
        self.write(name, &bytes[..bytes.len() / 2]);
    }

    /// Sets one key of a JSON file.
    fn set(&self, name: &str, key: &str, value: Value) {
        let mut json: Value = serde_json::from_slice(&self.read(name)).unwrap();
        json[key] = value;
        self.write(name, json.to_string());
    }

    /// Changes the header of a safetensors file and leaves its data.
    fn header(&self, name: &str, change: impl Fn(&mut Map<String, Value>)) {
        let bytes = self.read(name);
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut header: Map<String, Value> = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        change(&mut header);
        let header = Value::from(header).to_string();
        let parts = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &bytes[8 + length..]];
        self.write(name, parts.concat());
    }

    /// Overwrites the first bytes of a tensor's data.
    fn data(&self, name: &str, key: &str, value: &[u8]) {
        let mut bytes = self.read(name);
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        let at = 8 + length + header[key]["data_offsets"][0].as_u64().unwrap() as usize;
        bytes[at..at + value.len()].copy_from_slice(value);
        self.write(name, bytes);
    }

    /// Makes the first value of the last layer's bias `value`, in bf16: finite there, whatever it is elsewhere.
    fn last_bias(&self, value: f32) {
        self.header(UNET, |header| header["conv_out.bias"]["dtype"] = "BF16".into());
        self.data(UNET, "conv_out.bias", &half::bf16::from_f32(value).to_le_bytes());
    }

    /// Makes the UNet's file a shard of an index with this weight_map.
    fn shard(&self, weight_map: impl Fn(&mut Map<String, Value>)) {
        let bytes = self.read(UNET);
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: Map<String, Value> = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        let keys = header.keys().filter(|key| *key != "__metadata__");
        let mut map: Map<String, Value> = keys.map(|key| (key.clone(), "shard-1.safetensors".into())).collect();
        weight_map(&mut map);
        self.write("unet/shard-1.safetensors", bytes);
        self.remove(UNET);
        self.write(&format!("{UNET}.index.json"), json!({"metadata": {}, "weight_map": map}).to_string());
    }
}

const UNET: &str = "unet/diffusion_pytorch_model.safetensors";
const VAE: &str = "vae/diffusion_pytorch_model.safetensors";
const TEXT: &str = "text_encoder/model.safetensors";
const UNET_CONFIG: &str = "unet/config.json";
const VAE_CONFIG: &str = "vae/config.json";
const TEXT_CONFIG: &str = "text_encoder/config.json";
const SCHEDULER: &str = "scheduler/scheduler_config.json";
const TOKENIZER: &str = "tokenizer/tokenizer_config.json";
const INDEX: &str = "model_index.json";

fn model(name: &'static str, damage: fn(&Model), wanted: &'static [&'static str]) -> Case {
    Case { name, command: GENERATE, status: FAILED, wanted, damage }
}

fn flags(command: &'static str, wanted: &'static [&'static str]) -> Case {
    Case { name: command, command, status: USAGE, wanted, damage: |_| {} }
}

fn input(name: &'static str, command: &'static str, damage: fn(&Model), wanted: &'static [&'static str]) -> Case {
    Case { name, command, status: FAILED, wanted, damage }
}

fn directories() -> Vec<Case> {
    vec![
        model("no model directory", |m| m.remove(""), &["model", "no such directory", "unet/", "scheduler/"]),
        model(
            "a file in place of the directory",
            |m| {
                m.remove("");
                m.write("", b"");
            },
            &["model", "is empty", "download it again"],
        ),
        model("no UNet", |m| m.remove("unet"), &["model/unet", "no such directory"]),
        model("no scheduler", |m| m.remove("scheduler"), &["model/scheduler", "no such directory"]),
        model("no tokenizer", |m| m.remove("tokenizer"), &["model/tokenizer", "vocab.json and merges.txt"]),
        model("no UNet configuration", |m| m.remove(UNET_CONFIG), &["unet/config.json", "no such file"]),
        model(
            "index of SDXL",
            |m| m.set(INDEX, "text_encoder_2", json!(["transformers", "CLIPTextModel"])),
            &["model_index.json", "text_encoder_2", "Stable Diffusion 1.x or 2.x"],
        ),
        model(
            "index of SD 3",
            |m| m.set(INDEX, "transformer", json!(["diffusers", "SD3Transformer2DModel"])),
            &["model_index.json", "transformer", "Stable Diffusion 1.x or 2.x"],
        ),
        model("index that is no JSON", |m| m.write(INDEX, "{"), &["model_index.json", "not JSON"]),
        model("no weights", |m| m.remove(UNET), &["unet", "diffusion_pytorch_model.safetensors"]),
        model(
            "weights of the old form only",
            |m| {
                m.remove(UNET);
                m.write("unet/diffusion_pytorch_model.bin", b"PK");
            },
            &["unet", "diffusion_pytorch_model.bin", "safetensors"],
        ),
    ]
}

fn configurations() -> Vec<Case> {
    vec![
        model(
            "65537 ResNets per block",
            |m| m.set(UNET_CONFIG, "layers_per_block", 65537.into()),
            &["unet/config.json", "layers_per_block is 65537", "1 to 256"],
        ),
        model(
            "65537 layers of a text encoder",
            |m| m.set(TEXT_CONFIG, "num_hidden_layers", 65537.into()),
            &["text_encoder/config.json", "num_hidden_layers is 65537", "1 to 256"],
        ),
        model(
            "a VAE of 2^40 channels",
            |m| m.set(VAE_CONFIG, "block_out_channels", json!([1u64 << 40, 32])),
            &["vae/config.json", "block_out_channels is [1099511627776,32]", "1 to 65536"],
        ),
        model("half a UNet configuration", |m| m.keep_half(UNET_CONFIG), &["unet/config.json", "JSON", "download"]),
        model("a list as configuration", |m| m.write(VAE_CONFIG, "[]"), &["vae/config.json", "JSON object"]),
        model("configuration that is not UTF-8", |m| m.write(TEXT_CONFIG, b"\xff\xfe{}"), &[TEXT_CONFIG, "UTF-8"]),
        model(
            "class",
            |m| m.set(UNET_CONFIG, "_class_name", "UNet3DConditionModel".into()),
            &["unet/config.json", "_class_name", "UNet3DConditionModel", "UNet2DConditionModel"],
        ),
        model(
            "block type",
            |m| m.set(UNET_CONFIG, "down_block_types", json!(["KDownBlock2D", "DownBlock2D"])),
            &["unet/config.json", "down_block_types", "KDownBlock2D", "CrossAttnDownBlock2D"],
        ),
        model(
            "channels no multiple of the groups",
            |m| m.set(UNET_CONFIG, "norm_num_groups", 5.into()),
            &["unet/config.json", "block_out_channels", "5"],
        ),
        model("negative size", |m| m.set(UNET_CONFIG, "sample_size", (-64).into()), &["sample_size is -64"]),
        model("number as text", |m| m.set(UNET_CONFIG, "in_channels", "4".into()), &["in_channels is \"4\""]),
        model(
            "heads for three levels of two",
            |m| m.set(UNET_CONFIG, "attention_head_dim", json!([2, 2, 2])),
            &["unet/config.json", "attention_head_dim is [2,2,2]", "2"],
        ),
        model(
            "heads that do not divide",
            |m| m.set(UNET_CONFIG, "attention_head_dim", 3.into()),
            &["unet/config.json", "attention_head_dim is 3"],
        ),
        model("activation", |m| m.set(UNET_CONFIG, "act_fn", "mish".into()), &["act_fn is \"mish\"", "silu"]),
        model(
            "text of another width",
            |m| m.set(UNET_CONFIG, "cross_attention_dim", 768.into()),
            &["cross_attention_dim 768", "hidden_size 16"],
        ),
        model("scaling factor", |m| m.set(VAE_CONFIG, "scaling_factor", 0.into()), &["scaling_factor is 0", "above 0"]),
        model(
            "text activation",
            |m| m.set(TEXT_CONFIG, "hidden_act", "gelu_new".into()),
            &["text_encoder/config.json", "hidden_act is \"gelu_new\"", "quick_gelu"],
        ),
        model(
            "text heads",
            |m| m.set(TEXT_CONFIG, "num_attention_heads", 3.into()),
            &["num_attention_heads is 3", "hidden_size = 16"],
        ),
        model(
            "prediction type",
            |m| m.set(SCHEDULER, "prediction_type", "score".into()),
            &["scheduler_config.json", "prediction_type", "score"],
        ),
        model(
            "noise schedule",
            |m| m.set(SCHEDULER, "beta_schedule", "exotic".into()),
            &["scheduler_config.json", "beta_schedule", "exotic"],
        ),
        model(
            "scheduler class",
            |m| m.set(SCHEDULER, "_class_name", "FlowMatchEulerDiscreteScheduler".into()),
            &["scheduler_config.json", "FlowMatchEulerDiscreteScheduler"],
        ),
        model("no timesteps", |m| m.set(SCHEDULER, "num_train_timesteps", 0.into()), &["num_train_timesteps is 0"]),
        model("betas above 1", |m| m.set(SCHEDULER, "beta_end", 4.into()), &["scheduler_config.json", "beta"]),
    ]
}

fn weights() -> Vec<Case> {
    vec![
        model("half a weight file", |m| m.keep_half(UNET), &[UNET, "truncated", "download"]),
        model("an empty weight file", |m| m.write(VAE, b""), &[VAE, "empty"]),
        model(
            "a pointer in place of the weights",
            |m| m.write(UNET, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3438167540\n"),
            &[UNET, "git lfs pull"],
        ),
        model(
            "a web page in place of the weights",
            |m| m.write(TEXT, "<!DOCTYPE html><html></html>"),
            &[TEXT, "download"],
        ),
        model(
            "a tensor of another shape",
            |m| m.header(UNET, |header| header["conv_in.bias"]["shape"] = json!([2, 4])),
            &[UNET, "conv_in.bias", "[2, 4]", "[8]"],
        ),
        model(
            "a tensor under another name",
            |m| {
                m.header(VAE, |header| {
                    let tensor = header.remove("decoder.conv_in.bias").unwrap();
                    header.insert("decoder.conv_in.offset".into(), tensor);
                })
            },
            &[VAE, "decoder.conv_in.bias", "missing", "[16]", "decoder.conv_in.offset", "looks like it"],
        ),
        model(
            "a prefix before some of the names",
            |m| {
                m.header(UNET, |header| {
                    for key in ["mid_block.resnets.0.conv1.weight", "mid_block.resnets.0.conv1.bias"] {
                        let tensor = header.remove(key).unwrap();
                        header.insert(format!("module.{key}"), tensor);
                    }
                })
            },
            &[UNET, "mid_block.resnets.0.conv1.", "also missing: ", "(2 in all)", "module.mid_block.resnets.0.conv1."],
        ),
        model(
            "several variants",
            |m| {
                let bytes = m.read(UNET);
                m.remove(UNET);
                for variant in ["non_ema", "ema_only"] {
                    m.write(&format!("unet/diffusion_pytorch_model.{variant}.safetensors"), &bytes);
                }
            },
            &[UNET, "the variants ema_only, non_ema", "keep one of them"],
        ),
        model(
            "shards without their index",
            |m| {
                let bytes = m.read(UNET);
                m.remove(UNET);
                m.write("unet/diffusion_pytorch_model-00001-of-00001.safetensors", bytes);
            },
            &[UNET, "-00001-of-00001", "diffusion_pytorch_model.safetensors.index.json"],
        ),
        model(
            "integers as weights",
            |m| m.header(UNET, |header| header["conv_in.bias"]["dtype"] = integer_of(&header["conv_in.bias"])),
            &[UNET, "conv_in.bias", "wanted F32, F16, BF16"],
        ),
        model("not a number", |m| m.data(UNET, "conv_out.bias", &[0xff; 4]), &[UNET, "conv_out.bias", "not finite"]),
        model(
            "more layers than weights",
            |m| m.set(TEXT_CONFIG, "num_hidden_layers", 3.into()),
            &[TEXT, "encoder.layers.2.", "missing"],
        ),
        model(
            "a missing shard",
            |m| m.shard(|map| map["conv_in.bias"] = "shard-2.safetensors".into()),
            &["shard-2.safetensors", "shard is missing", "index.json"],
        ),
        model(
            "a shard's missing tensor",
            |m| m.shard(|map| drop(map.insert("x.weight".into(), "shard-1.safetensors".into()))),
            &["index.json", "x.weight", "no shard has it"],
        ),
        model(
            "a shard outside the directory",
            |m| m.shard(|map| map["conv_in.bias"] = "../../etc/passwd".into()),
            &["index.json", "../../etc/passwd", "plain name"],
        ),
    ]
}

/// An integer type of the tensor's width.
fn integer_of(tensor: &Value) -> Value {
    if tensor["dtype"] == "F32" { "I32".into() } else { "I16".into() }
}

fn tokenizers() -> Vec<Case> {
    vec![
        model("no merges", |m| m.remove("tokenizer/merges.txt"), &["tokenizer", "merges.txt is missing"]),
        model("half a vocabulary", |m| m.keep_half("tokenizer/vocab.json"), &["tokenizer/vocab.json", "complete"]),
        model(
            "another vocabulary's merges",
            |m| m.write("tokenizer/merges.txt", "#version: 0.2\nqq xx\n"),
            &["vocab.json", "qq", "belong together"],
        ),
        model(
            "merges of three",
            |m| m.write("tokenizer/merges.txt", "#version: 0.2\na b c\n"),
            &["merges.txt", "line 2"],
        ),
        model(
            "T5's tokenizer",
            |m| m.set(TOKENIZER, "tokenizer_class", "T5Tokenizer".into()),
            &["tokenizer_config.json", "T5Tokenizer", "CLIPTokenizer"],
        ),
        model("no room for a prompt", |m| m.set(TOKENIZER, "model_max_length", 1.into()), &["model_max_length is 1"]),
        model(
            "a padding token that nobody knows",
            |m| m.set("tokenizer/special_tokens_map.json", "pad_token", "[PAD]".into()),
            &["tokenizer", "[PAD]", "id 814", "vocab_size is 814"],
        ),
    ]
}

fn usage() -> Vec<Case> {
    vec![
        flags("generate", &["PROMPT"]),
        flags("generate cat dog --model MODEL", &["dog"]),
        flags("generate cat --model MODEL --size 0x64", &["--size", "0x64", "1024x768"]),
        flags("generate cat --model MODEL --size 64", &["--size", "64", "1024x768"]),
        flags("generate cat --model MODEL --method plain --size 33x32", &["33x32", "multiple"]),
        flags("generate cat --model MODEL --stages 16x16", &["--stages", "16x16", "WxH:steps"]),
        flags("generate cat --model MODEL --stages 16x16:0", &["--stages", "16x16:0", "1 to 1000"]),
        flags("generate cat --model MODEL --stages 16x16:1,17x16:1", &["--stages 17x16", "multiples of 2", "18x16"]),
        flags("generate cat --model MODEL --stages 16x16:2,32x32:1 --steps 7", &["--steps 7", "3 steps"]),
        flags("generate cat --model MODEL --stages 16x16:2,32x32:1 --size 64x64", &["--size 64x64", "32x32"]),
        flags("generate cat --model MODEL --steps 0", &["--steps", "1 to 1000"]),
        flags("generate cat --model MODEL --steps many", &["--steps", "many", "1 to 1000"]),
        flags("generate cat --model MODEL --eta 2", &["--eta", "0 (no fresh noise) to 1"]),
        flags("generate cat --model MODEL --scheduler euler --eta 0.5", &["--eta 0.5", "ddim"]),
        flags("generate cat --model MODEL --guidance nan", &["--guidance", "nan", "0 to 1000"]),
        flags("generate cat --model MODEL --scheduler dpm++", &["--scheduler", "dpm++", "euler-ancestral"]),
        flags("generate cat --model MODEL --method hires", &["--method", "hires", "megafusion++"]),
        flags("generate cat --model MODEL --method diffusehigh --refine-guidance 1", &["--refine-guidance", "above 1"]),
        flags("generate cat --model MODEL --method diffusehigh --wavelet-steps few", &["--wavelet-steps", "from 0"]),
        flags("generate cat --model MODEL --method diffusehigh --sharpen maybe", &["--sharpen", "maybe", "true"]),
        flags(
            "generate cat --model MODEL --method diffusehigh --stages 16x16:2,24x24:3",
            &["--stages 16x16:2,24x24:3", "the last of the first one's 2 steps"],
        ),
        flags(
            "generate cat --model MODEL --method diffusehigh --scheduler heun --size 64x64",
            &["--scheduler heun", "expected ddim or euler"],
        ),
        flags(
            "generate cat --model MODEL --method diffusehigh --stages 16x16:2,25x24:1",
            &["--stages 25x24", "multiples of 2"],
        ),
        flags(
            "generate cat --model MODEL --method plain --refine-guidance 5",
            &["--refine-guidance 5", "diffusehigh has it"],
        ),
        flags("generate cat --model MODEL --method upsample-guidance --up-scale 0", &["--up-scale", "from 1 to 64"]),
        flags("generate cat --model MODEL --method upsample-guidance --up-scale 1.5", &["--up-scale", "whole number"]),
        flags("generate cat --model MODEL --method upsample-guidance --up-theta 0", &["--up-theta", "above 0"]),
        flags("generate cat --model MODEL --method upsample-guidance --up-share 2", &["--up-share", "from 0 to 1"]),
        flags(
            "generate cat --model MODEL --method upsample-guidance --size 64x66",
            &["--up-scale 2", "32x33 latent cells", "multiples of 4"],
        ),
        flags(
            "generate cat --model MODEL --method upsample-guidance --stages 16x16:1,32x32:1",
            &["--stages 16x16:1,32x32:1", "one stage"],
        ),
        flags("generate cat --model MODEL --method plain --up-scale 2", &["--up-scale 2", "upsample-guidance has it"]),
        flags("generate cat --model MODEL --upsampler lanczos", &["--upsampler", "lanczos", "bicubic-torch"]),
        flags("generate cat --model MODEL --relay-clamp all", &["--relay-clamp", "all", "decode"]),
        flags(
            "generate cat --model MODEL --method plain --upsampler bilinear",
            &["--upsampler bilinear", "--method plain"],
        ),
        flags("generate cat --model MODEL --reschedule maybe", &["--reschedule", "maybe", "true"]),
        flags("generate cat --model MODEL --dilation 0", &["--dilation", "1 (none)"]),
        flags("generate cat --model MODEL --seed -2", &["-2"]),
        flags("generate cat --model MODEL --seed 18446744073709551615 --count 2", &["--seed", "2^64 - 1"]),
        flags("generate cat --model MODEL --count 0", &["--count", "1 to 10000"]),
        flags("generate cat --model MODEL --dtype f8", &["--dtype", "f8", "bf16"]),
        flags("generate cat --model MODEL --rng numpy", &["--rng", "numpy", "torch-cpu"]),
        flags("generate cat --model MODEL --device tpu", &["--device", "tpu", "cpu"]),
        flags("generate cat --model MODEL --out DIR/out.jpg", &["--out", "out.jpg", ".png"]),
        flags("generate cat --model MODEL --out DIR/x.png --dump DIR/x.png", &["--dump", "same file"]),
        flags("generate cat --model MODEL --colour red", &["--colour"]),
        flags("generate cat --model MODEL --cache teacache", &["--cache", "teacache", "easycache"]),
        flags("generate cat --model MODEL --cache-options threshold=1", &["--cache"]),
        flags("generate cat --model MODEL --cache ucache --cache-options m=3", &["--cache-options m=3", "threshold"]),
        flags(
            "generate cat --model MODEL --cache ucache --cache-options start=2",
            &["--cache-options start=2", "0 to 1"],
        ),
        flags(
            "generate cat --model MODEL --cache easycache --cache-options end=0.1",
            &["start=0.15,end=0.1", "before"],
        ),
        flags("generate cat --model MODEL --cache spectrum --cache-options m", &["--cache-options m", "key=value"]),
        flags(
            "generate cat --model MODEL --cache spectrum --method multidiffusion --size 64x64",
            &["--cache spectrum", "views"],
        ),
        flags("generate cat --model MODEL --size 400000x400000", &["--size", "400000x400000", "1 to 16384"]),
        flags("plan cat --model MODEL --size 0x0", &["--size", "0x0"]),
        flags("resize MODEL/in.png DIR/out.png", &["--size"]),
        flags("probe --model MODEL --module unet --out DIR/o.safetensors", &["--in", "--module unet"]),
        flags("probe --model MODEL --module text --out DIR/o.safetensors", &["--prompt", "--module text"]),
        flags("probe --model MODEL --module clip --out DIR/o.safetensors", &["--module", "clip", "vae-decode"]),
        flags("paint cat", &["paint"]),
    ]
}

/// Directories and files that are something else.
fn foreign() -> Vec<Case> {
    fn class(m: &Model, class: &str) {
        m.set(INDEX, "_class_name", class.into());
    }
    /// Nothing but one file of this name.
    fn only(m: &Model, name: &str, text: &str) {
        m.remove("");
        fs::create_dir_all(m.path(name).parent().unwrap()).unwrap();
        m.write(name, text);
    }
    fn channels(m: &Model, count: usize) {
        m.set(UNET_CONFIG, "in_channels", count.into());
    }
    vec![
        model(
            "the refiner's index",
            |m| {
                class(m, "StableDiffusionXLImg2ImgPipeline");
                m.set(INDEX, "text_encoder", json!([null, null]));
                m.set(INDEX, "text_encoder_2", json!(["transformers", "CLIPTextModelWithProjection"]));
                m.remove("text_encoder");
            },
            &["model_index.json", "is the SDXL refiner", "use the base model"],
        ),
        model(
            "the refiner's UNet",
            |m| {
                m.remove(INDEX);
                m.remove("text_encoder");
                m.set(UNET_CONFIG, "block_out_channels", json!([384, 768, 1536, 1536]));
            },
            &["unet/config.json", "is the SDXL refiner", "use the base model"],
        ),
        model(
            "SD 3 by its class",
            |m| class(m, "StableDiffusion3Pipeline"),
            &["model_index.json", "is of a StableDiffusion3Pipeline", "the model has no tokenizer_2"],
        ),
        model("FLUX", |m| class(m, "FluxPipeline"), &["model_index.json", "is FLUX, which is not supported"]),
        model("PixArt", |m| class(m, "PixArtSigmaPipeline"), &["is PixArt, which is not supported"]),
        model("Cascade", |m| class(m, "StableCascadePriorPipeline"), &["is Stable Cascade, which is not supported"]),
        model(
            "SVD",
            |m| class(m, "StableVideoDiffusionPipeline"),
            &["is Stable Video Diffusion, a video model, which"],
        ),
        model("text to video", |m| class(m, "TextToVideoSDPipeline"), &["is a text-to-video model, which is not"]),
        model("unCLIP", |m| class(m, "StableUnCLIPPipeline"), &["is Stable unCLIP, which is not supported"]),
        model("an upscaler", |m| channels(m, 7), &["unet/config.json", "is an upscaler", "in_channels is 7"]),
        model("InstructPix2Pix", |m| channels(m, 8), &["edits pictures", "in_channels is 8"]),
        model("a depth model", |m| channels(m, 5), &["reads depth", "in_channels is 5"]),
        model(
            "a transformer without an index",
            |m| only(m, "transformer/config.json", r#"{"_class_name": "FluxTransformer2DModel"}"#),
            &["transformer/config.json", "is FLUX", "FluxTransformer2DModel"],
        ),
        model(
            "a ControlNet's directory",
            |m| only(m, "config.json", r#"{"_class_name": "ControlNetModel"}"#),
            &["config.json", "is a ControlNet alone, not a whole model"],
        ),
        model(
            "a VAE's directory",
            |m| only(m, "config.json", r#"{"_class_name": "AutoencoderKL"}"#),
            &["config.json", "is a VAE alone, not a whole model"],
        ),
        model(
            "a text encoder's directory",
            |m| only(m, "config.json", r#"{"architectures": ["CLIPTextModel"]}"#),
            &["config.json", "is a text encoder alone, not a whole model"],
        ),
        model(
            "a LoRA's directory",
            |m| only(m, "pytorch_lora_weights.safetensors", ""),
            &["pytorch_lora_weights.safetensors", "is a LoRA, not a model: give it beside a model"],
        ),
    ]
}

/// Single files, adapters and VAEs in files of their own.
fn single_files() -> Vec<Case> {
    const FILE: &str =
        "generate cat --model MODEL/it.safetensors --method plain --size 32x32 --steps 1 --out DIR/o.png";
    const LORA: &str = "generate cat --model MODEL --lora MODEL/it.safetensors:0.5 --method plain --size 32x32 --steps 1 \
                        --out DIR/o.png";
    fn data(name: &str) -> Vec<u8> {
        fs::read(Path::new(MODEL).parent().unwrap().join("single-file").join(name)).unwrap()
    }
    vec![
        input("no such single file", FILE, |_| {}, &["it.safetensors", "o such file"]),
        input("no such checkpoint", "plan cat --model MODEL/it.ckpt", |_| {}, &["it.ckpt", "o such file"]),
        input(
            "half a checkpoint",
            "plan cat --model MODEL/it.ckpt",
            |m| m.write("it.ckpt", b"PK\x03\x04"),
            &["it.ckpt", "no directory of a zip archive", "download it again"],
        ),
        input("a GGUF file", "plan cat --model MODEL/it.gguf", |_| {}, &["it.gguf", "GGUF", "safetensors version"]),
        input(
            "a LoRA as a model",
            FILE,
            |m| m.write("it.safetensors", data("lora-kohya.safetensors")),
            &["it.safetensors", "is a LoRA", "beside a model"],
        ),
        input(
            "a VAE as a model",
            FILE,
            |m| m.write("it.safetensors", one_tensor("first_stage_model.decoder.up.0.block.0.conv1.weight", &[1])),
            &["it.safetensors", "a VAE alone"],
        ),
        input(
            "half a single file",
            FILE,
            |m| {
                m.write("it.safetensors", data("sd15.safetensors"));
                m.keep_half("it.safetensors");
            },
            &["it.safetensors", "truncated or damaged"],
        ),
        input("no such LoRA", LORA, |_| {}, &["it.safetensors", "o such file"]),
        input(
            "a LoRA that would run a command",
            "plan cat --model MODEL --lora MODEL/it.pt",
            |m| {
                m.write(
                    "it.pt",
                    b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.}.cos\nsystem\nU\x04true\x85R.",
                )
            },
            &["it.pt", "would call os.system", "was not run"],
        ),
        input(
            "a model as a LoRA",
            LORA,
            |m| m.write("it.safetensors", data("sd15.safetensors")),
            &["it.safetensors", "is no LoRA"],
        ),
        input(
            "a LoRA of another model",
            LORA,
            |m| m.write("it.safetensors", one_tensor("lora_unet_elsewhere.lora_up.weight", &[2, 2])),
            &["it.safetensors", "lora_unet_elsewhere", "for another family"],
        ),
        input(
            "half a LoRA",
            LORA,
            |m| m.write("it.safetensors", one_tensor("lora_unet_conv_in.lora_up.weight", &[2, 2])),
            &["it.safetensors", "lora_unet_conv_in.lora_up.weight", "its down is missing", "conv_in.weight"],
        ),
        input(
            "no such VAE",
            "plan cat --model MODEL --vae MODEL/it.safetensors",
            |_| {},
            &["it.safetensors", "o such file"],
        ),
        input(
            "a VAE without a VAE",
            "plan cat --model MODEL --vae MODEL/unet/diffusion_pytorch_model.safetensors",
            |_| {},
            &[UNET, "is no VAE"],
        ),
        flags(
            "generate cat --model MODEL --lora MODEL/it.safetensors:strong",
            &["--lora", "\"strong\"", "FILE:WEIGHT"],
        ),
        flags("generate cat --model MODEL --lora :1", &["--lora", "names no file"]),
    ]
}

fn files() -> Vec<Case> {
    const RESIZE: &str = "resize MODEL/in.png DIR/out.png --size 64x64";
    const PROBE: &str = "probe --model MODEL --module vae-decode --in MODEL/in.safetensors --out DIR/o.safetensors";
    vec![
        input(
            "a file as folder",
            "generate cat --model MODEL --out MODEL/model_index.json/out.png",
            |_| {},
            &["model_index.json/out.png", "cannot be made"],
        ),
        input(
            "a file as folder of a dump",
            "generate cat --model MODEL --dump MODEL/model_index.json/no/d.safetensors",
            |_| {},
            &["model_index.json/no/d.safetensors", "cannot be made"],
        ),
        input("a device that is not there", "generate cat --model MODEL --device cuda:4096", |_| {}, &["cuda:4096"]),
        input(
            "weights beyond f16",
            "generate cat --model MODEL --method plain --size 32x32 --steps 1 --dtype f16 --out DIR/out.png",
            |m| m.last_bias(1e6),
            &[UNET, "conv_out.bias", "too large for f16", "bf16"],
        ),
        input("no picture", RESIZE, |_| {}, &["in.png", "no such file"]),
        input("text as picture", RESIZE, |m| m.write("in.png", "no picture"), &["in.png", "not a PNG, JPEG or WebP"]),
        input("an empty picture", RESIZE, |m| m.write("in.png", ""), &["in.png", "empty"]),
        input(
            "half a picture",
            RESIZE,
            |m| {
                let png = encode_png(&[9; 40 * 30 * 3], 40, 30, PngText::default()).unwrap();
                m.write("in.png", &png[..png.len() / 2]);
            },
            &["in.png", "truncated"],
        ),
        input("a folder as picture", "resize MODEL/unet DIR/out.png --size 64x64", |_| {}, &["unet", "is a folder"]),
        input("no tensors", PROBE, |_| {}, &["in.safetensors"]),
        input("text as tensors", PROBE, |m| m.write("in.safetensors", "no tensors"), &["in.safetensors"]),
        input(
            "tensors under other names",
            PROBE,
            |m| fs::write(m.path("in.safetensors"), m.read(VAE)).unwrap(),
            &["in.safetensors", "latent"],
        ),
        input(
            "a latent with three channels",
            PROBE,
            |m| m.write("in.safetensors", one_tensor("latent", &[1, 3, 2, 2])),
            &["in.safetensors", "latent", "[1, 3, 2, 2]", "[N, 4, h, w]"],
        ),
        input(
            "an image in three dimensions",
            "probe --model MODEL --module vae-encode --in MODEL/in.safetensors --out DIR/o.safetensors",
            |m| m.write("in.safetensors", one_tensor("image", &[3, 8, 8])),
            &["in.safetensors", "image", "[3, 8, 8]", "[N, 3, H, W]"],
        ),
        input("a broken configuration", "plan cat --model MODEL", |m| m.keep_half(UNET_CONFIG), &["unet/config.json"]),
    ]
}

/// LoRAs and their relatives, learned words and VAEs that do not belong to the model, or whose parts do not belong together.
fn additions() -> Vec<Case> {
    const LORA: &str =
        "generate cat --model MODEL --lora MODEL/it.safetensors --method plain --size 32x32 --steps 1 --out DIR/o.png";
    const WORD: &str = "generate cat --model MODEL --embedding MODEL/it.safetensors --method plain --size 32x32 \
                        --steps 1 --out DIR/o.png";
    const OTHER_VAE: &str = "generate cat --model MODEL --vae MODEL/it.safetensors --method plain --size 32x32 --steps 1 \
                             --out DIR/o.png";
    /// `to_q` of the first attention, a matrix [8, 8].
    macro_rules! q {
        ($end:literal) => {
            concat!("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", $end)
        };
    }
    fn it(m: &Model, tensors: &[(&str, &[usize])]) {
        m.write("it.safetensors", tensors_of_zeros(tensors));
    }
    fn lora(name: &'static str, damage: fn(&Model), wanted: &'static [&'static str]) -> Case {
        input(name, LORA, damage, wanted)
    }
    fn reshape(m: &Model, name: &str, key: &str, shape: [usize; 4]) {
        m.header(name, |header| header[key]["shape"] = json!(shape));
    }
    vec![
        lora(
            "a LoRA of a wider model",
            |m| it(m, &[(q!(".lora_down.weight"), &[4, 320]), (q!(".lora_up.weight"), &[320, 4])]),
            &["it.safetensors", "attn1_to_q", "its change has shape [320, 320], wanted [8, 8]", "attn1.to_q.weight"],
        ),
        lora(
            "a LoRA of two ranks",
            |m| it(m, &[(q!(".lora_down.weight"), &[4, 8]), (q!(".lora_up.weight"), &[8, 3])]),
            &["it.safetensors", "[8, 3] and [4, 8] do not multiply"],
        ),
        lora(
            "a LoRA without up",
            |m| it(m, &[(q!(".lora_down.weight"), &[4, 8])]),
            &["it.safetensors", "its up is missing"],
        ),
        lora("an alpha alone", |m| it(m, &[(q!(".alpha"), &[])]), &["it.safetensors", "its alpha alone"]),
        lora(
            "DoRA's norms alone",
            |m| it(m, &[(q!(".dora_scale"), &[8, 1]), (q!(".alpha"), &[])]),
            &["it.safetensors", "its alpha and dora_scale alone"],
        ),
        lora(
            "DoRA's norms of another width",
            |m| {
                let up_and_down = [(q!(".lora_down.weight"), &[4, 8][..]), (q!(".lora_up.weight"), &[8, 4])];
                it(m, &[up_and_down[0], up_and_down[1], (q!(".dora_scale"), &[5, 1])]);
            },
            &["it.safetensors", "its DoRA norms have shape [5, 1], wanted 8"],
        ),
        lora(
            "half a LoHa",
            |m| it(m, &[(q!(".hada_w1_a"), &[8, 2]), (q!(".hada_w1_b"), &[2, 8]), (q!(".hada_w2_a"), &[8, 2])]),
            &["it.safetensors", "its hada_w2_b is missing"],
        ),
        lora(
            "a LoHa of two shapes",
            |m| {
                it(
                    m,
                    &[
                        (q!(".hada_w1_a"), &[8, 2]),
                        (q!(".hada_w1_b"), &[2, 8]),
                        (q!(".hada_w2_a"), &[8, 2]),
                        (q!(".hada_w2_b"), &[2, 7]),
                    ],
                )
            },
            &["it.safetensors", "its halves have shapes"],
        ),
        lora(
            "a LoKr of another size",
            |m| it(m, &[(q!(".lokr_w1"), &[2, 2]), (q!(".lokr_w2"), &[3, 3])]),
            &["it.safetensors", "its change has shape [6, 6], wanted [8, 8]"],
        ),
        lora(
            "a difference of another size",
            |m| it(m, &[(q!(".diff"), &[8, 9])]),
            &["it.safetensors", "[8, 9], wanted [8, 8]"],
        ),
        lora(
            "a LoRA of SDXL",
            |m| {
                let at = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q";
                let (down, up) = (format!("{at}.lora_down.weight"), format!("{at}.lora_up.weight"));
                it(m, &[(&down, &[4, 640]), (&up, &[640, 4])]);
            },
            &["it.safetensors", "lora_unet_input_blocks_4_1", "is it for another family"],
        ),
        lora("a LoRA of no tensors", |m| it(m, &[]), &["it.safetensors", "is no LoRA"]),
        lora(
            "half a LoRA's file",
            |m| {
                it(m, &[(q!(".lora_down.weight"), &[4, 8]), (q!(".lora_up.weight"), &[8, 4])]);
                m.keep_half("it.safetensors");
            },
            &["it.safetensors", "truncated or damaged"],
        ),
        lora(
            "a pointer in place of a LoRA",
            |m| m.write("it.safetensors", "version https://git-lfs.github.com/spec/v1\n"),
            &["it.safetensors", "git lfs pull"],
        ),
        input(
            "a learned word of SD 2",
            WORD,
            |m| it(m, &[("emb_params", &[2, 1024])]),
            &["it.safetensors", "emb_params", "have 1024 values, the text encoder's have 16", "another model"],
        ),
        input(
            "a learned word of SDXL",
            WORD,
            |m| it(m, &[("clip_l", &[1, 16]), ("clip_g", &[1, 1280])]),
            &["it.safetensors", "a learned word of SDXL"],
        ),
        input(
            "a LoRA as a learned word",
            WORD,
            |m| {
                it(m, &[(q!(".lora_down.weight"), &[4, 8]), (q!(".lora_up.weight"), &[8, 4])]);
            },
            &["it.safetensors", "2 tensors", "a learned word's file has one"],
        ),
        input(
            "half a learned word",
            WORD,
            |m| {
                it(m, &[("emb_params", &[2, 16])]);
                m.keep_half("it.safetensors");
            },
            &["it.safetensors", "not a complete .safetensors file"],
        ),
        input("no such learned word", WORD, |_| {}, &["it.safetensors", "o such file"]),
        input(
            "a VAE of 16 latent channels",
            OTHER_VAE,
            |m| {
                fs::copy(m.path(VAE), m.path("it.safetensors")).unwrap();
                reshape(m, "it.safetensors", "decoder.conv_in.weight", [4, 16, 3, 3]);
            },
            &["it.safetensors", "decoder.conv_in.weight", "has shape [4, 16, 3, 3], wanted [16, 4, 3, 3]"],
        ),
        input(
            "a VAE without its encoder",
            OTHER_VAE,
            |m| {
                fs::copy(m.path(VAE), m.path("it.safetensors")).unwrap();
                m.header("it.safetensors", |header| {
                    let keys: Vec<String> = header.keys().filter(|key| key.starts_with("encoder.")).cloned().collect();
                    for key in keys {
                        let tensor = header.remove(&key).unwrap();
                        header.insert(format!("lost.{key}"), tensor);
                    }
                });
            },
            &["it.safetensors", "tensor encoder.", "missing", "lost.encoder."],
        ),
    ]
}

/// Whole checkpoints in one file, with something missing.
fn damaged_checkpoints() -> Vec<Case> {
    const FILE: &str =
        "generate cat --model MODEL/it.safetensors --method plain --size 32x32 --steps 1 --out DIR/o.png";
    /// Takes the tensors whose keys begin so out of sight.
    fn without(m: &Model, file: &str, beginning: &str) {
        let path = Path::new(MODEL).parent().unwrap().join("single-file").join(file);
        m.write("it.safetensors", fs::read(path).unwrap());
        m.header("it.safetensors", |header| {
            let keys: Vec<String> = header.keys().filter(|key| key.starts_with(beginning)).cloned().collect();
            assert!(!keys.is_empty(), "{beginning}");
            for key in keys {
                let tensor = header.remove(&key).unwrap();
                header.insert(format!("lost.{key}"), tensor);
            }
        });
    }
    fn file(name: &'static str, damage: fn(&Model), wanted: &'static [&'static str]) -> Case {
        input(name, FILE, damage, wanted)
    }
    vec![
        file(
            "a checkpoint without its VAE",
            |m| without(m, "sd15.safetensors", "first_stage_model."),
            &["it.safetensors", "holds no vae", "full checkpoint"],
        ),
        file(
            "a checkpoint without its text encoder",
            |m| without(m, "sd15.safetensors", "cond_stage_model."),
            &["it.safetensors", "no text encoder", "full checkpoint"],
        ),
        file(
            "a checkpoint without its UNet",
            |m| without(m, "sd15.safetensors", "model.diffusion_model."),
            &["it.safetensors", "alone"],
        ),
        file(
            "SDXL without its first text encoder",
            |m| without(m, "sdxl.safetensors", "conditioner.embedders.0."),
            &["it.safetensors", "holds no text_encoder:"],
        ),
        file(
            "half the header of a checkpoint",
            |m| {
                without(m, "sd15.safetensors", "first_stage_model.decoder.mid.");
                let bytes = m.read("it.safetensors");
                m.write("it.safetensors", &bytes[..1000]);
            },
            &["it.safetensors", "truncated or damaged"],
        ),
        file(
            "a checkpoint whose header has another length",
            |m| {
                without(m, "sd15.safetensors", "first_stage_model.decoder.mid.");
                let mut bytes = m.read("it.safetensors");
                bytes[1] ^= 0x40;
                m.write("it.safetensors", &bytes);
            },
            &["it.safetensors", "truncated or damaged"],
        ),
        file(
            "a small model of no published size",
            |m| {
                let path = Path::new(MODEL).parent().unwrap().join("single-file/sd15.safetensors");
                m.write("it.safetensors", fs::read(path).unwrap());
            },
            &["it.safetensors", "has shape", "wanted"],
        ),
        model(
            "an end of text that is no id",
            |m| m.set(TEXT_CONFIG, "eos_token_id", (-1).into()),
            &["text_encoder/config.json", "eos_token_id is -1", "one token id"],
        ),
        model(
            "two ends of text",
            |m| m.set(TEXT_CONFIG, "eos_token_id", json!([1, 2])),
            &["text_encoder/config.json", "eos_token_id is [1,2]", "one token id"],
        ),
        model("a word of two ids", |m| m.write("tokenizer/vocab.json", "{\"a\": [1, 2]}"), &["tokenizer/vocab.json"]),
    ]
}

/// A safetensors file of f32 tensors of zeros.
fn tensors_of_zeros(tensors: &[(&str, &[usize])]) -> Vec<u8> {
    let bytes = vec![0; 4 * tensors.iter().map(|(_, shape)| shape.iter().product::<usize>()).max().unwrap_or(0)];
    let view = |shape: &[usize]| {
        let bytes = &bytes[..4 * shape.iter().product::<usize>()];
        safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.to_vec(), bytes).unwrap()
    };
    safetensors::serialize(tensors.iter().map(|(name, shape)| (*name, view(shape))), None).unwrap()
}

/// A safetensors file of one f32 tensor of zeros.
fn one_tensor(name: &str, shape: &[usize]) -> Vec<u8> {
    tensors_of_zeros(&[(name, shape)])
}

#[test]
fn every_bad_input_has_its_clear_error() {
    let groups = [
        directories(),
        configurations(),
        weights(),
        tokenizers(),
        usage(),
        foreign(),
        single_files(),
        additions(),
        damaged_checkpoints(),
        files(),
    ];
    let mut wrong = Vec::new();
    let mut count = 0;
    for case in groups.into_iter().flatten() {
        count += 1;
        if let Err(reason) = check(&case) {
            wrong.push(format!("{}: {reason}", case.name));
        }
    }
    assert!(count >= 150, "{count} cases");
    assert!(wrong.is_empty(), "{} of {count} cases:\n{}", wrong.len(), wrong.join("\n"));
}

fn check(case: &Case) -> Result<(), String> {
    let place = tempfile::tempdir().unwrap();
    let model = Model { folder: place.path().join("model") };
    let work = place.path().join("work");
    fs::create_dir(&work).unwrap();
    copy(Path::new(MODEL), &model.folder);
    (case.damage)(&model);
    let args: Vec<String> = case
        .command
        .split(' ')
        .map(|word| word.replace("MODEL", model.folder.to_str().unwrap()).replace("DIR", work.to_str().unwrap()))
        .collect();
    run(args.iter().map(OsString::from), place.path(), case.status, case.wanted)
}

/// Runs the program in `place/work` and looks at its status, its message, and at what it left in `place`.
fn run(args: impl Iterator<Item = OsString>, place: &Path, status: i32, wanted: &[&str]) -> Result<(), String> {
    let before = contents(place);
    let mut command = Command::new(env!("CARGO_BIN_EXE_megafuse"));
    command.args(args).current_dir(place.join("work")).env("RAYON_NUM_THREADS", "2").env_remove("RUST_BACKTRACE");
    let output = command.output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.code() != Some(status) {
        return Err(format!("ended with {}, expected {status}: {message}", output.status));
    }
    if message.contains("panicked") || message.contains("RUST_BACKTRACE") {
        return Err(format!("panicked: {message}"));
    }
    if let Some(missing) = wanted.iter().find(|part| !message.contains(*part)) {
        return Err(format!("the message lacks {missing:?}: {message}"));
    }
    if !output.stdout.is_empty() {
        return Err(format!("standard output has {:?}", String::from_utf8_lossy(&output.stdout)));
    }
    let after = contents(place);
    if before != after {
        let names: Vec<&PathBuf> = after.keys().filter(|name| !before.contains_key(*name)).collect();
        return Err(format!("files were left or changed: {names:?}"));
    }
    Ok(())
}

/// Every file below `folder`, with its size.
fn contents(folder: &Path) -> BTreeMap<PathBuf, u64> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            found.extend(contents(&entry.path()));
        } else {
            found.insert(entry.path(), entry.metadata().unwrap().len());
        }
    }
    found
}

/// The copy itself works: it is the damage that the other cases meet.
#[test]
fn the_undamaged_model_makes_a_picture() {
    let place = tempfile::tempdir().unwrap();
    let (model, work) = (place.path().join("model"), place.path().join("work"));
    fs::create_dir(&work).unwrap();
    copy(Path::new(MODEL), &model);
    let args = GENERATE.split(' ').map(|word| word.replace("MODEL", model.to_str().unwrap()));
    let args = args.map(|word| word.replace("DIR", work.to_str().unwrap()));
    let output = Command::new(env!("CARGO_BIN_EXE_megafuse")).args(args).current_dir(&work).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(contents(&work).len(), 1);
}

/// Prompts that are no error: empty, far too long, control characters; each a picture, the long one with a warning.
#[test]
fn odd_prompts_are_no_error() {
    let long = "a very long prompt, ".repeat(60) + "the end";
    for (prompt, warned) in [("", false), (" \t\n", false), ("\u{1b}[31m \u{7} \u{202e}", false), (long.as_str(), true)]
    {
        let place = tempfile::tempdir().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_megafuse"));
        let args = ["--model", MODEL, "--method", "plain", "--size", "32x32", "--steps", "1", "--out", "out.png"];
        let output = command.args(["generate", prompt]).args(args).current_dir(place.path()).output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{prompt:?}: {message}");
        assert_eq!(message.contains("the end"), warned, "{prompt:?}: {message}");
        assert!(place.path().join("out.png").is_file(), "{prompt:?}");
    }
}

/// Figures of a size that nobody can run are large, and no overflow.
#[test]
fn the_largest_size_can_be_planned() {
    let place = tempfile::tempdir().unwrap();
    let args = ["plan", "cat", "--model", MODEL, "--method", "plain", "--size", "16384x16384", "--json"];
    let output = Command::new(env!("CARGO_BIN_EXE_megafuse")).args(args).current_dir(place.path()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let plan: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(plan["total"]["macs"].as_f64().unwrap() > 1e15, "{plan}");
}

/// A prompt that is not UTF-8 is refused by its bytes, not by a panic.
#[cfg(unix)]
#[test]
fn a_prompt_that_is_not_utf_8_is_an_error() {
    use std::os::unix::ffi::OsStringExt;
    let place = tempfile::tempdir().unwrap();
    fs::create_dir(place.path().join("work")).unwrap();
    let prompt = OsString::from_vec(b"caf\xe9".to_vec());
    let args = [OsString::from("generate"), prompt, "--model".into(), MODEL.into()];
    run(args.into_iter(), place.path(), USAGE, &["UTF-8"]).unwrap();
}

/// An interrupted or failed run leaves an older picture of the same name alone.
#[test]
fn a_failed_run_leaves_the_older_picture() {
    let place = tempfile::tempdir().unwrap();
    let (model, work) = (Model { folder: place.path().join("model") }, place.path().join("work"));
    fs::create_dir(&work).unwrap();
    fs::write(work.join("out.png"), b"older").unwrap();
    copy(Path::new(MODEL), &model.folder);
    // Finite weights that overflow on the way: the failure comes after the computing.
    model.last_bias(3e38);
    let args = GENERATE.split(' ').map(|word| word.replace("MODEL", model.folder.to_str().unwrap()));
    let args = args.map(|word| word.replace("DIR", work.to_str().unwrap()).into());
    run(args, place.path(), FAILED, &["not finite"]).unwrap();
    assert_eq!(fs::read(work.join("out.png")).unwrap(), b"older");
}
