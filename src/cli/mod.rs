//! The command line program: flags become a request of the library, its events progress, its results files.

mod args;
mod batch;
mod bench;
mod canvas;
mod cases;
mod check;
mod doctor;
mod generate;
mod grid;
mod manifest;
mod memory;
mod method_options;
mod output;
mod picture_args;
mod plan;
mod probe;
mod progress;
mod resize;
mod run_folder;
mod safetensors_file;
mod session;
mod sheet;
mod strip;
mod values;

use std::process::ExitCode;

use clap::Parser;
use megafuse::{Error, Result};

use args::{Cli, Command};

const FAILED: u8 = 1;
const WRONG_USAGE: u8 = 2;
const INTERRUPTED: u8 = 130;

pub fn main() -> ExitCode {
    let cli = Cli::parse(); // prints help and wrong usage itself, with status 0 and 2
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", with_causes(&error));
            ExitCode::from(match error {
                Error::Request { .. } => WRONG_USAGE,
                Error::Interrupted => INTERRUPTED,
                _ => FAILED,
            })
        }
    }
}

fn run(cli: Cli) -> Result<()> {
    megafuse::ops::cpu_level()?; // a wrong variable is said before it is passed over
    match cli.command {
        Command::Generate(args) => {
            output::end_at_once_on_interrupt()?;
            generate::run(&args)
        }
        Command::Grid(args) => {
            output::end_at_once_on_interrupt()?;
            grid::run(&args)
        }
        Command::Plan(args) => plan::run(&args),
        Command::Probe(args) => {
            output::end_at_once_on_interrupt()?;
            probe::run(&args)
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

/// The error and what caused it, as far as its own text does not say it already.
fn with_causes(error: &Error) -> String {
    let mut text = error.to_string();
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
