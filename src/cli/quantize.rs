//! `megafuse quantize`: a model once more, in less room.

use megafuse::Result;
use megafuse::pipeline::{ModelSource, quantize, unfinished_output};

use super::args::QuantizeArgs;
use super::console::say;
use super::memory::bytes_text;
use super::output;

pub fn run(args: &QuantizeArgs) -> Result<()> {
    let source = ModelSource::at(&args.model).with(args.lora.clone(), Vec::new(), None);
    output::remove_on_interrupt(unfinished_output(&args.out));
    let done = quantize(&source, &args.out, &mut |path| say!("{} ...", path.display()))?;
    done.warnings.iter().for_each(|warning| say!("warning: {warning}"));
    let [before, after] = done.bytes.map(bytes_text);
    let merged = match done.merged {
        0 => String::new(),
        count => format!(", {count} tensors changed by LoRAs"),
    };
    say!("{} weights in 8 bits{merged}: {before} became {after}", done.weights);
    output::print_name(&args.out);
    Ok(())
}
