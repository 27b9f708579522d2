//! The `ambit` binary: parses the line, runs the verb, prints the answer or the refusal, ends with its exit code.
#![forbid(unsafe_code)]

use ambit::args::Args;
use ambit::exit::Exit;
use ambit::output::print;
use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    let args = Args::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: cannot start the runtime: {error}");
            return Exit::Failed.into();
        }
    };
    print(runtime.block_on(ambit::verbs::run(args)))
}
