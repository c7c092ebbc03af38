//! The commands of `docs/tasks.md`.

use std::cell::RefCell;
use std::fs;
use std::path::PathBuf;

use polder_tests::agent::dist;
use polder_tests::{Node, wait};

/// The machines that the text names before a command, as in "On any node:".
const PLACES: [&str; 7] = [
    "your machine",
    "any node",
    "any other node",
    "every node",
    "its node",
    "the new machine",
    "the etcd machine",
];

/// A fenced block of a task.
#[derive(Debug)]
struct Block {
    /// The first word after the fence.
    language: String,
    text: String,
    /// The last place that the text before the block names.
    place: Option<&'static str>,
    /// The block `text` that follows: lines of the output.
    expected: Option<String>,
    /// Whether the block is after the words "To go back": the order of these blocks is free.
    goes_back: bool,
}

/// A section of the document. Each of its blocks must be used, in the order of the text.
#[derive(Debug)]
pub(crate) struct Task {
    blocks: Vec<Block>,
    /// Numbers of the blocks, in the order of use.
    used: RefCell<Vec<usize>>,
    /// Examples of the text, with their replacements in the lab.
    replacements: Vec<(String, String)>,
    /// Variables of the shell, as assignments.
    variables: String,
    /// A folder with programs that replace `sudo` and `scp`, and with a folder for each machine.
    folder: tempfile::TempDir,
}

impl Task {
    /// The section with this heading. `replacements` are examples of the text, with their replacements in the lab.
    pub(crate) fn read(heading: &str, replacements: &[(&str, &str)]) -> Self {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/tasks.md");
        let document = fs::read_to_string(path).unwrap();
        let start = format!("\n## {heading}\n");
        let section = document.split_once(&start).unwrap_or_else(|| panic!("no section {heading}")).1;
        let section = section.split("\n## ").next().unwrap_or_default();
        let folder = tempfile::tempdir().unwrap();
        let task = Self {
            blocks: blocks(section),
            used: RefCell::default(),
            replacements: replacements.iter().map(|(from, to)| ((*from).into(), (*to).into())).collect(),
            variables: String::new(),
            folder,
        };
        task.make_program("sudo", "exec \"$@\"");
        // scp FILE... MACHINE:
        let machines = task.folder.path().display();
        task.make_program(
            "scp",
            &format!(
                "for to; do :; done; to={machines}/${{to%:}}\nmkdir -p $to\n\
            while [ $# -gt 1 ]; do cp $1 $to/; shift; done"
            ),
        );
        task
    }

    /// Sets a variable of the shell in which the commands run.
    pub(crate) fn set(mut self, name: &str, value: &str) -> Self {
        self.variables += &format!("export {name}={value}\n");
        self
    }

    fn make_program(&self, name: &str, script: &str) {
        let path = self.folder.path().join("bin").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, format!("#!/bin/sh -e\n{script}\n")).unwrap();
        let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(&path, executable).unwrap();
    }

    /// The home folder of the user on that machine.
    pub(crate) fn home(&self, machine: &str) -> PathBuf {
        let home = self.folder.path().join(machine);
        fs::create_dir_all(&home).unwrap();
        home
    }

    /// The only block with these words.
    fn find(&self, words: &str) -> &Block {
        let mut found = self.blocks.iter().enumerate().filter(|(_, block)| block.text.contains(words));
        let (number, block) = found.next().unwrap_or_else(|| panic!("no block with {words:?}"));
        assert!(found.next().is_none(), "more than one block with {words:?}");
        self.used.borrow_mut().push(number);
        block
    }

    fn replaced(&self, text: &str) -> String {
        self.replacements.iter().fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
    }

    /// Runs the only block with these words on a machine. The text must name that place. Returns the output, which must
    /// be as in the text.
    pub(crate) fn run(&self, (place, node): (&str, &Node), words: &str) -> String {
        self.attempt((place, node), words).unwrap_or_else(|error| panic!("{words:?}: {error}"))
    }

    /// Like `run`, repeated until it succeeds and the output is as in the text.
    pub(crate) fn look(&self, (place, node): (&str, &Node), words: &str) -> String {
        wait::within(wait::TIMEOUT * 3, &format!("{words:?} to show what the text says"), || {
            self.attempt((place, node), words)
        })
    }

    /// Like `run`, for a command that is refused for this reason.
    pub(crate) fn run_refused(&self, (place, node): (&str, &Node), words: &str, reason: &str) {
        let block = self.find(words);
        assert_eq!(block.place, Some(place), "{words:?}");
        let (succeeded, output) = self.shell(block.place, node, &block.text);
        assert!(!succeeded && output.contains(reason), "{words:?}: {output}");
        if block.expected.as_ref().is_some_and(|expected| expected.starts_with("polderctl: ")) {
            self.compare(block, &output).unwrap_or_else(|error| panic!("{words:?}: {error}"));
        }
    }

    fn attempt(&self, (place, node): (&str, &Node), words: &str) -> Result<String, String> {
        let block = self.find(words);
        assert_eq!((block.language.as_str(), block.place), ("sh", Some(place)), "{words:?}");
        let (succeeded, output) = self.shell(block.place, node, &block.text);
        if !succeeded {
            return Err(output);
        }
        self.compare(block, &output)?;
        Ok(output)
    }

    fn shell(&self, place: Option<&str>, node: &Node, script: &str) -> (bool, String) {
        let home = self.home(if place == Some("your machine") { "reader" } else { node.name() });
        let bin = self.folder.path().join("bin");
        let script = format!(
            "{}export PATH={}:{}:$PATH\ncd {}\n{}",
            self.variables,
            bin.display(),
            dist().display(),
            home.display(),
            self.replaced(script)
        );
        let output = node.command("bash").args(["-ec", &format!("exec 2>&1\n{script}")]).output().unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Whether the output has the lines of the text.
    fn compare(&self, block: &Block, output: &str) -> Result<(), String> {
        let expected = self.replaced(block.expected.as_deref().unwrap_or_default());
        let missing = expected.lines().find(|line| !output.lines().any(|found| fits(found, line)));
        missing.map_or(Ok(()), |line| Err(format!("no line {line:?} in:\n{output}")))
    }

    /// The only block with these words, which the caller carries out in another way: `kubectl`, `systemctl`, or a file.
    pub(crate) fn in_another_way(&self, words: &str) -> String {
        let block = self.find(words);
        assert!(["kubectl", "systemctl", "yaml"].contains(&block.language.as_str()), "{words:?}");
        self.replaced(&block.text)
    }

    /// Fails if a block was not used, or not in the order of the text.
    pub(crate) fn finish(self) {
        let used = self.used.borrow();
        let unused = (0..self.blocks.len()).find(|number| !used.contains(number));
        assert!(unused.is_none(), "never used: {:?}", unused.map(|number| &self.blocks[number]));
        let in_order = |number: &usize| !self.blocks[*number].goes_back;
        let mut first_uses: Vec<usize> = Vec::new();
        for number in used.iter().filter(|number| in_order(number)) {
            let out_of_order =
                first_uses.iter().find(|earlier| *earlier > number && !first_uses.contains(number));
            assert!(out_of_order.is_none(), "not in the order of the text: {:?}", self.blocks[*number]);
            first_uses.push(*number);
        }
    }
}

/// Whether a line of output is as in the text: `...` is any text, and the width of spaces does not matter.
fn fits(line: &str, expected: &str) -> bool {
    let squeezed = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let (line, expected) = (squeezed(line), squeezed(expected));
    let parts: Vec<&str> = expected.split("...").map(str::trim).collect();
    let [first, middle @ .., last] = parts.as_slice() else { return line == expected };
    let Some(mut rest) = line.strip_prefix(first) else { return false };
    for part in middle {
        let Some((_, after)) = rest.split_once(part) else { return false };
        rest = after;
    }
    rest.ends_with(last)
}

fn blocks(section: &str) -> Vec<Block> {
    let mut blocks: Vec<Block> = Vec::new();
    let (mut prose, mut place, mut goes_back) = (String::new(), None, false);
    let mut open: Option<(String, String)> = None;
    for line in section.lines() {
        let line = line.strip_prefix("   ").unwrap_or(line);
        match (line.strip_prefix("```"), &mut open) {
            (Some(language), None) => {
                let named = PLACES.into_iter().filter_map(|name| {
                    let at = prose.to_lowercase().rfind(&format!("on {name}"))?;
                    Some((at, name))
                });
                place =
                    named.max_by_key(|(at, name)| (*at, name.len())).map_or(place, |(_, name)| Some(name));
                prose.clear();
                open = Some((language.to_owned(), String::new()));
            }
            (Some(_), Some((language, text))) => {
                let (language, text) = (std::mem::take(language), std::mem::take(text));
                open = None;
                match (language.as_str(), blocks.last_mut()) {
                    ("text", Some(block)) => block.expected = Some(text),
                    _ => blocks.push(Block { language, text, place, expected: None, goes_back }),
                }
            }
            (None, Some((_, text))) => *text += &format!("{line}\n"),
            (None, None) => {
                goes_back |= line.starts_with("**To go back**");
                prose += &format!(" {line}");
            }
        }
    }
    blocks
}

#[test]
fn blocks_are_read_with_their_places_and_output() {
    let section = "1. On any node:\n\n   ```sh\n   a\n     b\n   ```\n\n   ```text\n   x ... y\n   ```\n\n**To go back**, \
                   on your\nmachine:\n\n```kubectl\nc\n```\n";
    let blocks = blocks(section);
    assert_eq!((blocks.len(), blocks[0].text.as_str()), (2, "a\n  b\n"));
    assert_eq!((blocks[0].place, blocks[1].place), (Some("any node"), Some("your machine")));
    assert_eq!((blocks[0].expected.as_deref(), blocks[1].goes_back), (Some("x ... y\n"), true));
    for (line, expected, result) in [
        ("a  b", "a b", true),
        ("a b c", "a b", false),
        ("x 1 y", "x ... y", true),
        ("x 1 y z", "x ... y", false),
        ("a x b y c", "a ... b ... c", true),
        ("a x y c", "a ... b ... c", false),
    ] {
        assert_eq!(fits(line, expected), result, "{line:?}, {expected:?}");
    }
}
