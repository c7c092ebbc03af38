//! The blocks of docs/migrate.md, and their execution on nodes.

use std::fs;
use std::path::Path;

use polder_tests::agent::Worker;
use serde_json::Value;

/// The page.
pub(crate) fn page() -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/migrate.md")).unwrap()
}

/// The only block of the page whose introduction ends with these words.
pub(crate) fn block(words: &str) -> String {
    let page = page();
    let parts: Vec<&str> = page.split("```").collect();
    let is_introduction = |text: &str| {
        let text: Vec<&str> = text.split_whitespace().collect();
        text.join(" ").ends_with(words)
    };
    let blocks = parts.chunks(2).filter(|part| is_introduction(part[0]));
    let found: Vec<&str> = blocks.map(|part| part[1]).collect();
    let [block] = found[..] else { panic!("{} blocks after {words:?}", found.len()) };
    block.split_once('\n').unwrap().1.to_owned()
}

/// Runs a block of the page on a node.
pub(crate) fn run(worker: &Worker, words: &str) -> String {
    worker.node.shell(&block(words))
}

/// Runs the `polderctl` command of a block on a node.
pub(crate) fn ctl(worker: &Worker, words: &str) -> Value {
    let command = block(words);
    let words: Vec<&str> = command.split_whitespace().collect();
    assert_eq!(words[0], "polderctl");
    worker.ctl(&words[1..])
}

/// The introductions of the blocks for nodes.
pub(crate) const PREPARE: &str = "A service repeats it at each boot. On every node, as root:";
pub(crate) const DIRECT: &str = "use direct routes only:";
pub(crate) const ONE_LINK: &str = "switch off this NAT:";
pub(crate) const UNPREPARE: &str = "undo step 1:";
pub(crate) const SWITCH: &str = "switch to Polder:";
pub(crate) const SWITCH_BACK: &str = "switch back to flannel:";
pub(crate) const DELETE_LEFT: &str = "delete what flannel's pods left:";
pub(crate) const MUST_BE_EMPTY: &str = "this must print nothing:";
pub(crate) const DELETE: &str = "delete them:";
pub(crate) const FORGET: &str = "flannel's range any more. On one node, as root:";
