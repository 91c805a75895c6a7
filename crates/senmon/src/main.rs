//! The binary `senmon`.

use clap::Parser;
use std::process::ExitCode;

/// Large tensors otherwise page-fault at every step.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    senmon_kernels::process::keep_candle_on_one_thread();
    let cli = senmon::cli::Cli::parse();
    match senmon::commands::run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            match failure.is_interruption() {
                true => eprintln!("{failure}"),
                false => eprintln!("error: {failure}"),
            }
            ExitCode::from(failure.code())
        }
    }
}
