//! Programs that a test runs to their end, outside the nodes.

use std::process::{Command, Output};

/// Standard output and standard error of a program.
pub fn combined_output(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned()).concat()
}

/// Runs a program that must succeed, and returns its output.
pub fn must(command: &mut Command) -> String {
    run(command, 0)
}

/// Runs a program that must refuse its input with exit code 1, and returns its output.
pub fn refused(command: &mut Command) -> String {
    run(command, 1)
}

fn run(command: &mut Command, code: i32) -> String {
    let output = command.output().expect("the program starts");
    assert_eq!(output.status.code(), Some(code), "{command:?}: {}", combined_output(&output));
    combined_output(&output)
}
