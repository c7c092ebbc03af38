//! The errors of the product, read from its source code: their list in `docs/errors.md`, and a search for errors that
//! are made from free text.

pub mod free_text;
pub mod listed;
pub mod page;
pub mod source;
mod template;

use std::fmt;

/// A place in the source code.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The file, relative to the repository.
    pub file: String,
    /// The line; the first is 1.
    pub line: usize,
}

impl Place {
    fn new(file: &str, span: proc_macro2::Span) -> Self {
        Self { file: file.to_owned(), line: span.start().line }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file, self.line)
    }
}
