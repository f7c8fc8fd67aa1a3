//! `megafuse bench`: times of kernels, models and whole runs, beside what this device can do at most.

mod args;
mod clock;
mod compare;
mod cublaslt;
mod errors;
mod generate;
mod kernels;
mod models;
mod ncu;
mod numbers;
mod own;
mod peaks;
mod power;
mod results;
mod roofline;
mod workload;

pub use args::BenchArgs;
use args::What;
use megafuse::Result;
pub use results::Results;
pub use workload::write as write_workload;

pub fn run(args: &BenchArgs) -> Result<()> {
    match &args.what {
        None => kernels::run(&args.kernels),
        Some(What::Kernels(args)) => kernels::run(args),
        Some(What::Models(args)) => models::run(args),
        Some(What::Generate(args)) => generate::run(args),
    }
}
