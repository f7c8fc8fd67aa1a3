//! Keys of the first Stable Diffusion code (`ldm`, and `sgm` for SDXL) to the keys of diffusers. Whatever depends on a
//! model's configuration is read off the keys themselves.

/// Layers that an LDM file and diffusers call by different names, beside those that are counted.
const UNET_NAMES: [(&str, &str); 10] = [
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("time_embed.cond_proj", "time_embedding.cond_proj"),
    ("label_emb.0.0", "add_embedding.linear_1"),
    ("label_emb.0.2", "add_embedding.linear_2"),
    ("input_blocks.0.0", "conv_in"),
    ("out.0", "conv_norm_out"),
    ("out.2", "conv_out"),
    ("middle_block.0", "mid_block.resnets.0"),
    ("middle_block.2", "mid_block.resnets.1"),
];
const RESNET_NAMES: [(&str, &str); 6] = [
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
];
const OPENCLIP_NAMES: [(&str, &str); 6] = [
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
    ("attn.out_proj", "self_attn.out_proj"),
    ("attn.in_proj", "self_attn.in_proj"),
];

/// `key` with the module `from` at its beginning called `to`.
fn renamed(key: &str, names: &[(&str, &str)]) -> Option<String> {
    names.iter().find_map(|(from, to)| {
        let rest = key.strip_prefix(from)?;
        (rest.is_empty() || rest.starts_with(['.', '_'])).then(|| format!("{to}{rest}"))
    })
}

/// `12.rest` as the number and the rest.
fn number(text: &str) -> Option<(usize, &str)> {
    let (number, rest) = text.split_once('.')?;
    Some((number.parse().ok()?, rest))
}

/// The largest number that follows `prefix` in a key, plus one.
pub(super) fn count<'a>(keys: impl Iterator<Item = &'a str>, prefix: &str) -> usize {
    keys.filter_map(|key| number(key.strip_prefix(prefix)?)).map(|(n, _)| n.saturating_add(1)).max().unwrap_or(0)
}

/// Input blocks of a level: its layers and its downsampler. `keys` are those of an LDM UNet, without their prefix.
pub(super) fn unet_level<'a>(keys: impl Iterator<Item = &'a str> + Clone) -> usize {
    let first = keys
        .clone()
        .filter(|key| key.contains(".0.op."))
        .filter_map(|key| Some(number(key.strip_prefix("input_blocks.")?)?.0));
    first.min().unwrap_or_else(|| count(keys, "input_blocks.")).max(1)
}

/// The key in diffusers of a UNet tensor; `level` as [`unet_level`] gives it. `None`: not a key of such a UNet.
pub(super) fn unet_key(key: &str, level: usize) -> Option<String> {
    let resnet = |rest: &str| renamed(rest, &RESNET_NAMES);
    if let Some(rest) = key.strip_prefix("middle_block.") {
        return match number(rest)? {
            (0, rest) => Some(format!("mid_block.resnets.0.{}", resnet(rest)?)),
            (1, rest) => Some(format!("mid_block.attentions.0.{rest}")),
            (2, rest) => Some(format!("mid_block.resnets.1.{}", resnet(rest)?)),
            _ => None,
        };
    }
    if let Some(name) = renamed(key, &UNET_NAMES) {
        return Some(name);
    }
    let (side, rest) = match key.strip_prefix("input_blocks.") {
        Some(rest) => ("down_blocks", rest),
        None => ("up_blocks", key.strip_prefix("output_blocks.")?),
    };
    let (index, rest) = number(rest)?;
    let (module, rest) = number(rest)?;
    let index = if side == "down_blocks" { index.checked_sub(1)? } else { index };
    let (block, layer) = (index / level, index % level);
    if let Some(rest) = rest.strip_prefix("op.") {
        return Some(format!("{side}.{block}.downsamplers.0.conv.{rest}"));
    }
    if let Some(rest) = rest.strip_prefix("conv.") {
        return Some(format!("{side}.{block}.upsamplers.0.conv.{rest}"));
    }
    match module {
        0 => Some(format!("{side}.{block}.resnets.{layer}.{}", resnet(rest)?)),
        1 => Some(format!("{side}.{block}.attentions.{layer}.{rest}")),
        _ => None,
    }
}

/// Layers of an LDM ControlNet's network from pictures to latents, activations counted as well. `keys` without their prefix.
pub(super) fn hint_layers<'a>(keys: impl Iterator<Item = &'a str>) -> usize {
    count(keys, "input_hint_block.")
}

/// The key in diffusers of a ControlNet's tensor; `level` as [`unet_level`] gives it, `hints` as [`hint_layers`]. `None`: not a key
/// of such a ControlNet.
pub(super) fn control_key(key: &str, level: usize, hints: usize) -> Option<String> {
    const EMBEDDING: &str = "controlnet_cond_embedding";
    if let Some(rest) = key.strip_prefix("input_hint_block.") {
        let (layer, rest) = number(rest)?;
        return Some(match layer / 2 {
            0 => format!("{EMBEDDING}.conv_in.{rest}"),
            _ if layer + 1 == hints => format!("{EMBEDDING}.conv_out.{rest}"),
            conv => format!("{EMBEDDING}.blocks.{}.{rest}", conv - 1),
        });
    }
    if let Some(rest) = key.strip_prefix("zero_convs.") {
        let (index, rest) = number(rest)?;
        return Some(format!("controlnet_down_blocks.{index}.{}", rest.strip_prefix("0.")?));
    }
    match key.strip_prefix("middle_block_out.0.") {
        Some(rest) => Some(format!("controlnet_mid_block.{rest}")),
        None => unet_key(key, level),
    }
}

/// The name that an LDM UNet has for a module of diffusers' UNet: the reverse of [`unet_key`]. `attention(b)`: has the
/// up block `b` attentions?
pub(super) fn unet_module(module: &str, level: usize, attention: impl Fn(usize) -> bool) -> Option<String> {
    let back = |rest: &str, names: &[(&str, &str)]| {
        names.iter().find_map(|(to, from)| Some(format!("{to}{}", rest.strip_prefix(from)?)))
    };
    let resnet = |rest: &str| back(rest, &RESNET_NAMES);
    if let Some(rest) = module.strip_prefix("mid_block.") {
        let (kind, rest) = rest.split_once('.')?;
        return match (kind, number(rest)?) {
            ("attentions", (0, rest)) => Some(format!("middle_block.1.{rest}")),
            ("resnets", (n, rest)) => Some(format!("middle_block.{}.{}", 2 * n, resnet(rest)?)),
            _ => None,
        };
    }
    let (side, down, rest) = if let Some(rest) = module.strip_prefix("down_blocks.") {
        ("input_blocks", true, rest)
    } else if let Some(rest) = module.strip_prefix("up_blocks.") {
        ("output_blocks", false, rest)
    } else {
        return back(module, &UNET_NAMES);
    };
    let (block, rest) = number(rest)?;
    let (kind, rest) = rest.split_once('.')?;
    let (layer, rest) = number(rest)?;
    let index = block * level + layer + usize::from(down);
    match kind {
        "resnets" => Some(format!("{side}.{index}.0.{}", resnet(rest)?)),
        "attentions" => Some(format!("{side}.{index}.1.{rest}")),
        "downsamplers" => Some(format!("{side}.{}.0.op", (block + 1) * level)),
        "upsamplers" => Some(format!("{side}.{}.{}.conv", (block + 1) * level - 1, 1 + usize::from(attention(block)))),
        _ => None,
    }
}

/// Levels of an LDM VAE; 0: these are not its keys.
pub(super) fn vae_levels<'a>(keys: impl Iterator<Item = &'a str>) -> usize {
    count(keys, "decoder.up.")
}

/// The key in diffusers of a VAE tensor. `None`: not a key of such a VAE.
pub(super) fn vae_key(key: &str, levels: usize) -> Option<String> {
    const ENDS: [(&str, &str); 1] = [("norm_out", "conv_norm_out")];
    const ATTENTION: [(&str, &str); 5] =
        [("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")];
    const SHORTCUT: [(&str, &str); 1] = [("nin_shortcut", "conv_shortcut")];
    if key.starts_with("quant_conv.") || key.starts_with("post_quant_conv.") {
        return Some(key.to_string());
    }
    let (coder, rest) = key.split_once('.')?;
    if coder != "encoder" && coder != "decoder" {
        return None;
    }
    let resnet = |rest: &str| renamed(rest, &SHORTCUT).unwrap_or_else(|| rest.to_string());
    if let Some(rest) = rest.strip_prefix("mid.") {
        let (name, rest) = rest.split_once('.')?;
        return match name {
            "block_1" => Some(format!("{coder}.mid_block.resnets.0.{}", resnet(rest))),
            "block_2" => Some(format!("{coder}.mid_block.resnets.1.{}", resnet(rest))),
            "attn_1" => Some(format!("{coder}.mid_block.attentions.0.{}", renamed(rest, &ATTENTION)?)),
            _ => None,
        };
    }
    let (side, rest) = match rest.split_once('.')? {
        ("down", rest) => ("down_blocks", rest),
        ("up", rest) => ("up_blocks", rest),
        _ => return Some(format!("{coder}.{}", renamed(rest, &ENDS).unwrap_or_else(|| rest.to_string()))),
    };
    let (level, rest) = number(rest)?;
    let level = if side == "up_blocks" { levels.checked_sub(level + 1)? } else { level };
    let (kind, rest) = rest.split_once('.')?;
    match kind {
        "block" => {
            let (layer, rest) = number(rest)?;
            Some(format!("{coder}.{side}.{level}.resnets.{layer}.{}", resnet(rest)))
        }
        "downsample" => Some(format!("{coder}.{side}.{level}.downsamplers.0.{rest}")),
        "upsample" => Some(format!("{coder}.{side}.{level}.upsamplers.0.{rest}")),
        _ => None,
    }
}

/// Layers of an OpenCLIP text encoder.
pub(super) fn openclip_layers<'a>(keys: impl Iterator<Item = &'a str>) -> usize {
    count(keys, "transformer.resblocks.")
}

/// The key in transformers of an OpenCLIP tensor; that of a stacked `in_proj` stands for three, as [`thirds`] names them.
/// `None`: no layer of a text encoder.
pub(super) fn openclip_key(key: &str) -> Option<String> {
    const NAMES: [(&str, &str); 4] = [
        ("token_embedding", "text_model.embeddings.token_embedding"),
        ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
        ("ln_final", "text_model.final_layer_norm"),
        ("text_projection", "text_projection.weight"),
    ];
    match key.strip_prefix("transformer.resblocks.") {
        Some(rest) => {
            let (layer, rest) = number(rest)?;
            Some(format!("text_model.encoder.layers.{layer}.{}", renamed(rest, &OPENCLIP_NAMES)?))
        }
        None => renamed(key, &NAMES),
    }
}

/// `a.in_proj_weight` as `a.q_proj.weight`, `a.k_proj.weight`, `a.v_proj.weight`.
pub(super) fn thirds(key: &str) -> Option<[String; 3]> {
    let (module, kind) = key.split_once(".in_proj_")?;
    Some(["q", "k", "v"].map(|name| format!("{module}.{name}_proj.{kind}")))
}
