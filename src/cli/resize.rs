//! `megafuse resize`: the relay's upsampler on a picture.

use std::path::Path;

use megafuse::image::{PngText, encode_png, from_bytes, read_image, to_bytes};
use megafuse::ops::resize;
use megafuse::{DType, Device, Error, Result, Tensor};

use super::args::ResizeArgs;
use super::output;

pub fn run(args: &ResizeArgs) -> Result<()> {
    check_png(&args.output)?;
    output::check_writable(&args.output)?;
    let (width, height, pixels) = read_image(&args.input)?;
    // In the relay's own range, [-1, 1] in f32, clamped after the filter.
    let x = Tensor::from_f32(&Device::cpu(), &[1, height, width, 3], DType::F32, &from_bytes(&pixels))?;
    let y = resize(&x, [args.size.height, args.size.width], args.upsampler, Some((-1.0, 1.0)), None)?;
    let pixels = to_bytes(&y.to_f32_vec()?)?;
    output::replace(&args.output, &encode_png(&pixels, args.size.width, args.size.height, PngText::default())?)?;
    output::print_name(&args.output);
    Ok(())
}

fn check_png(path: &Path) -> Result<()> {
    match path.extension() {
        Some(extension) if !extension.eq_ignore_ascii_case("png") => {
            Err(Error::file(path, "the result is written as PNG; give a name that ends in .png"))
        }
        _ => Ok(()),
    }
}
