//! config.json of UNet and VAE: the published classes' defaults, scalars and lists, and an error for everything else.

use megafuse::models::unet::{AttentionConfig, BlockConfig};
use megafuse::models::{ClipTextConfig, UnetConfig, VaeConfig};

fn unet(json: &str) -> UnetConfig {
    UnetConfig::from_json("unet/config.json", json).expect(json)
}

fn vae(json: &str) -> VaeConfig {
    VaeConfig::from_json("vae/config.json", json).expect(json)
}

fn block(channels: usize, resnets: usize, heads: usize) -> BlockConfig {
    let attention =
        (heads > 0).then(|| AttentionConfig { heads, layers: vec![1; resnets], only_cross_attention: false });
    BlockConfig { channels, resnets, attention, pixel: None }
}

#[test]
fn an_empty_unet_config_is_the_class_default() {
    let c = unet("{}");
    assert_eq!((c.in_channels, c.out_channels, c.sample_size, c.cross_attention_dim), (4, 4, None, 1280));
    assert_eq!(c.block_out_channels, [320, 640, 1280, 1280]);
    assert_eq!(c.down_blocks, [block(320, 2, 8), block(640, 2, 8), block(1280, 2, 8), block(1280, 2, 0)]);
    assert_eq!(c.up_blocks, [block(1280, 3, 0), block(1280, 3, 8), block(640, 3, 8), block(320, 3, 8)]);
    let mid = c.mid_block.as_ref().expect("the default has one");
    assert_eq!((mid.attention.as_ref(), mid.scale_factor), (block(1280, 1, 8).attention.as_ref(), 1.0));
    assert!(c.timestep.flip_sin_to_cos && c.timestep.freq_shift == 0.0 && c.timestep.dim == 320);
    assert_eq!((c.time_embed_dim, c.norm_num_groups, c.norm_eps), (1280, 32, 1e-5));
    assert_eq!((c.downsample_padding, c.conv_in_kernel, c.conv_out_kernel), (1, 3, 3));
    assert!(!c.center_input_sample && !c.use_linear_projection);
    assert_eq!(c.factor(), 8);
}

#[test]
fn unet_values_per_level() {
    let c = unet(
        r#"{"block_out_channels": [32, 64, 96], "layers_per_block": [1, 2, 3], "attention_head_dim": [1, 2, 3],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"], "sample_size": [48, 64],
            "transformer_layers_per_block": [1, 2, 4], "only_cross_attention": [true, true, false],
            "cross_attention_dim": [24, 24, 24], "mid_block_scale_factor": 2, "act_fn": "swish",
            "_class_name": "UNet2DConditionModel", "use_ema_warmup": true}"#,
    );
    let attention = |heads, layers: &[usize], only_cross_attention| {
        Some(AttentionConfig { heads, layers: layers.to_vec(), only_cross_attention })
    };
    let with = |channels, resnets, attention| BlockConfig { channels, resnets, attention, pixel: None };
    let down =
        [block(32, 1, 0), with(64, 2, attention(2, &[2, 2], true)), with(96, 3, attention(3, &[4, 4, 4], false))];
    assert_eq!(c.down_blocks, down);
    let up = [with(96, 4, attention(3, &[4; 4], false)), block(64, 3, 0), with(32, 2, attention(1, &[1; 2], true))];
    assert_eq!(c.up_blocks, up);
    let mid = c.mid_block.expect("the default has one");
    assert_eq!((mid.attention, mid.scale_factor), (attention(3, &[4], false), 2.0));
    assert_eq!((c.sample_size, c.cross_attention_dim), (Some([48, 64]), 24));
}

#[test]
fn unet_transformer_layers_per_resnet() {
    let c = unet(
        r#"{"block_out_channels": [32, 64], "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
            "transformer_layers_per_block": [[1, 2], 3], "reverse_transformer_layers_per_block": [[4, 5, 6], 7]}"#,
    );
    let layers =
        |blocks: &[BlockConfig]| blocks.iter().map(|b| b.attention.clone().map(|a| a.layers)).collect::<Vec<_>>();
    assert_eq!(layers(&c.down_blocks), [Some(vec![1, 2]), Some(vec![3, 3])]);
    assert_eq!(layers(&c.up_blocks), [Some(vec![4, 5, 6]), Some(vec![7, 7, 7])]);
    assert_eq!(c.mid_block.and_then(|mid| mid.attention).map(|a| a.layers), Some(vec![3]));
}

#[test]
fn unet_mid_block_types() {
    assert!(unet(r#"{"mid_block_type": null}"#).mid_block.is_none());
    assert!(unet(r#"{"mid_block_type": "UNetMidBlock2D"}"#).mid_block.expect("one ResNet").attention.is_none());
}

#[test]
fn unet_head_counts_under_either_name() {
    let c = unet(r#"{"num_attention_heads": 4, "attention_head_dim": 8}"#);
    assert_eq!(c.down_blocks[0].attention.as_ref().map(|a| a.heads), Some(4));
    let c = unet(r#"{"num_attention_heads": null, "attention_head_dim": [5, 10, 20, 20]}"#);
    assert_eq!(c.down_blocks[2].attention.as_ref().map(|a| a.heads), Some(20));
    assert_eq!(c.up_blocks[3].attention.as_ref().map(|a| a.heads), Some(5));
}

/// Blocks over pixels: a list of widths of heads is of the blocks in their order, on the way down and on the way up.
#[test]
fn heads_over_pixels_are_counted_as_published() {
    let c = unet(
        r#"{"block_out_channels": [32, 64], "down_block_types": ["SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"],
            "up_block_types": ["SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D"], "attention_head_dim": [8, 16],
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "only_cross_attention": true}"#,
    );
    let heads = |block: &BlockConfig| block.pixel.as_ref().and_then(|pixel| pixel.attention.as_ref()).map(|a| a.heads);
    assert_eq!(c.down_blocks.iter().map(heads).collect::<Vec<_>>(), [Some(4), Some(4)]);
    assert_eq!(c.up_blocks.iter().map(heads).collect::<Vec<_>>(), [Some(8), Some(2)]);
    let mid = c.mid_block.clone().and_then(|mid| mid.added_kv).expect("an attention");
    assert_eq!((mid.heads, mid.only_text), (4, true));
    assert!(c.is_of_pixels() && c.factor() == 2);
}

/// What is wrong, and what the message must name beside the file.
#[test]
fn bad_unet_configs_name_key_and_value() {
    let cases: &[(&str, &[&str])] = &[
        ("", &["not a JSON object"]),
        ("[1]", &["not a JSON object"]),
        (r#"{"_class_name": "UNet2DModel"}"#, &["_class_name", "UNet2DModel", "UNet2DConditionModel"]),
        (r#"{"in_channels": "4"}"#, &["in_channels", "\"4\"", "expected a number"]),
        (r#"{"in_channels": 0}"#, &["in_channels is 0", "from 1 to"]),
        (r#"{"in_channels": -4}"#, &["in_channels is -4"]),
        (r#"{"in_channels": 1e300}"#, &["in_channels is 1e"]),
        (r#"{"in_channels": 18446744073709551615}"#, &["in_channels is 18446744073709551615"]),
        (r#"{"block_out_channels": []}"#, &["block_out_channels is []"]),
        (r#"{"block_out_channels": [32, 64]}"#, &["down_block_types", "expected 2 entries"]),
        (r#"{"block_out_channels": [320, 640, 1280, 1281]}"#, &["1281 is not divisible", "32 groups"]),
        (r#"{"norm_num_groups": null}"#, &["norm_num_groups is null"]),
        (r#"{"norm_eps": 0}"#, &["norm_eps is 0", "above 0"]),
        (r#"{"attention_head_dim": 7}"#, &["attention_head_dim is 7", "not divisible"]),
        (r#"{"attention_head_dim": [8, 8]}"#, &["attention_head_dim is [8,8]", "a list of 4"]),
        (r#"{"layers_per_block": [2, 2, 2]}"#, &["layers_per_block", "a list of 4"]),
        (r#"{"only_cross_attention": 1}"#, &["only_cross_attention is 1", "true or false"]),
        (r#"{"cross_attention_dim": [768, 768, 768, 1024]}"#, &["cross_attention_dim", "equal widths"]),
        (
            r#"{"down_block_types": ["AttnDownBlock2D", "DownBlock2D", "DownBlock2D", "DownBlock2D"]}"#,
            &["down_block_types", "AttnDownBlock2D is not supported"],
        ),
        (r#"{"up_block_types": "UpBlock2D"}"#, &["up_block_types", "a list of names"]),
        (r#"{"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}"#, &["down_block_types", "DeepFloyd IF", "one kind"]),
        (r#"{"mid_block_type": "UNetMidBlockFlat"}"#, &["mid_block_type is \"UNetMidBlockFlat\"", "not supported"]),
        (r#"{"mid_block_scale_factor": 0}"#, &["mid_block_scale_factor is 0"]),
        (r#"{"act_fn": "mish"}"#, &["act_fn is \"mish\"", "silu", "gelu"]),
        (r#"{"addition_embed_type": "image"}"#, &["addition_embed_type is \"image\"", "not supported", "text_time"]),
        (r#"{"addition_embed_type": "text_time"}"#, &["addition_time_embed_dim is absent", "needs a number"]),
        (
            r#"{"addition_embed_type": "text_time", "addition_time_embed_dim": 1}"#,
            &["projection_class_embeddings_input_dim is absent"],
        ),
        (
            r#"{"addition_embed_type": "text_time", "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 1536}"#,
            &["projection_class_embeddings_input_dim is 1536", "more than 1536"],
        ),
        (r#"{"class_embed_type": "projection"}"#, &["class_embed_type", "projection"]),
        (r#"{"num_class_embeds": 1000}"#, &["num_class_embeds is 1000"]),
        (r#"{"encoder_hid_dim_type": "image_proj"}"#, &["encoder_hid_dim_type is \"image_proj\""]),
        (r#"{"time_cond_proj_dim": "256"}"#, &["time_cond_proj_dim is \"256\""]),
        (r#"{"time_embedding_type": "fourier"}"#, &["time_embedding_type", "fourier"]),
        (r#"{"resnet_time_scale_shift": "ada_group"}"#, &["resnet_time_scale_shift", "ada_group"]),
        (r#"{"dual_cross_attention": true}"#, &["dual_cross_attention is true"]),
        (r#"{"attention_type": "gated"}"#, &["attention_type", "gated"]),
        (r#"{"conv_in_kernel": 4}"#, &["conv_in_kernel is 4", "odd"]),
        (r#"{"downsample_padding": 2}"#, &["downsample_padding is 2"]),
        (r#"{"sample_size": [64, 64, 64]}"#, &["sample_size", "[height, width]"]),
        (r#"{"transformer_layers_per_block": [1, 1]}"#, &["transformer_layers_per_block", "a list of 4"]),
        (
            r#"{"transformer_layers_per_block": [[1, 1], 1, 1, 1]}"#,
            &["reverse_transformer_layers_per_block is absent", "must be given"],
        ),
        (
            r#"{"transformer_layers_per_block": [[1], 1, 1, 1], "reverse_transformer_layers_per_block": 1}"#,
            &["transformer_layers_per_block", "2 ResNets"],
        ),
    ];
    for (json, says) in cases {
        let error = UnetConfig::from_json("m/unet/config.json", json).expect_err(json).to_string();
        for part in [&["m/unet/config.json"], *says].concat() {
            assert!(error.contains(part), "{json}: {error:?} does not say {part:?}");
        }
    }
}

#[test]
fn an_empty_vae_config_is_the_class_default() {
    let c = vae("{}");
    assert_eq!((c.in_channels, c.out_channels, c.latent_channels, c.layers_per_block), (3, 3, 4, 1));
    assert_eq!((c.scaling_factor, c.shift_factor, c.norm_num_groups), (0.18215, 0.0, 32));
    assert_eq!((c.block_out_channels.as_slice(), c.factor(), c.sample_size), (&[64usize][..], 1, Some([32, 32])));
    assert!(c.use_quant_conv && c.use_post_quant_conv && c.mid_block_add_attention && c.force_upcast.is_none());
}

#[test]
fn vae_values() {
    let c =
        vae(r#"{"block_out_channels": [32, 64, 64], "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D",
            "DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"],
            "scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": false, "use_post_quant_conv": false,
            "latent_channels": 16, "layers_per_block": 2, "latents_mean": null, "force_upcast": false}"#);
    assert_eq!((c.factor(), c.latent_channels, c.scaling_factor, c.shift_factor), (4, 16, 1.5305, 0.0609));
    assert!(!c.use_quant_conv && !c.use_post_quant_conv && c.force_upcast == Some(false));
    assert_eq!(vae(r#"{"shift_factor": null}"#).shift_factor, 0.0);
}

#[test]
fn bad_vae_configs_name_key_and_value() {
    let cases: &[(&str, &[&str])] = &[
        ("{", &["not a JSON object"]),
        (r#"{"_class_name": "VQModel"}"#, &["_class_name", "VQModel", "AutoencoderKL"]),
        (r#"{"block_out_channels": [64, 64]}"#, &["down_block_types", "expected 2 entries"]),
        (r#"{"block_out_channels": [48]}"#, &["48 is not divisible"]),
        (r#"{"down_block_types": ["AttnDownEncoderBlock2D"]}"#, &["down_block_types", "not supported"]),
        (r#"{"up_block_types": ["AttnUpDecoderBlock2D"]}"#, &["up_block_types", "not supported"]),
        (r#"{"act_fn": "mish"}"#, &["act_fn is \"mish\""]),
        (r#"{"scaling_factor": 0}"#, &["scaling_factor is 0", "above 0"]),
        (r#"{"scaling_factor": "0.18"}"#, &["scaling_factor", "expected a number"]),
        (r#"{"latents_mean": [0, 0, 0, 0]}"#, &["latents_mean", "not supported"]),
        (r#"{"use_quant_conv": 0}"#, &["use_quant_conv is 0", "true or false"]),
        (r#"{"layers_per_block": [1, 2]}"#, &["layers_per_block is [1,2]"]),
    ];
    for (json, says) in cases {
        let error = VaeConfig::from_json("m/vae/config.json", json).expect_err(json).to_string();
        for part in [&["m/vae/config.json"], *says].concat() {
            assert!(error.contains(part), "{json}: {error:?} does not say {part:?}");
        }
    }
}

/// A configuration with `"layers_per_block": 65537` built layers for 90 s and then missed a tensor.
#[test]
fn counts_beyond_reason_are_refused_at_once() {
    let begin = std::time::Instant::now();
    let unet = |json: &str| UnetConfig::from_json("unet/config.json", json).map(drop);
    let vae = |json: &str| VaeConfig::from_json("vae/config.json", json).map(drop);
    let text = |json: &str| ClipTextConfig::from_json("text_encoder/config.json", json).map(drop);
    let unet_keys = [
        ("layers_per_block", 256),
        ("transformer_layers_per_block", 256),
        ("in_channels", 65536),
        ("out_channels", 65536),
        ("cross_attention_dim", 65536),
        ("attention_head_dim", 65536),
        ("num_attention_heads", 65536),
        ("norm_num_groups", 65536),
        ("time_embedding_dim", 65536),
        ("time_cond_proj_dim", 65536),
        ("conv_in_kernel", 31),
        ("conv_out_kernel", 31),
        ("sample_size", 16384),
    ];
    let vae_keys = [
        ("layers_per_block", 256),
        ("in_channels", 65536),
        ("out_channels", 65536),
        ("latent_channels", 65536),
        ("norm_num_groups", 65536),
        ("sample_size", 16384),
    ];
    let text_keys = [
        ("num_hidden_layers", 256),
        ("hidden_size", 65536),
        ("intermediate_size", 65536),
        ("num_attention_heads", 65536),
        ("vocab_size", 1 << 20),
        ("max_position_embeddings", 16384),
        ("eos_token_id", 1 << 20),
    ];
    type Read<'a> = &'a dyn Fn(&str) -> megafuse::Result<()>;
    type Most<'a> = &'a [(&'a str, u64)];
    let readers: [(&str, Read, Most); 3] = [
        ("unet/config.json", &unet, &unet_keys),
        ("vae/config.json", &vae, &vae_keys),
        ("text_encoder/config.json", &text, &text_keys),
    ];
    for (file, read, keys) in readers {
        for (key, most) in keys {
            // One more than is believed, and numbers that no counter holds.
            for value in [format!("{}", most + 1), "4294967296".into(), "18446744073709551615".into(), "1e30".into()] {
                let message = read(&format!("{{\"{key}\": {value}}}")).expect_err(key).to_string();
                let named = value.parse::<u64>().map_or("1e", |_| value.as_str()).to_string();
                let parts = [file, &format!("{key} is {named}")];
                assert!(parts.iter().all(|part| message.contains(part)), "{key} {value}: {message}");
            }
        }
    }
    // In lists, and by their product.
    for (json, wanted) in [
        (r#"{"block_out_channels": [65568, 640, 1280, 1280]}"#, "block_out_channels is [65568,"),
        (r#"{"sample_size": [64, 16385]}"#, "sample_size is [64,16385]"),
        (r#"{"layers_per_block": [2, 2, 257, 2]}"#, "layers_per_block is [2,2,257,2]"),
        (r#"{"attention_head_dim": [8, 8, 8, 65537]}"#, "attention_head_dim is [8,8,8,65537]"),
        (r#"{"transformer_layers_per_block": [1, 1, 300, 1]}"#, "transformer_layers_per_block is [1,1,300,1]"),
        (
            r#"{"layers_per_block": 200, "transformer_layers_per_block": 200}"#,
            "layers_per_block is 200: with transformer_layers_per_block these are",
        ),
        (
            r#"{"addition_embed_type": "text_time", "addition_time_embed_dim": 65537}"#,
            "addition_time_embed_dim is 65537",
        ),
    ] {
        let message = unet(json).expect_err(json).to_string();
        assert!(message.contains(wanted), "{json}: {message}");
    }
    let levels = serde_json::json!({
        "block_out_channels": vec![32; 17], "down_block_types": vec!["DownBlock2D"; 17], "up_block_types": vec!["UpBlock2D"; 17],
    });
    assert!(unet(&levels.to_string()).expect_err("17 levels").to_string().contains("at most 16 levels"));
    let message = vae(r#"{"block_out_channels": [65568]}"#).expect_err("too many channels").to_string();
    assert!(message.contains("block_out_channels is [65568]"), "{message}");
    let projects = r#"{"architectures": ["CLIPTextModelWithProjection"], "projection_dim": 65537}"#;
    assert!(text(projects).expect_err("too wide").to_string().contains("projection_dim is 65537"));
    assert!(begin.elapsed().as_secs() < 10, "{:?}", begin.elapsed());
}
