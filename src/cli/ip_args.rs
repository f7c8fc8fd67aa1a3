//! The flags of pictures as prompts.

use std::path::PathBuf;

use clap::Args;
use megafuse::pipeline::{InputPicture, IpAdapterFile, IpImage, Pipeline, Request};
use megafuse::{Error, Result};

use super::values;

/// What stands for a prompt that is empty beside a picture, and for its negative: those of the published examples.
const WORDS: (&str, &str) =
    ("best quality, high quality", "monochrome, lowres, bad anatomy, worst quality, low quality");

#[derive(Args)]
pub struct IpArgs {
    /// An IP-Adapter, which lets --ip-image stand beside the prompt, where wanted with its scale: FILE:0.6 (default scale: 1)
    ///
    /// May be given several times. Of Stable Diffusion 1.x or XL, base or plus, in .safetensors or .bin; 0.5 to 0.8 leave the
    /// prompt its say. With every method.
    #[arg(long, value_name = "FILE[:SCALE]", value_parser = values::library::<IpAdapterFile>,
          help_heading = "Pictures as prompts")]
    pub ip_adapter: Vec<IpAdapterFile>,

    /// A picture for --ip-adapter: PNG, JPEG or WebP
    ///
    /// May be given several times: one adapter shows all of them at once; several adapters take one each, in their order, or all
    /// the same one. The square in its middle is seen. Without a prompt the words are "best quality, high quality", and the
    /// negative ones those of the adapters' examples.
    #[arg(long, value_name = "FILE", value_parser = values::path(), requires = "ip_adapter",
          help_heading = "Pictures as prompts")]
    pub ip_image: Vec<PathBuf>,

    /// Where an --ip-image counts: white it does, black it does not; one mask for all, or one for each in their order
    ///
    /// none: everywhere. A grey picture, of any size: it is stretched to that of the stage, and its levels from 128 on count as white. With
    /// methods that run every step on the whole map.
    #[arg(long, value_name = "FILE", value_parser = values::path(), requires = "ip_image",
          help_heading = "Pictures as prompts")]
    pub ip_mask: Vec<PathBuf>,

    /// The folder of the image encoder that the adapters were trained with (default: image_encoder beside the first of them)
    ///
    /// It holds config.json and model.safetensors (or .bin): ViT-H for most adapters, bigG for SDXL's base one.
    #[arg(long, value_name = "DIR", value_parser = values::path(), requires = "ip_adapter",
          help_heading = "Pictures as prompts")]
    pub ip_encoder: Option<PathBuf>,
}

impl IpArgs {
    /// The pictures, read.
    ///
    /// # Errors
    /// Those of the files; [`Error::Request`]: numbers of adapters, pictures and masks that do not go together.
    pub fn images(&self) -> Result<Vec<IpImage>> {
        let (adapters, images, masks) = (self.ip_adapter.len(), self.ip_image.len(), self.ip_mask.len());
        let refused = |field, paths: &[PathBuf], reason: String| {
            let value = paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(" ");
            Err(Error::Request { field, value, reason })
        };
        if images == 0 {
            return Ok(Vec::new()); // where there are adapters, the run says what is missing
        }
        if adapters > 1 && images > 1 && images != adapters {
            let reason = format!("{adapters} adapters take one picture each, or all the same one; there are {images}");
            return refused("ip_images", &self.ip_image, reason);
        }
        if masks > 1 && masks != images {
            let reason = format!("{images} pictures take one mask each, or all the same one; there are {masks}");
            return refused("ip_masks", &self.ip_mask, reason);
        }
        let read = |path: &PathBuf| InputPicture::read(path);
        let pictures = self.ip_image.iter().map(read).collect::<Result<Vec<_>>>()?;
        let mask = |path: &PathBuf| (path.as_os_str() != "none").then(|| read(path)).transpose();
        let masks = self.ip_mask.iter().map(mask).collect::<Result<Vec<_>>>()?;
        let mask = |image: usize| masks.get(image).or(masks.first()).cloned().flatten();
        let of =
            |adapter: usize, image: usize| IpImage { adapter, picture: pictures[image].clone(), mask: mask(image) };
        Ok(match (adapters, images) {
            (0 | 1, _) => (0..images).map(|image| of(0, image)).collect(),
            (_, 1) => (0..adapters).map(|adapter| of(adapter, 0)).collect(),
            _ => (0..adapters).map(|adapter| of(adapter, adapter)).collect(),
        })
    }
}

/// The request with words where it has pictures alone; negative ones where `pipeline` reads them.
pub fn worded(request: Request, pipeline: &Pipeline) -> Request {
    let wordless = request.prompt.trim().is_empty() && request.negative_prompt.is_none();
    if request.ip_images.is_empty() || !wordless {
        return request;
    }
    let negative_prompt = pipeline.guides(&request).then(|| WORDS.1.into());
    Request { prompt: WORDS.0.into(), negative_prompt, ..request }
}
