//! The command line: flags to a request, progress and files back.

mod cli;

fn main() -> std::process::ExitCode {
    cli::main()
}
