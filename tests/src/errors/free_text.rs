//! Errors that are made from free text: their texts are not in `docs/errors.md`.

use std::fmt;

use proc_macro2::Span;
use syn::parse::Parser;
use syn::punctuated::Punctuated;
use syn::spanned::Spanned;
use syn::visit::{self, Visit};
use syn::{
    Block, Expr, ExprCall, ExprMethodCall, ExprPath, GenericArgument, ItemMacro, ItemType, Lit, Local, Macro,
    Pat, Path, PathArguments, ReturnType, Stmt, Token, TypePath, UsePath, UseTree,
};

use super::Place;
use super::listed::{Listed, errors};
use super::source::Source;
use super::template::is_text;

/// Macros that make an error from a text.
const MACROS: [&str; 3] = ["anyhow", "bail", "ensure"];
/// Methods of `anyhow` that add a text to an error.
const CONTEXT: [&str; 2] = ["context", "with_context"];
/// Functions of `Refusal` that take a text.
const REFUSALS: [&str; 2] = ["new", "try_again"];

/// A place where an error is made from free text.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    /// The place.
    pub place: Place,
    /// The code, in short.
    pub form: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.form)
    }
}

/// A permitted finding.
#[derive(Debug)]
pub struct Allowed {
    /// The file.
    pub file: &'static str,
    /// The code, as in [`Finding`].
    pub form: &'static str,
    /// Why it is permitted.
    pub reason: &'static str,
}

impl Allowed {
    /// Whether it permits the finding.
    pub fn permits(&self, finding: &Finding) -> bool {
        self.file == finding.place.file && self.form == finding.form
    }
}

/// The finding for an error whose whole text is free text.
pub fn of_error(error: &Listed) -> Option<Finding> {
    let form = || format!("#[error(\"{{..}}\")] of a text: {}", error.name);
    error.is_free.then(|| Finding { place: error.place.clone(), form: form() })
}

/// All places in the source files where an error is made from free text, in their order.
pub fn find(sources: &[Source]) -> Vec<Finding> {
    let mut findings: Vec<Finding> = errors(sources).iter().filter_map(of_error).collect();
    for source in sources {
        let mut imports = OfStore(false);
        imports.visit_file(&source.content);
        let mut search =
            Search { file: &source.file, of_store: imports.0, own_refuse: false, findings: &mut findings };
        search.visit_file(&source.content);
    }
    findings.sort();
    findings.dedup();
    findings
}

struct Search<'a> {
    file: &'a str,
    /// Whether `Refusal` is that of the datastore in this file: its text is the answer of etcd.
    of_store: bool,
    /// Whether `refuse` is a local variable.
    own_refuse: bool,
    findings: &'a mut Vec<Finding>,
}

impl Search<'_> {
    fn found(&mut self, span: Span, form: impl Into<String>) {
        self.findings.push(Finding { place: Place::new(self.file, span), form: form.into() });
    }
}

impl<'ast> Visit<'ast> for Search<'_> {
    fn visit_item_macro(&mut self, _: &'ast ItemMacro) {}

    fn visit_macro(&mut self, called: &'ast Macro) {
        let name = last(&called.path);
        if MACROS.contains(&name.as_str()) {
            self.found(called.path.span(), format!("{name}!"));
        } else if let Ok(arguments) =
            Punctuated::<Expr, Token![,]>::parse_terminated.parse2(called.tokens.clone())
        {
            // The nodes live only here.
            let Self { file, of_store, own_refuse, .. } = *self;
            let mut inner = Search { file, of_store, own_refuse, findings: self.findings };
            arguments.iter().for_each(|argument| inner.visit_expr(argument));
        }
    }

    fn visit_block(&mut self, block: &'ast Block) {
        let outer = self.own_refuse;
        self.own_refuse |= block.stmts.iter().any(|statement| {
            matches!(statement, Stmt::Local(Local { pat: Pat::Ident(name), .. }) if name.ident == "refuse")
        });
        visit::visit_block(self, block);
        self.own_refuse = outer;
    }

    fn visit_expr_path(&mut self, path: &'ast ExprPath) {
        let names: Vec<String> = path.path.segments.iter().map(|part| part.ident.to_string()).collect();
        if let [modules @ .., of, function] = &*names
            && of == "Refusal"
            && !(modules.is_empty() && self.of_store
                || modules.last().is_some_and(|module| module == "refusal"))
            && REFUSALS.contains(&function.as_str())
        {
            self.found(path.span(), format!("Refusal::{function}"));
        }
        visit::visit_expr_path(self, path);
    }

    fn visit_expr_call(&mut self, call: &'ast ExprCall) {
        if let Expr::Path(function) = &*call.func {
            let name = last(&function.path);
            if name == "refuse" && !(self.own_refuse && function.path.get_ident().is_some()) {
                self.found(function.span(), "refuse(..)");
            }
            if name == "Err" && call.args.first().is_some_and(makes_text) {
                self.found(function.span(), "Err(text)");
            }
        }
        visit::visit_expr_call(self, call);
    }

    fn visit_expr_method_call(&mut self, call: &'ast ExprMethodCall) {
        if CONTEXT.iter().any(|name| call.method == name) {
            self.found(call.method.span(), format!(".{}(..)", call.method));
        }
        visit::visit_expr_method_call(self, call);
    }

    fn visit_return_type(&mut self, returned: &'ast ReturnType) {
        if let ReturnType::Type(_, kind) = returned {
            let mut results = TextResults(Vec::new());
            results.visit_type(kind);
            results.0.into_iter().for_each(|span| self.found(span, "-> Result<_, String>"));
        }
    }

    fn visit_item_type(&mut self, item: &'ast ItemType) {
        let mut results = TextResults(Vec::new());
        results.visit_type(&item.ty);
        results.0.into_iter().for_each(|span| self.found(span, "type = Result<_, String>"));
    }
}

/// Whether the file imports `refusal::Refusal` of the datastore.
struct OfStore(bool);

impl<'ast> Visit<'ast> for OfStore {
    fn visit_use_path(&mut self, path: &'ast UsePath) {
        let is_refusal = |tree: &UseTree| matches!(tree, UseTree::Name(name) if name.ident == "Refusal");
        self.0 |= path.ident == "refusal"
            && match &*path.tree {
                UseTree::Group(group) => group.items.iter().any(is_refusal),
                tree => is_refusal(tree),
            };
        visit::visit_use_path(self, path);
    }
}

/// Collects the types `Result<_, String>`.
struct TextResults(Vec<Span>);

impl<'ast> Visit<'ast> for TextResults {
    fn visit_type_path(&mut self, kind: &'ast TypePath) {
        if let Some(last) = kind.path.segments.last()
            && last.ident == "Result"
            && let PathArguments::AngleBracketed(arguments) = &last.arguments
            && let Some(GenericArgument::Type(error)) = arguments.args.iter().nth(1)
            && is_text(error)
        {
            self.0.push(last.ident.span());
        }
        visit::visit_type_path(self, kind);
    }
}

/// Whether an expression makes a text: a literal or `format!`, also after a conversion.
fn makes_text(value: &Expr) -> bool {
    const CONVERSIONS: [&str; 4] = ["into", "to_owned", "to_string", "clone"];
    match value {
        Expr::Lit(literal) => matches!(literal.lit, Lit::Str(_)),
        Expr::Macro(called) => last(&called.mac.path) == "format",
        Expr::MethodCall(call) => {
            CONVERSIONS.iter().any(|name| call.method == name) && makes_text(&call.receiver)
        }
        Expr::Call(call) => {
            matches!(&*call.func, Expr::Path(function) if last(&function.path) == "from")
                && call.args.first().is_some_and(makes_text)
        }
        Expr::Reference(inner) => makes_text(&inner.expr),
        Expr::Paren(inner) => makes_text(&inner.expr),
        _ => false,
    }
}

fn last(path: &Path) -> String {
    path.segments.last().map(|part| part.ident.to_string()).unwrap_or_default()
}
