//! Compares `docs/errors.md` with the errors in the source code. Each error has a cause and a remedy, and none is made
//! from free text.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::path::Path;
use std::{env, fs};

use polder_tests::errors::free_text::{self, Allowed};
use polder_tests::errors::listed::{self, Listed, Remedy};
use polder_tests::errors::page;
use polder_tests::errors::source::{self, Source};

/// If this variable is 1, the test writes the file instead of comparing it.
const WRITE: &str = "POLDER_WRITE_ERRORS";

/// Errors whose text is a value, not a template.
const ALLOWED: [Allowed; 1] = [Allowed {
    file: "api/src/message.rs",
    form: "#[error(\"{..}\")] of a text: api::message::Refusal",
    reason: "carries the text of another error, which is listed, over the agent's socket",
}];

/// The errors that the documentation lists: all but those whose text is the text of another error.
fn documented(sources: &[Source]) -> Vec<Listed> {
    let is_allowed = |error: &Listed| {
        free_text::of_error(error)
            .is_some_and(|finding| ALLOWED.iter().any(|allowed| allowed.permits(&finding)))
    };
    listed::errors(sources).into_iter().filter(|error| !is_allowed(error)).collect()
}

/// The first line that differs: its number, and its text in the file and in the source code.
fn difference(file: &str, output: &str) -> Option<String> {
    let (mut in_file, mut in_output) = (file.lines(), output.lines());
    for number in 1.. {
        let (expected, found) = (in_file.next(), in_output.next());
        if expected != found {
            let [expected, found] = [expected, found].map(|line| line.unwrap_or("(no more lines)"));
            return Some(format!("line {number}\n  in the file: {expected}\n  in the code: {found}"));
        }
        expected?;
    }
    None
}

/// The errors of a file with this content.
fn errors(text: &str) -> Vec<Listed> {
    listed::errors(&[Source::parse("agent/src/x.rs", text).unwrap()])
}

/// The texts of the errors of a file with this content.
fn texts(text: &str) -> Vec<String> {
    errors(text).into_iter().map(|error| error.text).collect()
}

/// The text of an error with these fields and this attribute.
fn text_of(fields: &str, attribute: &str) -> String {
    let found = texts(&format!("#[derive(thiserror::Error)] enum E {{ #[error({attribute})] X {fields} }}"));
    assert_eq!(found.len(), 1, "{found:?}");
    found.concat()
}

/// The forms of free text in a file with this content.
fn forms(text: &str) -> Vec<String> {
    let found = free_text::find(&[Source::parse("agent/src/x.rs", text).unwrap()]);
    found.into_iter().map(|finding| finding.form).collect()
}

#[test]
fn the_errors_in_the_documentation_are_those_of_the_source_code() {
    let output = page::page(&documented(&source::product()));
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/errors.md");
    if env::var_os(WRITE).is_some_and(|value| value == "1") {
        fs::write(&path, &output).unwrap();
        return;
    }
    let how = format!("To write the file, run {}", page::COMMAND);
    let file = fs::read_to_string(&path).unwrap_or_else(|error| panic!("docs/errors.md: {error}. {how}"));
    let difference = difference(&file, &output).unwrap_or_default();
    assert!(difference.is_empty(), "docs/errors.md differs in {difference}\n{how}");
}

#[test]
fn every_error_has_a_cause_and_a_remedy() {
    let errors = documented(&source::product());
    let mut missing = Vec::new();
    for Listed { place, name, text, cause, remedy, .. } in &errors {
        if cause.is_empty() {
            missing.push(format!("{place}: no cause: {name}: {text}"));
        }
        if remedy.is_none() {
            missing.push(format!("{place}: no remedy: {name}: {text}"));
        }
    }
    assert!(
        missing.is_empty(),
        "{} findings in {} errors: write a doc comment, and a last line \"Remedy: ..\" if the text has none\n{}",
        missing.len(),
        errors.len(),
        missing.join("\n")
    );
}

#[test]
fn no_error_of_the_product_is_made_from_free_text() {
    let (allowed, found): (Vec<_>, Vec<_>) = free_text::find(&source::product())
        .into_iter()
        .partition(|finding| ALLOWED.iter().any(|allowed| allowed.permits(finding)));
    for entry in &ALLOWED {
        assert!(
            allowed.iter().any(|finding| entry.permits(finding)),
            "nothing needs the permission {entry:?}"
        );
    }
    let lines: Vec<String> = found.iter().map(ToString::to_string).collect();
    assert!(
        lines.is_empty(),
        "{} errors are made from free text: define a thiserror enum with an #[error(..)] for each\n{}",
        lines.len(),
        lines.join("\n")
    );
}

#[test]
fn all_crates_of_the_product_are_read_without_their_tests() {
    let sources = source::product();
    for folder in source::CRATES {
        let root = format!("{folder}/src/lib.rs");
        assert!(sources.iter().any(|source| source.file == root), "{root} was not read");
    }
    for excluded in ["agent/src/fixture.rs", "ipam/src/membership/tests/identity.rs"] {
        assert!(Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(excluded).exists(), "{excluded}");
        assert!(sources.iter().all(|source| source.file != excluded), "{excluded} was read");
    }
}

#[test]
fn a_placeholder_is_named_after_its_field() {
    assert_eq!(text_of("{ node: NodeName }", r#""no node {node}""#), "no node <node>");
    assert_eq!(text_of("{ host_name: String }", r#""no host {host_name:?}""#), "no host <host name>");
    assert_eq!(text_of("(NodeName, u32)", r#""{0} of {1:>5}""#), "<node name> of <number>");
    assert_eq!(text_of("(#[source] io::Error, Box<IfName>)", r#""{1}: {0}""#), "<interface>: <cause>");
}

#[test]
fn the_placeholder_of_an_inner_error_is_cause() {
    assert_eq!(text_of("{ problem: SharedError }", r#""no: {problem}""#), "no: <cause>");
    assert_eq!(text_of("(Box<dyn Error>)", r#""no: {0}""#), "no: <cause>");
    let found = texts(
        "#[derive(thiserror::Error)] enum FileNotRead { #[error(\"a\")] A }
         #[derive(thiserror::Error)] enum E { #[error(\"b: {0}\")] B(Box<FileNotRead>) }",
    );
    assert_eq!(found, ["a", "b: <cause>"]);
}

#[test]
fn a_placeholder_is_named_after_its_argument() {
    assert_eq!(
        text_of("{ holder: H }", r#""held by {} on {}", holder.name, holder.node"#),
        "held by <name> on <node>"
    );
    assert_eq!(text_of("{ file: PathBuf }", r#""{}: no", file.display()"#), "<file>: no");
    assert_eq!(text_of("(Vec<Rest>)", r#""in use: {}", .0.join("; ")"#), "in use: <rest>");
    assert_eq!(text_of("(Box<Entry>)", r#""{} is there", .0.attachment"#), "<attachment> is there");
    assert_eq!(text_of("(NodeName)", r#""{}", shown(.0)"#), "<node name>");
    assert_eq!(text_of("{ problem: Problem }", r#""no agent{}", remedy(problem)"#), "no agent<remedy>");
    assert_eq!(text_of("", r#""use {}", supported()"#), "use <supported>");
    assert_eq!(text_of("{ length: u8 }", r#""at most {}", *length - 2"#), "at most <length>");
    assert_eq!(text_of("", r#""at most {most}", most = u8::MAX"#), "at most <most>");
}

#[test]
fn literals_and_constants_are_a_part_of_the_text() {
    assert_eq!(text_of("", r#""set \"attach\" to {{}}""#), r#"set "attach" to {}"#);
    assert_eq!(text_of("", "\"one \\\n   line\""), "one line");
    let found = texts(
        "const MOST: u8 = 9; const AGAIN: &str = \"try again\";
         #[derive(Debug, thiserror::Error)] #[error(\"at most {MOST}: {}{OTHER}\", AGAIN)] struct E;",
    );
    assert_eq!(found, ["at most 9: try again<other>"]);
}

#[test]
fn the_text_of_an_inner_error_is_listed_with_the_inner_error() {
    let found = texts(
        "#[derive(Debug, thiserror::Error)] enum E { #[error(transparent)] A(#[from] B), #[error(\"c\")] C }
         #[derive(Debug)] enum NoError { A }",
    );
    assert_eq!(found, ["c"]);
}

#[test]
fn cause_and_remedy_are_in_the_doc_comment_or_in_the_text() {
    let found = errors(
        "mod inner { /// All.
         #[derive(Debug, Error)] enum E {
            /// The first
            /// cause.
            /// Remedy: check the file,
            /// and the folder.
            #[error(\"a: do\")] A,
            /// The second.
            #[error(\"b: delete {0}\")] B(String),
            /// The third.
            #[error(\"c: {0}\")] C(B),
            #[error(\"{problem}: {remedy}\")] D { problem: String, remedy: &'static str },
         } }",
    );
    let remedies: Vec<_> = found.iter().map(|error| (error.cause.as_str(), error.remedy.clone())).collect();
    let documented = Remedy::Documented("check the file, and the folder.".to_owned());
    let in_text = Some(Remedy::InText);
    let expected = [
        ("The first cause.", Some(documented)),
        ("The second.", in_text.clone()),
        ("The third.", None),
        ("", in_text),
    ];
    assert_eq!(remedies, expected);
    let first = &found[0];
    assert_eq!(
        (first.name.as_str(), first.place.to_string()),
        ("agent::x::inner::E::A", "agent/src/x.rs:7".to_owned())
    );
}

#[test]
fn errors_that_exist_only_in_tests_are_not_listed() {
    let error = "#[derive(thiserror::Error)] #[error(\"e\")] struct E;";
    for module in ["#[cfg(test)]", "#[cfg(all(test, unix))]", "#[cfg(any(test, all(unix, test)))]"] {
        assert_eq!(texts(&format!("{module} mod inner {{ {error} }}")), [""; 0], "{module}");
        assert_eq!(texts(&format!("{module} {error}")), [""; 0], "{module}");
    }
    for module in ["", "#[cfg(not(test))]", "#[cfg(any(test, unix))]"] {
        assert_eq!(texts(&format!("{module} mod inner {{ {error} }}")), ["e"], "{module}");
    }
}

#[test]
fn a_row_has_the_causes_of_all_errors_with_its_text() {
    let found = errors(
        "#[derive(Debug, thiserror::Error)] enum E {
            /// See [`E::B`] or <https://x.y> | [there](https://x.y).
            /// Remedy: none.
            #[error(\"a|{0}\")] A(String),
            /// B.
            /// Remedy: none.
            #[error(\"a|{0}\")] B(String),
            /// C.
            #[error(\"`c`: do\")] C,
         }",
    );
    let page = page::page(&found);
    let rows: Vec<&str> = page.lines().filter(|line| line.starts_with("| `")).collect();
    let merged = r"| `a\|<text>` | See `E::B` or &lt;https://x.y> \| there.<br>B. | none. |";
    assert_eq!(rows, ["| `` `c`: do `` | C. | in the text |", merged]);
    assert!(page.contains("\n## Agent\n") && !page.contains("\n## Plugin\n"), "{page}");
}

#[test]
fn every_form_of_free_text_is_found() {
    for (body, form) in [
        ("anyhow!(\"a\")", "anyhow!"),
        ("return Err(anyhow::anyhow!(\"a {b}\"))", "anyhow!"),
        ("anyhow::bail!(\"a\");", "bail!"),
        ("ensure!(b, \"a\");", "ensure!"),
        ("vec![anyhow!(\"a\")]", "anyhow!"),
        ("Refusal::new(kind, \"a\")", "Refusal::new"),
        ("message::Refusal::try_again(b)", "Refusal::try_again"),
        ("b.map_err(Refusal::try_again)", "Refusal::try_again"),
        ("refuse(kind, format!(\"a\"))", "refuse(..)"),
        ("super::refuse(\"a\")", "refuse(..)"),
        ("b.context(\"a\")?", ".context(..)"),
        ("b.with_context(|| format!(\"a {b}\"))?", ".with_context(..)"),
        ("Err(format!(\"a\"))", "Err(text)"),
        ("Err(format!(\"a\").into())", "Err(text)"),
        ("Err(\"a\")", "Err(text)"),
        ("Err(\"a\".to_owned())", "Err(text)"),
        ("Err(\"a\".into())", "Err(text)"),
        ("Err(\"a\".to_string())", "Err(text)"),
        ("Err(String::from(\"a\"))", "Err(text)"),
        ("|| -> Result<(), String> { b }", "-> Result<_, String>"),
    ] {
        assert_eq!(forms(&format!("fn f() {{ {body} }}")), [form], "{body}");
        let method = format!("impl S {{ async fn f() {{ if a {{ {body} }} }} }}");
        assert_eq!(forms(&method), [form], "{method}");
        assert_eq!(forms(&format!("#[cfg(test)] mod inner {{ fn f() {{ {body} }} }}")), [""; 0], "{body}");
        assert_eq!(forms(&format!("impl S {{ #[cfg(test)] fn f() {{ {body} }} }}")), [""; 0], "{body}");
    }
    for item in [
        "fn f() -> Result<(), String> { b }",
        "fn f() -> io::Result<Result<u8, std::string::String>> { b }",
        "fn f() -> Result<u8, &'static str> { b }",
        "impl S { fn f(&self) -> Result<(), String> { b } }",
        "trait T { fn f(&self) -> Result<(), String>; }",
        "fn f(g: impl Fn(u8) -> Result<(), String>) {}",
    ] {
        assert_eq!(forms(item), ["-> Result<_, String>"], "{item}");
    }
    assert_eq!(forms("type R<T> = Result<T, String>;"), ["type = Result<_, String>"]);
    for (fields, template) in [
        ("(String)", "{0}"),
        ("{ message: String }", "{message}"),
        ("{ problem: String, b: u8 }", "{problem}"),
    ] {
        let item = format!("#[derive(thiserror::Error)] enum E {{ #[error(\"{template}\")] X {fields} }}");
        assert_eq!(forms(&item), ["#[error(\"{..}\")] of a text: agent::x::E::X"], "{item}");
    }
}

#[test]
fn errors_with_a_template_are_not_free_text() {
    for item in [
        "fn refuse(kind: RefusalKind) -> Result<(), Refusal> { Err(NotNow::Busy.into()) }",
        "fn f() -> Result<String, E> { Err(E::Gone { name: \"a\".to_owned() }) }",
        "fn f() -> Result<()> { assert!(a, \"b\"); Ok(\"a\".to_owned()) }",
        "fn f() { let refuse = |why| Err(E::No { why }); if a { return refuse(why); } }",
        "use polder_ipam::store::refusal::{Refusal, RefusalCause}; fn f() { Refusal::new(cause, words) }",
        "fn f() { refusal::Refusal::new(cause, words) }",
        "fn f() { self.refuse(kind); Other::new(\"a\"); writeln!(out, \"anyhow!(b)\") }",
        "macro_rules! m { () => { bail!(\"a\") }; }",
        "#[derive(thiserror::Error)] enum E { #[error(\"{0}\")] A(Inner), #[error(\"{0}: {1}\")] B(String, u8) }",
        "#[derive(thiserror::Error)] enum E { #[error(\"no {0}\")] A(String), #[error(transparent)] B(C) }",
    ] {
        assert_eq!(forms(item), [""; 0], "{item}");
    }
}

#[test]
fn the_first_line_that_differs_is_named() {
    assert_eq!(difference("a\nb\n", "a\nb\n"), None);
    assert_eq!(difference("a\nb\n", "a\nc\n").unwrap(), "line 2\n  in the file: b\n  in the code: c");
    assert!(difference("a\n", "a\nb\n").unwrap().contains("in the file: (no more lines)"));
}
