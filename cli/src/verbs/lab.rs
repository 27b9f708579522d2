//! `ambit lab`: runs the lab's own program with the same terminal and the same end.

use crate::drill::lab::program;
use crate::output::Answer;
use ambit_model::{Code, Refusal};
use std::ffi::OsString;
use std::os::unix::process::CommandExt;

pub(super) async fn run(args: Vec<OsString>) -> Result<Answer, Refusal> {
    let program = program();
    // Replaces this process, so that signals and the exit code are the lab's own.
    let error = std::process::Command::new(&program).args(args).exec();
    Err(Refusal::new(Code::NotFound, format!("the program {}", program.display()), error.to_string()))
}
