//! The program that a container runtime executes.

use std::io::{self, Write};
use std::process::ExitCode;

use polder_cni_plugin::command::{self, Answer};

fn main() -> ExitCode {
    let (text, code) = match command::run(|name| std::env::var(name).ok(), &mut io::stdin()) {
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
