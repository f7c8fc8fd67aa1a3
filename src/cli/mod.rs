//! The command line program: flags become a request of the library, its events progress, its results files.

mod args;
mod batch;
mod bench;
mod canvas;
mod cases;
mod check;
mod console;
mod control_args;
mod doctor;
mod enlarge;
mod flags;
mod from;
mod generate;
mod grid;
mod hub;
mod ip_args;
mod manifest;
mod memory;
mod method_options;
mod output;
mod picture_args;
mod pixel_args;
mod plan;
mod predict;
mod probe;
mod profile;
mod progress;
mod quantize;
mod resize;
mod run_folder;
mod safetensors_file;
mod serve;
mod session;
mod sheet;
mod strip;
mod upscale;
mod values;

use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches};
use megafuse::{Error, Result};

use args::{Cli, Command};
use console::say;

const FAILED: u8 = 1;
const WRONG_USAGE: u8 = 2;
const INTERRUPTED: u8 = 130;

pub fn main() -> ExitCode {
    let ended = parse().and_then(|cli| Ok(run(cli).and_then(|()| console::check_lost())?));
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(Ending::Usage(message)) => help_or_wrong_usage(&message),
        Err(Ending::Failed(error)) => {
            output::remove_made_folders();
            say!("error: {}{}", with_causes(&error), flags_for(&error));
            ExitCode::from(match error {
                Error::Request { .. } => WRONG_USAGE,
                Error::Interrupted => INTERRUPTED,
                _ => FAILED,
            })
        }
    }
}

/// Why the program ends without having run.
enum Ending {
    /// Wrong usage, or help that was asked for.
    Usage(Box<clap::Error>),
    Failed(Error),
}

impl From<clap::Error> for Ending {
    fn from(error: clap::Error) -> Ending {
        Ending::Usage(Box::new(error))
    }
}

impl From<Error> for Ending {
    fn from(error: Error) -> Ending {
        Ending::Failed(error)
    }
}

/// Numbers may be negative: `--seed -1` is a flag and its value, as `--seed=-1` is.
fn parse() -> std::result::Result<Cli, Ending> {
    let takes_negative = |arg: clap::Arg| {
        let takes_values = arg.get_action().takes_values();
        arg.allow_negative_numbers(takes_values)
    };
    let of_command = |command: clap::Command| {
        command.mut_args(takes_negative).mut_subcommands(|command| command.mut_args(takes_negative))
    };
    let mut command = Cli::command()
        .mut_subcommands(of_command)
        .mut_subcommand("enlarge", enlarge::adapted)
        .mut_subcommand("serve", serve::adapted);
    let matches = command.try_get_matches_from_mut(std::env::args_os())?;
    match from::expanded(&matches)? {
        None => Ok(Cli::from_arg_matches(&matches)?),
        Some((picture, args)) => {
            let matches = command.try_get_matches_from_mut(args).map_err(|error| from::wrong(&picture, &error))?;
            Ok(Cli::from_arg_matches(&matches)?)
        }
    }
}

/// Help and the version on standard output, with status 0; wrong usage on standard error, with status 2.
fn help_or_wrong_usage(message: &clap::Error) -> ExitCode {
    let printed = message.print();
    match printed {
        Err(error) if !message.use_stderr() => console::lose(error),
        _ => {}
    }
    match console::check_lost() {
        Err(error) => {
            say!("error: {}", with_causes(&error));
            ExitCode::from(FAILED)
        }
        Ok(()) => ExitCode::from(message.exit_code().clamp(0, 255) as u8),
    }
}

fn run(cli: Cli) -> Result<()> {
    megafuse::ops::cpu_level()?; // a wrong variable is said before it is passed over
    match cli.command {
        Command::Generate(mut args) => {
            output::end_at_once_on_interrupt()?;
            hub::resolve_for_run(&mut args.run)?;
            generate::run(&args)
        }
        Command::Grid(mut args) => {
            output::end_at_once_on_interrupt()?;
            hub::resolve_for_run(&mut args.run)?;
            grid::run(&args)
        }
        Command::Enlarge(mut args) => {
            output::end_at_once_on_interrupt()?;
            hub::resolve_for_run(&mut args.run)?;
            enlarge::run(*args)
        }
        Command::Serve(mut args) => {
            hub::resolve_for_run(&mut args.run)?;
            serve::run(*args)
        }
        Command::Plan(mut args) => {
            hub::resolve_for_plan(&mut args.run)?;
            plan::run(&args)
        }
        Command::Probe(mut args) => {
            output::end_at_once_on_interrupt()?;
            hub::resolve_for_probe(&mut args)?;
            probe::run(&args)
        }
        Command::Quantize(mut args) => {
            output::end_at_once_on_interrupt()?;
            hub::resolve_for_quantize(&mut args)?;
            quantize::run(&args)
        }
        Command::Upscale(args) => {
            output::end_at_once_on_interrupt()?;
            upscale::run(&args)
        }
        Command::Resize(args) => {
            output::end_at_once_on_interrupt()?;
            resize::run(&args)
        }
        Command::Check(args) => check::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Doctor => doctor::run(),
    }
}

/// The library's errors say what would help; these are the flags for it.
fn flags_for(error: &Error) -> &'static str {
    match error {
        Error::DeviceUnavailable { .. } => " (--device cpu)",
        Error::OutOfMemory { .. } => " (a smaller --size, or --dtype bf16)",
        Error::NonFinite { .. } => " (--dtype f32)",
        _ => "",
    }
}

/// The error and what caused it, as far as its own text does not say it already.
fn with_causes(error: &Error) -> String {
    let mut text = flags::error_text(error);
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        let reason = error.to_string();
        if !text.contains(&reason) {
            text.push_str(": ");
            text.push_str(&reason);
        }
        cause = error.source();
    }
    text
}
