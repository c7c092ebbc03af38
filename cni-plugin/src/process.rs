//! The process that a runtime starts: its environment, its standard input, its standard output, its exit code.

use std::io::{self, Write};
use std::process::ExitCode;

use crate::call::Program;
use crate::command::{self, Answer};

/// Does what the runtime wants, and answers.
pub fn main(program: Program) -> ExitCode {
    let variable = |name: &str| std::env::var(name).ok();
    let (text, code) = match command::run(program, variable, &mut io::stdin()) {
        Answer::Output(text) => (text, ExitCode::SUCCESS),
        Answer::Error(text) => (text, ExitCode::FAILURE),
        Answer::About(text) => {
            eprintln!("{text}");
            return ExitCode::SUCCESS;
        }
    };
    // Standard output is the protocol: one write, or an exit code that says that there was none.
    match io::stdout().write_all(text.as_bytes()) {
        Ok(()) => code,
        Err(_) => ExitCode::FAILURE,
    }
}
