//! Compares the `--help` output of `polder-agent`, `polderctl` and all their subcommands with `docs/help.txt`.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::path::Path;
use std::process::Command;
use std::{env, fs};

use polder_tests::agent::dist;
use polder_tests::node;

/// If this variable is 1, the test writes the file instead of comparing it.
const WRITE: &str = "POLDER_WRITE_HELP";

/// Start of the line above each help text, which names the command.
const PROMPT: &str = "$ ";

/// The help of a command, followed by the help of all its subcommands.
fn help(program: &str, subcommand: &[&str]) -> String {
    let mut command = Command::new(dist().join(program));
    // The output must not depend on the terminal or on variables that clap reads.
    command.args(subcommand).arg("--help").env_clear().env("COLUMNS", "100");
    let printed = node::output(&mut command);
    let line = [&[program], subcommand, &["--help"]].concat().join(" ");
    // Clap indents empty lines.
    let own: Vec<&str> = printed.trim_end().lines().map(str::trim_end).collect();
    let mut texts = vec![format!("{PROMPT}{line}\n{}\n", own.join("\n"))];
    texts.extend(listed(&own).map(|name| help(program, &[subcommand, &[name]].concat())));
    texts.join("\n")
}

/// The subcommands in a help text, without `help`: the first word of each line below `Commands:` with an indentation of
/// two spaces.
fn listed<'a>(help: &[&'a str]) -> impl Iterator<Item = &'a str> {
    let lines =
        help.iter().skip_while(|line| **line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    let entries = lines.filter_map(|line| line.strip_prefix("  ").filter(|line| !line.starts_with(' ')));
    entries.filter_map(|line| line.split_whitespace().next()).filter(|name| *name != "help")
}

/// The first line that differs: its number, its command, and its text in the file and in the output.
fn difference(file: &str, output: &str) -> Option<String> {
    let (mut in_file, mut in_output) = (file.lines(), output.lines());
    let mut command = "the first line";
    for number in 1.. {
        let (expected, found) = (in_file.next(), in_output.next());
        command = found.filter(|line| line.starts_with(PROMPT)).unwrap_or(command);
        if expected != found {
            let [expected, found] = [expected, found].map(|line| line.unwrap_or("(no more lines)"));
            return Some(format!(
                "line {number} ({command})\n  in the file:   {expected}\n  in the output: {found}"
            ));
        }
        expected?;
    }
    None
}

#[test]
fn the_help_of_every_command_equals_the_documentation() {
    const HOW: &str = "If the change is intended, run with POLDER_WRITE_HELP=1 to write the file";
    let output = [help("polder-agent", &[]), help("polderctl", &[])].join("\n");
    for command in ["polder-agent install-plugins", "polderctl status", "polderctl node remove"] {
        assert!(output.contains(&format!("{PROMPT}{command} --help\n")), "{command} was not found: {output}");
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/help.txt");
    if env::var_os(WRITE).is_some_and(|value| value == "1") {
        fs::write(&path, &output).unwrap();
        return;
    }
    let file = fs::read_to_string(&path).unwrap_or_else(|error| panic!("docs/help.txt: {error}. {HOW}"));
    let difference = difference(&file, &output).unwrap_or_default();
    assert!(difference.is_empty(), "docs/help.txt differs in {difference}\n{HOW}");
}

#[test]
fn the_first_line_that_differs_is_named_with_its_command() {
    assert_eq!(difference("$ a\nb\n", "$ a\nb\n"), None);
    let found = difference("$ a\nb\n", "$ a\nc\n").unwrap();
    assert_eq!(found, "line 2 ($ a)\n  in the file:   b\n  in the output: c");
    let found = difference("$ a\n", "$ a\nb\n").unwrap();
    assert!(found.contains("in the file:   (no more lines)"), "{found}");
    assert!(difference("$ a\nb\n", "$ a\n").unwrap().contains("in the output: (no more lines)"));
}
