//! Published models by name, whose configurations need no file.

use serde_json::{Value, json};

use super::single_file::{Family, published_config};

/// A published model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PublishedModel {
    /// One of those that are also published in one file.
    Stable(Family),
    DeepFloyd(DeepFloydModel),
}

impl From<Family> for PublishedModel {
    fn from(family: Family) -> PublishedModel {
        PublishedModel::Stable(family)
    }
}

/// A published DeepFloyd IF.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeepFloydModel {
    /// IF-I-XL, stage I with 4.3 billion parameters.
    IXl,
    /// IF-I-L
    IL,
    /// IF-I-M
    IM,
    /// IF-II-L, stage II with 1.2 billion parameters.
    IiL,
}

impl PublishedModel {
    /// A file of it by its path (`unet/config.json`); `None`: it has no such file.
    pub fn config(self, name: &str) -> Option<String> {
        match (self, name) {
            (PublishedModel::Stable(family), name) => published_config(family, name),
            // google/t5-v1_1-xxl, as Stable Diffusion 3 has it.
            (PublishedModel::DeepFloyd(_), "text_encoder/config.json") => {
                published_config(Family::Sd3, "text_encoder_3/config.json")
            }
            (PublishedModel::DeepFloyd(model), name) => model.config(name).map(|config| config.to_string()),
        }
    }
}

impl DeepFloydModel {
    fn config(self, name: &str) -> Option<Value> {
        let enlarges = self == DeepFloydModel::IiL;
        Some(match name {
            "unet/config.json" => self.unet(),
            "scheduler/scheduler_config.json" => json!({
                "_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2", "clip_sample": true,
                "dynamic_thresholding_ratio": 0.95, "num_train_timesteps": 1000, "prediction_type": "epsilon",
                "sample_max_value": if enlarges { 1.0 } else { 1.5 }, "thresholding": true,
                "variance_type": "learned_range",
            }),
            "image_noising_scheduler/scheduler_config.json" if enlarges => json!({
                "_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000,
            }),
            _ => return None,
        })
    }

    fn unet(self) -> Value {
        let channels: &[usize] = match self {
            DeepFloydModel::IXl => &[704, 1408, 2112, 2816],
            DeepFloydModel::IL => &[320, 640, 960, 1280],
            DeepFloydModel::IM => &[192, 384, 576, 768],
            DeepFloydModel::IiL => &[160, 320, 640, 960, 1280],
        };
        let enlarges = self == DeepFloydModel::IiL;
        // Of the finest levels, which have no attention.
        let plain = if enlarges { 3 } else { 1 };
        let named = |cross: &str, plain_name: &str| -> Vec<String> {
            let of = |level| if level < plain { plain_name } else { cross };
            (0..channels.len()).map(|level| of(level).to_string()).collect()
        };
        let down = named("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D");
        let mut up = named("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D");
        up.reverse();
        let mut config = json!({
            "_class_name": "UNet2DConditionModel", "act_fn": "gelu", "addition_embed_type": "text",
            "addition_embed_type_num_heads": 64, "attention_head_dim": 64, "block_out_channels": channels,
            "cross_attention_dim": channels[channels.len() - 1], "cross_attention_norm": "group_norm",
            "down_block_types": down, "up_block_types": up, "encoder_hid_dim": 4096, "flip_sin_to_cos": true,
            "freq_shift": 0, "in_channels": 3, "out_channels": 6, "layers_per_block": 3,
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "norm_eps": 1e-05, "norm_num_groups": 32,
            "resnet_time_scale_shift": "scale_shift", "sample_size": 64,
        });
        if enlarges {
            let factor = 1.4142271248762552;
            for (key, value) in [
                ("in_channels", json!(6)),
                ("sample_size", json!(256)),
                ("layers_per_block", json!([2, 2, 3, 5, 5])),
                ("class_embed_type", json!("timestep")),
                ("time_embedding_dim", json!(1280)),
                ("time_embedding_act_fn", json!("gelu")),
                ("resnet_skip_time_act", json!(true)),
                ("resnet_out_scale_factor", json!(factor)),
                ("mid_block_scale_factor", json!(factor)),
            ] {
                config[key] = value;
            }
        }
        config
    }
}
