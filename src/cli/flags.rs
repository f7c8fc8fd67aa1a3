//! The library speaks of the fields of a request and of the options of methods; here they are flags.

use megafuse::Error;
use megafuse::pipeline::METHODS;

/// Fields of the request and what they are here.
const FLAGS: [(&str, &str); 42] = [
    ("batch", "--batch"),
    ("cache", "--cache"),
    ("cache_options", "--cache-options"),
    ("choices", "--choices"),
    ("control_end", "--control-end"),
    ("control_image", "--control-image"),
    ("control_scale", "--control-scale"),
    ("control_start", "--control-start"),
    ("count", "--count"),
    ("eta", "--eta"),
    ("guidance", "--guidance"),
    ("guidance_high", "--guidance-high"),
    ("guidance_rescale", "--guidance-rescale"),
    ("init_image", "--init-image"),
    ("ip_adapters", "--ip-adapter"),
    ("ip_encoder", "--ip-encoder"),
    ("ip_images", "--ip-image"),
    ("ip_masks", "--ip-mask"),
    ("lora", "--lora"),
    ("lowres", "--lowres"),
    ("mask", "--mask"),
    ("method", "--method"),
    ("negative_prompt", "--negative"),
    ("noise_level", "--noise-level"),
    ("resadapter", "--resadapter"),
    ("scheduler", "--scheduler"),
    ("second.guidance", "--upscale-guidance"),
    ("second.method", "--upscale-method"),
    ("second.size", "--upscale-stages"),
    ("second.stages", "--upscale-stages"),
    ("second.steps", "--upscale-steps"),
    ("sigmas", "--sigmas"),
    ("size", "--size"),
    ("size_ids.crop", "--crop"),
    ("size_ids.original", "--original-size"),
    ("size_ids.target", "--target-size"),
    ("stages", "--stages"),
    ("steps", "--steps"),
    ("strength", "--strength"),
    ("text.clip_skip", "--clip-skip"),
    ("text.syntax", "--prompt-syntax"),
    ("text.t5_length", "--t5-length"),
];

/// `relay-clamp` of a method's option `relay_clamp`.
pub fn long(option: &str) -> String {
    option.replace('_', "-")
}

/// The flag of a request's field or a method's option.
fn flag(name: &str) -> Option<String> {
    if let Some((_, flag)) = FLAGS.iter().find(|(field, _)| *field == name) {
        return Some(flag.to_string());
    }
    let option = METHODS.iter().find_map(|spec| spec.option(name))?;
    Some(format!("--{}", long(option.name)))
}

/// A text of the library with its `request.stages` as `--stages`.
pub fn named(text: &str) -> String {
    const BEFORE: &str = "request.";
    let (mut out, mut rest) = (String::new(), text);
    while let Some((before, after)) = rest.split_once(BEFORE) {
        out.push_str(before);
        let end = after.find(|c: char| !(c.is_ascii_lowercase() || c == '_' || c == '.')).unwrap_or(after.len());
        let name = after[..end].trim_end_matches('.');
        rest = match flag(name) {
            Some(flag) => {
                out.push_str(&flag);
                &after[name.len()..]
            }
            None => {
                out.push_str(BEFORE);
                after
            }
        };
    }
    out + rest
}

/// An error as the command line says it.
pub fn error_text(error: &Error) -> String {
    match error {
        Error::Request { field, value, reason } => match flag(field) {
            Some(flag) => format!("{flag} {}: {}", named(value), named(reason)),
            None => error.to_string(), // the command line's own
        },
        other => named(&other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::cli::args::Cli;

    #[test]
    fn every_flag_is_one() {
        let command = Cli::command();
        let generate = command.find_subcommand("generate").expect("a command");
        let options = METHODS.iter().flat_map(|spec| spec.options).map(|option| flag(option.name).expect("an option"));
        for flag in FLAGS.iter().map(|(_, flag)| flag.to_string()).chain(options) {
            assert!(generate.get_arguments().any(|arg| arg.get_long() == flag.strip_prefix("--")), "{flag}");
        }
    }

    #[test]
    fn fields_become_flags() {
        for (text, want) in [
            ("the request.stages have 5 steps", "the --stages have 5 steps"),
            ("use request.steps.", "use --steps."),
            ("request.size_ids.crop, request.relay_clamp", "--crop, --relay-clamp"),
            ("a request.json and request.", "a request.json and request."),
            ("", ""),
        ] {
            assert_eq!(named(text), want);
        }
        let error =
            |field| Error::Request { field, value: "with request.size".into(), reason: "or request.eta".into() };
        assert_eq!(error_text(&error("text.clip_skip")), "--clip-skip with --size: or --eta");
        assert_eq!(error_text(&error("--cell")), "--cell with request.size: or request.eta");
        assert_eq!(error_text(&Error::config("a", "request.eta")), "a: --eta");
    }
}
