//! Stable Diffusion 3 through the library: what fits together, which methods run on a transformer, what is refused and how.
//! (`tests/oracle` has the values.)

#[path = "common/drawn.rs"]
mod drawn;
#[path = "common/place.rs"]
mod place;

use std::fs;

use megafuse::methods::{METHODS, Method, Size};
use megafuse::pipeline::{InitImage, InputPicture, ModelSource, Pipeline, Request, Silent, plan};
use megafuse::{DType, Device, Error};
use place::{copy, copy_changed};
use serde_json::{Value, json};

fn small(name: &str) -> Pipeline {
    let source = ModelSource::Directory(drawn::folder(&format!("sd3/{name}")));
    Pipeline::load(source, Device::cpu(), DType::F32).expect("a small model")
}

/// A copy of a small model with one key of a configuration changed, and what loading it says.
fn changed(name: &str, file: &str, key: &str, value: Value) -> String {
    let place = tempfile::tempdir().expect("a folder");
    let to = place.path().join("model");
    copy_changed(&drawn::folder(&format!("sd3/{name}")), &to, file, key, value);
    match Pipeline::load(ModelSource::Directory(to), Device::cpu(), DType::F32) {
        Ok(_) => format!("{file} with {key} changed loads"),
        Err(error) => error.to_string(),
    }
}

fn says(error: &str, parts: &[&str]) {
    for part in parts {
        assert!(error.contains(part), "{error:?} does not say {part:?}");
    }
}

#[test]
fn parts_that_do_not_fit_are_named_with_their_widths() {
    let transformer = "transformer/config.json";
    says(
        &changed("large", transformer, "joint_attention_dim", json!(12)),
        &["joint_attention_dim 12", "hidden_size", "together is 16", "must not be larger"],
    );
    says(
        &changed("medium", transformer, "pooled_projection_dim", json!(24)),
        &["pooled_projection_dim 24", "projection_dim", "together is 20"],
    );
    says(&changed("medium", transformer, "in_channels", json!(8)), &["in_channels 8", "latent_channels 4"]);
    says(&changed("medium", transformer, "joint_attention_dim", json!(32)), &["joint_attention_dim 32", "d_model 24"]);
    says(&changed("medium", transformer, "qk_norm", json!("layer_norm")), &["qk_norm is \"layer_norm\""]);
    says(
        &changed("medium", "scheduler/scheduler_config.json", "_class_name", json!("DDIMScheduler")),
        &["DDIMScheduler is not for flow matching", "Stable Diffusion 3"],
    );
    says(
        &changed("medium", "text_encoder_3/config.json", "feed_forward_proj", json!("relu")),
        &["feed_forward_proj is \"relu\""],
    );
}

fn refused(pipeline: &Pipeline, request: &Request) -> String {
    match pipeline.generate(request, &mut Silent) {
        Ok(_) => format!("{} makes a picture", request.method),
        Err(error) => error.to_string(),
    }
}

fn request(method: &str, size: &str) -> Request {
    let method = Method::named(method).expect("a method");
    let size = Some(size.parse().expect("a size"));
    Request { prompt: "a cat".into(), method, size, steps: Some(4), guidance: 3.0, ..Request::default() }
}

#[test]
fn sizes_are_made_of_patches_of_cells() {
    let pipeline = small("medium");
    assert_eq!((pipeline.factor(), pipeline.side_multiple()), (2, 4));
    says(&refused(&pipeline, &request("plain", "34x32")), &["34x32", "multiples of 4"]);
    // 24 patches of positions along a side.
    says(&refused(&pipeline, &request("plain", "100x32")), &["24"]);
    assert!(pipeline.generate(&request("plain", "96x4"), &mut Silent).is_ok());
}

/// A transformer has no blocks of a UNet; the other methods run on it as they are.
#[test]
fn every_method_runs_or_says_why_not() {
    let pipeline = small("dual");
    let mut ran = Vec::new();
    for spec in METHODS {
        match pipeline.generate(&request(spec.name, "64x64"), &mut Silent) {
            Ok(pictures) => {
                assert_eq!((pictures[0].width, pictures[0].height), (64, 64), "{spec}");
                ran.push(spec.name);
            }
            Err(error) => {
                let error = error.to_string();
                assert!(
                    ["UNet", "transformer", "flow", "ddim"].iter().any(|word| error.contains(word)),
                    "{spec}: {error}"
                );
            }
        }
    }
    assert_eq!(ran, ["plain", "megafusion", "hires-fix", "multidiffusion", "demofusion", "diffusehigh"]);
}

#[test]
fn what_is_for_unets_is_refused() {
    let pipeline = small("dual");
    says(&refused(&pipeline, &request("megafusion++", "64x64")), &["dilation 2", "transformer", "no convolutions"]);
    let scheduler = Some("ddim".parse().expect("a sampler"));
    let of_betas = Request { scheduler, ..request("plain", "32x32") };
    says(&refused(&pipeline, &of_betas), &["ddim"]);
}

/// Where the transformer sees patches of 2 x 2 cells of 2 pixels: phases of whole patches, dilated samples padded to whole ones, and
/// windows that are none are refused.
#[test]
fn views_are_whole_patches() {
    let pipeline = small("medium");
    let demofusion = request("demofusion", "64x44");
    let stages: Vec<String> =
        pipeline.resolve(&demofusion).expect("a run").stages().iter().map(ToString::to_string).collect();
    assert_eq!(stages, ["32x20:4", "64x44:4"]);
    let pictures = pipeline.generate(&demofusion, &mut Silent).expect("a picture");
    assert_eq!((pictures[0].width, pictures[0].height), (64, 44));

    let with = |name: &str, value: usize| {
        let method = Method::named("multidiffusion").and_then(|method| method.with(name, value)).expect("an option");
        Request { method, ..request("multidiffusion", "64x32") }
    };
    says(&refused(&pipeline, &with("window", 15)), &["window", "15", "patches of 2 x 2 cells", "a multiple of 2"]);
    assert!(pipeline.generate(&with("window", 14), &mut Silent).is_ok());
    // Half of the 16 cells that the model was trained at.
    let picture = InputPicture::new("a", Size::new(32, 32), vec![128; 3 * 32 * 32]).expect("a picture");
    let init_image = Some(InitImage::new(picture));
    let request = Request { init_image, ..request("multidiffusion", "64x32") };
    let enlarged = pipeline.enlarging(&request, Size::new(64, 64)).expect("a request");
    assert_eq!(enlarged.method.option("stride"), Some(&json!(8)));
}

#[test]
fn a_suited_request_goes_to_twice_the_sides_by_20_and_8_steps() {
    let source = ModelSource::Directory(drawn::folder("sd3/medium"));
    let size = Some("64x64".parse().expect("a size"));
    let request = Request { prompt: "a cat".into(), size, ..Request::suited_to(&source) };
    assert_eq!((request.method.name(), request.guidance), ("megafusion", 7.0));
    let stages: Vec<String> =
        small("medium").resolve(&request).expect("a run").stages().iter().map(ToString::to_string).collect();
    assert_eq!(stages, ["32x32:20", "64x64:8"]);
}

#[test]
fn pictures_of_a_batch_are_those_made_alone() {
    let pipeline = small("medium-3.5");
    let request = Request { count: 3, ..request("megafusion", "64x48") };
    let alone = pipeline.generate(&request, &mut Silent).expect("pictures");
    let together = pipeline.generate(&Request { batch: 3, ..request }, &mut Silent).expect("pictures");
    for (a, b) in alone.iter().zip(&together) {
        assert_eq!(a.rgb, b.rgb, "seed {}", a.seed);
    }
}

/// Of the published models, with their configurations alone: weights, and what a run needs.
#[test]
fn published_models_are_planned_from_their_configurations() {
    use megafuse::models::Family;
    use megafuse::pipeline::RandomShapes;
    for (family, transformer) in [(Family::Sd3, 2_028_328_000u64 + 192 * 192 * 1536), (Family::Sd35, 2_469_663_936)] {
        let source = ModelSource::Random(RandomShapes::Published(family.into()));
        let request = Request { prompt: "a cat".into(), ..Request::suited_to(&source) };
        let report = plan(&source, DType::BF16, &request).expect("a plan");
        let stages: Vec<String> = report.stages.iter().map(ToString::to_string).collect();
        assert_eq!(stages, ["1024x1024:20", "2048x2048:8"]);
        let parameters: Vec<(&str, u64)> = report.weights.iter().map(|part| (part.module, part.parameters)).collect();
        let clip = [("text_encoder", 123_060_480 + 768 * 768), ("text_encoder_2", 694_659_840)];
        let others = [("text_encoder_3", 4_762_310_656), ("transformer", transformer), ("vae", 83_819_683)];
        assert_eq!(parameters, [&clip[..], &others[..]].concat());
    }
}

#[test]
fn a_missing_part_is_named() {
    let place = tempfile::tempdir().expect("a folder");
    let to = place.path().join("model");
    copy(&drawn::folder("sd3/dual"), &to);
    fs::remove_dir_all(to.join("vae")).expect("a folder");
    match Pipeline::load(ModelSource::Directory(to), Device::cpu(), DType::F32) {
        Err(error @ (Error::File { .. } | Error::Config { .. })) => says(&error.to_string(), &["vae"]),
        other => panic!("{:?}", other.map(|_| "a model")),
    }
}
