//! The plugin process: environment, standard input, standard output and exit code.

use std::io::{self, Write};
use std::process::ExitCode;

use crate::call::Program;
use crate::command::{self, Answer};

/// Runs one plugin call and prints its output.
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
    // Standard output carries the protocol: one write, or a failure exit code.
    match io::stdout().write_all(text.as_bytes()) {
        Ok(()) => code,
        Err(_) => ExitCode::FAILURE,
    }
}
