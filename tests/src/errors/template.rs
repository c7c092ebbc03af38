//! The templates of `thiserror`: `#[error("no pool {name} on {}", node.name)]`.

use std::collections::{BTreeMap, BTreeSet};

use proc_macro2::{Delimiter, Group, Ident, Span, TokenStream, TokenTree};
use syn::parse::{ParseStream, Parser};
use syn::{
    Attribute, Expr, ExprCall, Fields, GenericArgument, Lit, LitStr, Member, Path, PathArguments, Token, Type,
};

/// Methods that change the form of a value, not the value: the placeholder is named after their receiver.
const OF_FORM: &[&str] = &[
    "as_deref",
    "as_millis",
    "as_ref",
    "as_secs",
    "as_str",
    "clone",
    "cloned",
    "collect",
    "copied",
    "desc",
    "display",
    "escape_debug",
    "iter",
    "join",
    "map",
    "to_string",
    "unwrap_or",
    "unwrap_or_default",
    "unwrap_or_else",
];

/// The description of a value without a name.
const UNNAMED: &str = "...";
/// The description of an error inside the error, or of a text about the cause.
const CAUSE: &str = "cause";
/// Names of values that are described as the cause.
const CAUSES: [&str; 7] = ["error", "failure", "obstacle", "problem", "reason", "source", "why"];
/// Types that are described as the type in their angle brackets.
const WRAPPERS: [&str; 5] = ["Box", "Arc", "Option", "Vec", "Cow"];
/// The description of a value that contains the remedy.
pub(super) const REMEDY: &str = "remedy";

/// Literal values of constants, by file and name.
pub(super) type Constants = BTreeMap<(String, String), String>;

/// The argument of an `#[error]` attribute.
pub(super) enum Template {
    /// `#[error(transparent)]`.
    Transparent,
    /// A text with placeholders.
    Text(Vec<Piece>),
}

/// A part of a template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Piece {
    /// A literal text.
    Text(String),
    /// A placeholder.
    Hole {
        /// The description of the value.
        label: String,
        /// Whether the value is a free text in a field of the error.
        free: bool,
    },
}

/// An attribute with the names that it can use.
pub(super) struct Context<'a> {
    /// The file.
    pub(super) file: &'a str,
    /// The fields of the error.
    pub(super) fields: &'a Fields,
    /// The constants of the product.
    pub(super) constants: &'a Constants,
    /// The names of the product's error types.
    pub(super) error_types: &'a BTreeSet<String>,
}

impl Template {
    /// The template in the attributes of an enum, a variant or a struct.
    pub(super) fn of(attributes: &[Attribute], context: &Context<'_>) -> syn::Result<Option<Self>> {
        let Some(attribute) = attributes.iter().find(|attribute| attribute.path().is_ident("error")) else {
            return Ok(None);
        };
        let parse = |input: ParseStream<'_>| context.template(input);
        attribute.parse_args_with(parse).map(Some)
    }
}

impl Context<'_> {
    fn template(&self, input: ParseStream<'_>) -> syn::Result<Template> {
        if !input.peek(LitStr) {
            let word: Ident = input.parse()?;
            if word != "fmt" {
                return Ok(Template::Transparent);
            }
            let (_, function): (Token![=], Path) = (input.parse()?, input.parse()?);
            let label = function.segments.last().map(|part| words(&part.ident.to_string()));
            return Ok(Template::Text(vec![Piece::Hole { label: label.unwrap_or_default(), free: false }]));
        }
        let text: LitStr = input.parse()?;
        let arguments = arguments(input.parse()?)?;
        Ok(Template::Text(self.pieces(&text.value(), &arguments)))
    }

    fn pieces(&self, text: &str, arguments: &[(Option<String>, Expr)]) -> Vec<Piece> {
        let positional: Vec<&Expr> =
            arguments.iter().filter(|(name, _)| name.is_none()).map(|(_, value)| value).collect();
        let (mut pieces, mut next, mut rest) = (Vec::new(), 0, text);
        while let Some(at) = rest.find(['{', '}']) {
            add_text(&mut pieces, &rest[..at]);
            let brace = &rest[at..=at];
            let after = &rest[at + 1..];
            if after.starts_with(brace) {
                add_text(&mut pieces, brace);
                rest = &after[1..];
                continue;
            }
            let (placeholder, after) = after.split_once('}').unwrap_or((after, ""));
            rest = after;
            let name = placeholder.split(':').next().unwrap_or_default().trim();
            let piece = if name.is_empty() {
                next += 1;
                positional.get(next - 1).map_or_else(|| hole(UNNAMED), |value| self.value(value))
            } else if let Some((_, value)) =
                arguments.iter().find(|(given, _)| given.as_deref() == Some(name))
            {
                match self.value(value) {
                    Piece::Hole { free, .. } => Piece::Hole { label: label(name), free },
                    text @ Piece::Text(_) => text,
                }
            } else {
                let by_number = name.parse().ok().and_then(|number: usize| positional.get(number));
                by_number.map_or_else(|| self.named(name), |value| self.value(value))
            };
            match piece {
                Piece::Text(text) => add_text(&mut pieces, &text),
                hole @ Piece::Hole { .. } => pieces.push(hole),
            }
        }
        add_text(&mut pieces, rest);
        pieces
    }

    /// A field, by its name or number, or a constant.
    fn named(&self, name: &str) -> Piece {
        let mut fields = self.fields.iter().enumerate();
        let field = fields.find(|(at, field)| match &field.ident {
            Some(ident) => ident == name,
            None => at.to_string() == name,
        });
        let Some((_, field)) = field else {
            return self.constant(name).map_or_else(|| hole(name), Piece::Text);
        };
        let label = match &field.ident {
            Some(_) => label(name),
            None if self.is_error(&field.ty) => CAUSE.to_owned(),
            None => of_type(&field.ty),
        };
        Piece::Hole { label, free: is_text(&field.ty) }
    }

    /// Whether values of the type are errors.
    fn is_error(&self, kind: &Type) -> bool {
        match kind {
            Type::Reference(reference) => self.is_error(&reference.elem),
            Type::TraitObject(_) => true,
            Type::Path(path) => path.path.segments.last().is_some_and(|last| {
                let name = last.ident.to_string();
                match inner(&last.arguments) {
                    Some(inner) if WRAPPERS.contains(&name.as_str()) => self.is_error(inner),
                    _ => name.ends_with("Error") || self.error_types.contains(&name),
                }
            }),
            _ => false,
        }
    }

    /// The literal value of a constant: the one in this file, or the only one in the product.
    fn constant(&self, name: &str) -> Option<String> {
        let here = self.constants.get(&(self.file.to_owned(), name.to_owned()));
        let mut all =
            self.constants.iter().filter(|((_, constant), _)| constant == name).map(|(_, value)| value);
        let only = || all.next().filter(|first| all.all(|other| other == *first));
        here.or_else(only).cloned()
    }

    /// A function is named after its argument, but one that returns the remedy is the remedy.
    fn call(&self, call: &ExprCall) -> Piece {
        let function = self.value(&call.func);
        let is_remedy = matches!(&function, Piece::Hole { label, .. } if label == REMEDY);
        let argument = call.args.first().filter(|_| !is_remedy).map(|argument| self.value(argument));
        match argument {
            Some(Piece::Hole { label, .. }) if label != UNNAMED => Piece::Hole { label, free: false },
            _ => not_free(function),
        }
    }

    fn value(&self, value: &Expr) -> Piece {
        match value {
            Expr::Field(field) => match (&*field.base, &field.member) {
                (Expr::Path(base), Member::Unnamed(index)) if base.path.is_ident("self") => {
                    self.named(&index.index.to_string())
                }
                (base, Member::Unnamed(_)) => self.value(base),
                (_, Member::Named(name)) => hole(&name.to_string()),
            },
            Expr::Path(path) => match path.path.segments.last() {
                Some(last) => self.named(&last.ident.to_string()),
                None => hole(UNNAMED),
            },
            Expr::MethodCall(call) if OF_FORM.iter().any(|method| call.method == method) => {
                not_free(self.value(&call.receiver))
            }
            Expr::MethodCall(call) => hole(&call.method.to_string()),
            Expr::Call(call) => self.call(call),
            Expr::Reference(inner) => self.value(&inner.expr),
            Expr::Unary(inner) => self.value(&inner.expr),
            Expr::Paren(inner) => self.value(&inner.expr),
            Expr::Index(inner) => self.value(&inner.expr),
            Expr::Cast(inner) => self.value(&inner.expr),
            Expr::Try(inner) => self.value(&inner.expr),
            Expr::Binary(inner) => {
                match (not_free(self.value(&inner.left)), not_free(self.value(&inner.right))) {
                    (hole @ Piece::Hole { .. }, _) | (Piece::Text(_), hole) => hole,
                }
            }
            Expr::Lit(literal) => literal_text(&literal.lit).map_or_else(|| hole(UNNAMED), Piece::Text),
            _ => hole(UNNAMED),
        }
    }
}

fn add_text(pieces: &mut Vec<Piece>, text: &str) {
    match pieces.last_mut() {
        _ if text.is_empty() => {}
        Some(Piece::Text(last)) => last.push_str(text),
        _ => pieces.push(Piece::Text(text.to_owned())),
    }
}

fn hole(name: &str) -> Piece {
    Piece::Hole { label: label(name), free: false }
}

/// The description of a value with this name.
fn label(name: &str) -> String {
    if CAUSES.contains(&name) { CAUSE.to_owned() } else { words(name) }
}

/// A value that is computed from a field is not the free text of the field.
fn not_free(piece: Piece) -> Piece {
    match piece {
        Piece::Hole { label, .. } => Piece::Hole { label, free: false },
        text @ Piece::Text(_) => text,
    }
}

/// The text of a literal, if it is a part of a message.
pub(super) fn literal_text(literal: &Lit) -> Option<String> {
    match literal {
        Lit::Str(text) => Some(text.value()),
        Lit::Int(number) => Some(number.base10_digits().to_owned()),
        _ => None,
    }
}

/// The arguments after the text, which begin with a comma: their names, if given, and values.
fn arguments(tokens: TokenStream) -> syn::Result<Vec<(Option<String>, Expr)>> {
    let tokens: Vec<TokenTree> = with_self(tokens).into_iter().collect();
    let is_comma = |token: &TokenTree| matches!(token, TokenTree::Punct(mark) if mark.as_char() == ',');
    let argument = |tokens: &[TokenTree]| {
        let parse = |input: ParseStream<'_>| {
            let is_named = input.peek(syn::Ident) && input.peek2(Token![=]) && !input.peek2(Token![==]);
            let name = if is_named { Some(input.parse::<Ident>()?.to_string()) } else { None };
            if is_named {
                input.parse::<Token![=]>()?;
            }
            Ok((name, input.parse()?))
        };
        parse.parse2(tokens.iter().cloned().collect())
    };
    tokens.split(is_comma).filter(|tokens| !tokens.is_empty()).map(argument).collect()
}

/// Writes `self.0` for `.0`, which only `thiserror` understands.
fn with_self(tokens: TokenStream) -> TokenStream {
    let (mut all, mut begins) = (Vec::new(), true);
    for token in tokens {
        let mark = if let TokenTree::Punct(mark) = &token { Some(mark.as_char()) } else { None };
        if begins && mark == Some('.') {
            all.push(Ident::new("self", Span::call_site()).into());
        }
        begins = mark.is_some_and(|mark| !".?".contains(mark));
        all.push(match token {
            TokenTree::Group(group) if group.delimiter() != Delimiter::None => {
                Group::new(group.delimiter(), with_self(group.stream())).into()
            }
            token => token,
        });
    }
    all.into_iter().collect()
}

/// The words of a name in snake case or camel case, in lower case.
fn words(name: &str) -> String {
    let (mut words, mut after_small) = (String::new(), false);
    for character in name.chars() {
        if character == '_' || character.is_uppercase() && after_small {
            words.push(' ');
        }
        words.extend(character.to_lowercase().filter(|character| *character != '_'));
        after_small = character.is_lowercase() || character.is_numeric();
    }
    words.trim().to_owned()
}

/// The description of a field without a name.
fn of_type(kind: &Type) -> String {
    match kind {
        Type::Reference(reference) => of_type(&reference.elem),
        Type::Path(path) => {
            let Some(last) = path.path.segments.last() else { return UNNAMED.to_owned() };
            let name = last.ident.to_string();
            match (name.as_str(), inner(&last.arguments)) {
                (wrapper, Some(inner)) if WRAPPERS.contains(&wrapper) => of_type(inner),
                ("String" | "str", _) => "text".to_owned(),
                ("u8" | "u16" | "u32" | "u64" | "usize" | "i32" | "i64", _) => "number".to_owned(),
                ("IpAddr" | "Ipv4Addr" | "Ipv6Addr", _) => "address".to_owned(),
                ("SocketAddr", _) => "address and port".to_owned(),
                ("IfName", _) => "interface".to_owned(),
                ("PathBuf" | "Path", _) => "path".to_owned(),
                _ => words(&name),
            }
        }
        _ => UNNAMED.to_owned(),
    }
}

/// The first type in angle brackets.
fn inner(arguments: &PathArguments) -> Option<&Type> {
    let PathArguments::AngleBracketed(arguments) = arguments else { return None };
    arguments
        .args
        .iter()
        .find_map(|argument| if let GenericArgument::Type(inner) = argument { Some(inner) } else { None })
}

/// Whether values of the type are free text.
pub(super) fn is_text(kind: &Type) -> bool {
    match kind {
        Type::Reference(reference) => is_text(&reference.elem),
        Type::Path(path) => path.path.segments.last().is_some_and(|last| {
            let is_pointer = ["Box", "Arc", "Cow"].iter().any(|name| last.ident == name);
            last.ident == "String"
                || last.ident == "str"
                || is_pointer && inner(&last.arguments).is_some_and(is_text)
        }),
        _ => false,
    }
}
