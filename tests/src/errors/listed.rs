//! The errors in the source code: enums and structs that derive `thiserror::Error`.

use std::collections::BTreeSet;
use std::fmt;

use proc_macro2::Ident;
use syn::punctuated::Punctuated;
use syn::visit::{self, Visit};
use syn::{
    Attribute, Expr, ExprLit, Fields, ItemConst, ItemEnum, ItemMod, ItemStruct, Lit, Meta, Path, Token,
};

use super::Place;
use super::source::Source;
use super::template::{self, Constants, Context, Piece, Template, literal_text};

/// Start of the last lines of a doc comment, which name the remedy.
const REMEDY: &str = "Remedy: ";

/// An error: a variant of an enum, or a struct.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// The folder of its crate.
    pub crate_folder: String,
    /// The type with its modules, and the variant.
    pub name: String,
    /// Where it is defined.
    pub place: Place,
    /// Its text, with placeholders in angle brackets.
    pub text: String,
    /// The doc comment, without the remedy.
    pub cause: String,
    /// The remedy, if there is one.
    pub remedy: Option<Remedy>,
    /// Whether the whole text is a free text in a field.
    pub is_free: bool,
}

/// The source of a remedy.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Remedy {
    /// The text of the error contains it.
    InText,
    /// The doc comment contains it.
    Documented(String),
}

impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InText => f.write_str("in the text"),
            Self::Documented(remedy) => f.write_str(remedy),
        }
    }
}

/// All errors in the source files. Panics at an attribute that cannot be parsed.
pub fn errors(sources: &[Source]) -> Vec<Listed> {
    let (mut constants, mut error_types) = (Constants::new(), BTreeSet::new());
    for source in sources {
        let mut names =
            OfNames { file: &source.file, constants: &mut constants, error_types: &mut error_types };
        names.visit_file(&source.content);
    }
    let mut errors = Vec::new();
    for source in sources {
        let modules = source.module();
        let mut found = OfErrors {
            source,
            modules,
            constants: &constants,
            error_types: &error_types,
            errors: &mut errors,
        };
        found.visit_file(&source.content);
    }
    errors
}

/// Collects the literal values of constants, and the names of error types.
struct OfNames<'a> {
    file: &'a str,
    constants: &'a mut Constants,
    error_types: &'a mut BTreeSet<String>,
}

impl<'ast> Visit<'ast> for OfNames<'_> {
    fn visit_item_const(&mut self, item: &'ast ItemConst) {
        if let Expr::Lit(ExprLit { lit, .. }) = &*item.expr
            && let Some(value) = literal_text(lit)
        {
            self.constants.insert((self.file.to_owned(), item.ident.to_string()), value);
        }
    }

    fn visit_item_enum(&mut self, item: &'ast ItemEnum) {
        if derives_error(&item.attrs) {
            self.error_types.insert(item.ident.to_string());
        }
    }

    fn visit_item_struct(&mut self, item: &'ast ItemStruct) {
        if derives_error(&item.attrs) {
            self.error_types.insert(item.ident.to_string());
        }
    }
}

/// Collects the errors of a file.
struct OfErrors<'a> {
    source: &'a Source,
    /// The current module.
    modules: String,
    constants: &'a Constants,
    error_types: &'a BTreeSet<String>,
    errors: &'a mut Vec<Listed>,
}

impl OfErrors<'_> {
    /// Adds the error unless it is transparent.
    fn add(&mut self, name: &str, ident: &Ident, attributes: &[Attribute], fields: &Fields) {
        let file = &self.source.file;
        let place = Place::new(file, ident.span());
        let context = Context { file, fields, constants: self.constants, error_types: self.error_types };
        let template = Template::of(attributes, &context);
        let template = template.unwrap_or_else(|error| panic!("{place}: cannot parse #[error(..)]: {error}"));
        let Some(Template::Text(pieces)) = template else { return };
        let (cause, documented) = documentation(attributes);
        let remedy = documented.map(Remedy::Documented);
        self.errors.push(Listed {
            crate_folder: self.source.crate_folder().to_owned(),
            name: format!("{}::{name}", self.modules),
            place,
            text: text(&pieces),
            cause,
            remedy: remedy.or_else(|| has_remedy(&pieces).then_some(Remedy::InText)),
            is_free: matches!(&*pieces, [Piece::Hole { free: true, .. }]),
        });
    }
}

impl<'ast> Visit<'ast> for OfErrors<'_> {
    fn visit_item_mod(&mut self, module: &'ast ItemMod) {
        let outer = self.modules.clone();
        self.modules = format!("{outer}::{}", module.ident);
        visit::visit_item_mod(self, module);
        self.modules = outer;
    }

    fn visit_item_enum(&mut self, item: &'ast ItemEnum) {
        if derives_error(&item.attrs) {
            self.add(&item.ident.to_string(), &item.ident, &item.attrs, &Fields::Unit);
            for variant in &item.variants {
                let name = format!("{}::{}", item.ident, variant.ident);
                self.add(&name, &variant.ident, &variant.attrs, &variant.fields);
            }
        }
    }

    fn visit_item_struct(&mut self, item: &'ast ItemStruct) {
        if derives_error(&item.attrs) {
            self.add(&item.ident.to_string(), &item.ident, &item.attrs, &item.fields);
        }
    }
}

/// Whether the attributes contain `derive(thiserror::Error)`.
fn derives_error(attributes: &[Attribute]) -> bool {
    let mut derives = attributes.iter().filter(|attribute| attribute.path().is_ident("derive"));
    derives.any(|attribute| {
        let traits = attribute.parse_args_with(Punctuated::<Path, Token![,]>::parse_terminated);
        traits.is_ok_and(|traits| {
            traits.iter().any(|path| path.segments.last().is_some_and(|last| last.ident == "Error"))
        })
    })
}

/// The cause and the remedy in a doc comment.
fn documentation(attributes: &[Attribute]) -> (String, Option<String>) {
    let mut lines = Vec::new();
    for attribute in attributes.iter().filter(|attribute| attribute.path().is_ident("doc")) {
        if let Meta::NameValue(value) = &attribute.meta
            && let Expr::Lit(ExprLit { lit: Lit::Str(text), .. }) = &value.value
        {
            lines.extend(text.value().lines().map(|line| line.trim().to_owned()));
        }
    }
    let remedy = lines.iter().rposition(|line| line.starts_with(REMEDY)).map(|at| lines.split_off(at));
    let join =
        |lines: Vec<String>| lines.into_iter().filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ");
    let remedy = remedy.map(join).and_then(|remedy| Some(remedy.strip_prefix(REMEDY)?.to_owned()));
    (join(lines), remedy)
}

/// The text with its placeholders in angle brackets.
fn text(pieces: &[Piece]) -> String {
    let one = |piece: &Piece| match piece {
        Piece::Text(text) => text.clone(),
        Piece::Hole { label, .. } => format!("<{label}>"),
    };
    pieces.iter().map(one).collect()
}

/// Whether the text contains a remedy: `problem: remedy`, or a placeholder of that name.
fn has_remedy(pieces: &[Piece]) -> bool {
    pieces.iter().any(|piece| match piece {
        Piece::Text(text) => {
            text.match_indices(": ").any(|(at, separator)| at + separator.len() < text.len())
        }
        Piece::Hole { label, .. } => label == template::REMEDY,
    })
}
