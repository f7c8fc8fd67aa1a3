//! The flags of `megafuse serve`.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;
use megafuse::pipeline::Request;
use megafuse::{Error, Result};

use super::super::method_options::MethodChoice;
use super::super::picture_args::{PictureArgs, RunArgs, conflict};
use super::super::values;

#[derive(Args)]
#[command(after_long_help = SERVE_EXAMPLES)]
pub struct ServeArgs {
    /// Where to listen; port 0 takes any that is free
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:7860", help_heading = "Server")]
    pub addr: SocketAddr,

    /// What clients must say to be heard: Authorization: Bearer TOKEN, or as the password of HTTP's basic authentication
    ///
    /// Better in the environment than on the command line, which every user of the machine can read. An address that other machines
    /// reach needs one.
    #[arg(long, value_name = "TOKEN", env = "MEGAFUSE_API_TOKEN", hide_env_values = true, help_heading = "Server")]
    pub api_token: Option<String>,

    /// A folder of further models, which requests name: each of its folders and files is one
    ///
    /// With --model, that one is the default; without, the first by name. A model is read when a request first asks for it. The other flags hold
    /// for all; what they leave open suits each model.
    #[arg(long, value_name = "DIR", value_parser = values::path(), help_heading = "Server")]
    pub model_dir: Option<PathBuf>,

    /// Models in memory at a time; the one that was asked for longest ago leaves
    ///
    /// What is in memory must fit together.
    #[arg(long, value_name = "N", default_value = "1", help_heading = "Server")]
    pub models: usize,

    /// A name by which clients reach the server, besides its address and localhost; may be given several times
    #[arg(long, value_name = "HOST", help_heading = "Server")]
    pub allow_host: Vec<String>,

    /// A web page of another origin that may use the server, like https://example.org; may be given several times
    #[arg(long, value_name = "ORIGIN", help_heading = "Server")]
    pub allow_origin: Vec<String>,

    /// Pictures that may wait; a request beyond is told to come again (429)
    #[arg(long, value_name = "N", default_value = "256", help_heading = "Server")]
    pub queue: usize,

    /// Minutes for which finished jobs and their pictures are kept
    #[arg(long, value_name = "MINUTES", default_value = "30", value_parser = minutes, help_heading = "Server")]
    pub keep: f64,

    /// Pixels of a picture, at most
    #[arg(long, value_name = "N", default_value = "16777216", help_heading = "Server")]
    pub max_pixels: u64,

    /// Steps of a picture over all stages, at most
    #[arg(long, value_name = "N", default_value = "200", help_heading = "Server")]
    pub max_steps: usize,

    /// Pictures of a job, at most
    #[arg(long, value_name = "N", default_value = "64", help_heading = "Server")]
    pub max_count: usize,

    /// Size of a request, at most, in MiB: pictures come in it
    #[arg(long, value_name = "MIB", default_value = "64", help_heading = "Server")]
    pub max_body: usize,

    #[command(flatten)]
    pub method: MethodChoice,

    #[command(flatten)]
    pub run: RunArgs,
}

const SERVE_EXAMPLES: &str = "\
Examples:
  # the model inside the program, for this machine alone
  megafuse serve

  # for others, who must know the token
  MEGAFUSE_API_TOKEN=... megafuse serve --model ~/models/sdxl --addr 0.0.0.0:7860 --allow-host gpu.example.org

  curl http://127.0.0.1:7860/v1/images/generations -H 'content-type: application/json' -d '{\"prompt\": \"a red ball\"}'

What a request leaves out is as the other flags say: --method, --size, --steps and so on. /openapi.json describes every route.
The address goes to standard output, everything else to standard error.
SIGTERM and Ctrl-C let what was taken be finished; a second one ends at once.";

fn minutes(text: &str) -> std::result::Result<f64, String> {
    match text.parse::<f64>() {
        Ok(minutes) if minutes > 0.0 && minutes <= 1e6 => Ok(minutes),
        _ => Err("expected a number of minutes above 0".into()),
    }
}

/// Batches are as large as the queue and the device allow, unless told otherwise.
pub fn adapted(command: clap::Command) -> clap::Command {
    command.mut_arg("batch", |arg| arg.default_value("auto"))
}

impl ServeArgs {
    /// # Errors
    /// [`megafuse::Error::Request`]: others could use it who must not.
    pub fn check(&self) -> Result<()> {
        if self.api_token.as_ref().is_some_and(|token| token.len() < 8) {
            return Err(conflict("--api-token", "(hidden)", "is shorter than 8 letters, and could be guessed"));
        }
        if !self.addr.ip().is_loopback() && self.api_token.is_none() {
            let reason = "other machines reach it, and whoever does could use this one; give --api-token too";
            return Err(conflict("--addr", self.addr, reason));
        }
        for (flag, value) in [
            ("--queue", self.queue),
            ("--max-steps", self.max_steps),
            ("--max-count", self.max_count),
            ("--models", self.models),
        ] {
            if value == 0 {
                return Err(conflict(flag, value, "expected at least 1"));
            }
        }
        Ok(())
    }

    /// The paths of the models, `--model` first. `None`: the one inside the program.
    ///
    /// # Errors
    /// [`megafuse::Error::File`], [`megafuse::Error::Io`]: the folder cannot be read, or holds none.
    pub fn model_paths(&self) -> Result<Vec<Option<PathBuf>>> {
        let Some(folder) = &self.model_dir else { return Ok(vec![self.run.model.clone()]) };
        let read = std::fs::read_dir(folder).and_then(Iterator::collect::<std::io::Result<Vec<_>>>);
        let entries = read.map_err(|error| Error::io(folder, error))?;
        let is_model = |path: &PathBuf| {
            let end = path.extension().map(|end| end.to_string_lossy().to_lowercase());
            let named = end.is_some_and(|end| ["safetensors", "sft", "ckpt"].contains(&end.as_str()));
            path.join("model_index.json").is_file() || (named && path.is_file())
        };
        let mut paths: Vec<PathBuf> = entries.into_iter().map(|entry| entry.path()).filter(is_model).collect();
        paths.sort();
        if paths.is_empty() {
            let reason =
                "holds no model: expected folders with a model_index.json, or checkpoints in .safetensors or .ckpt";
            return Err(Error::file(folder, reason));
        }
        let first = &self.run.model;
        paths.retain(|path| Some(path) != first.as_ref());
        Ok(first.iter().cloned().chain(paths).map(Some).collect())
    }

    /// What the flags say of every request.
    ///
    /// # Errors
    /// As [`PictureArgs::request`].
    pub fn request(&self) -> Result<Request> {
        PictureArgs { method: self.method, seed: 0, count: 1 }.request(&self.run, "")
    }
}
