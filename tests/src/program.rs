//! Programs that a test runs to their end, on no node.

use std::process::{Command, Output};

/// What a program said: its output, and then its complaints.
pub fn said(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned()).concat()
}

/// Runs a program that succeeds; what it said.
pub fn must(command: &mut Command) -> String {
    run(command, 0)
}

/// Runs a program that refuses what it is told, with exit code 1; what it said.
pub fn refused(command: &mut Command) -> String {
    run(command, 1)
}

fn run(command: &mut Command, code: i32) -> String {
    let output = command.output().expect("the program starts");
    assert_eq!(output.status.code(), Some(code), "{command:?}: {}", said(&output));
    said(&output)
}
