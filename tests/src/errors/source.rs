//! The source code of the product, without its tests.

use std::fs;
use std::path::{Path, PathBuf};

use syn::punctuated::Punctuated;
use syn::visit_mut::{self, VisitMut};
use syn::{
    Attribute, Block, ExprMatch, File, ImplItem, Item, ItemEnum, ItemImpl, ItemMod, ItemTrait, Meta, Stmt,
    Token, TraitItem,
};

/// The folders of the product's crates, in the order of the sections in `docs/errors.md`.
pub const CRATES: [&str; 6] = ["cni-plugin", "agent", "ipam", "store", "netlink", "api"];

/// A source file.
pub struct Source {
    /// The file, relative to the repository.
    pub file: String,
    /// Its content, without items that exist only in test builds.
    pub content: File,
}

impl Source {
    /// Parses the content of a file. Fails if it is not valid Rust.
    pub fn parse(file: impl Into<String>, text: &str) -> syn::Result<Self> {
        Ok(Self::without_tests(file.into(), syn::parse_file(text)?))
    }

    fn without_tests(file: String, mut content: File) -> Self {
        WithoutTests.visit_file_mut(&mut content);
        Self { file, content }
    }

    /// The folder of the crate.
    pub fn crate_folder(&self) -> &str {
        self.file.split('/').next().unwrap_or_default()
    }

    /// The path of the file's module, for example `agent::ctl::pool`.
    pub fn module(&self) -> String {
        let parts = self.file.trim_end_matches(".rs").split('/');
        parts.filter(|part| !["src", "lib", "main", "mod"].contains(part)).collect::<Vec<_>>().join("::")
    }
}

/// All source files of the product, in the order of their paths. Panics if a file is not readable or not valid Rust.
pub fn product() -> Vec<Source> {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut files = Vec::new();
    for folder in CRATES {
        collect(&top.join(folder).join("src"), &mut files);
    }
    files.sort();
    let (mut sources, mut of_tests) = (Vec::new(), Vec::new());
    for path in files {
        let file = path.strip_prefix(&top).expect("it was found below").to_string_lossy().into_owned();
        let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{file}: {error}"));
        let whole = syn::parse_file(&text).unwrap_or_else(|error| {
            panic!("{file}:{}: {error}", error.span().start().line);
        });
        test_modules(&whole.items, &module_folder(&path), &mut of_tests);
        sources.push((path, Source::without_tests(file, whole)));
    }
    let is_of_tests = |path: &Path| of_tests.iter().any(|module| path.with_extension("").starts_with(module));
    sources.into_iter().filter(|(path, _)| !is_of_tests(path)).map(|(_, source)| source).collect()
}

/// All Rust files in a folder, without `tests.rs` and folders `tests`.
fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    for entry in entries {
        let path = entry.unwrap_or_else(|error| panic!("{}: {error}", folder.display())).path();
        if path.file_stem().is_some_and(|name| name == "tests") {
            continue;
        }
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

/// The folder of the modules that a file declares.
fn module_folder(path: &Path) -> PathBuf {
    let folder = path.parent().unwrap_or(path);
    let is_root =
        ["lib.rs", "main.rs", "mod.rs"].iter().any(|name| path.ends_with(name)) || folder.ends_with("bin");
    if is_root { folder.to_owned() } else { path.with_extension("") }
}

/// The paths, without extension, of the modules that are declared for tests alone.
fn test_modules(items: &[Item], folder: &Path, found: &mut Vec<PathBuf>) {
    for item in items {
        if let Item::Mod(module) = item {
            let path = folder.join(module.ident.to_string());
            match &module.content {
                _ if is_for_tests(&module.attrs) => found.push(path),
                Some((_, items)) => test_modules(items, &path, found),
                None => {}
            }
        }
    }
}

/// Whether an item exists only in test builds.
fn is_for_tests(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        let condition = attribute.path().is_ident("cfg").then(|| attribute.parse_args::<Meta>());
        condition.and_then(Result::ok).is_some_and(|condition| needs_test(&condition))
    })
}

fn needs_test(condition: &Meta) -> bool {
    let Meta::List(list) = condition else { return condition.path().is_ident("test") };
    let parts = list.parse_args_with(Punctuated::<Meta, Token![,]>::parse_terminated).unwrap_or_default();
    if list.path.is_ident("all") {
        parts.iter().any(needs_test)
    } else {
        list.path.is_ident("any") && parts.iter().all(needs_test)
    }
}

/// Removes items that exist only in test builds.
struct WithoutTests;

impl VisitMut for WithoutTests {
    fn visit_file_mut(&mut self, file: &mut File) {
        file.items.retain(|item| !is_for_tests(of_item(item)));
        visit_mut::visit_file_mut(self, file);
    }

    fn visit_item_mod_mut(&mut self, module: &mut ItemMod) {
        if let Some((_, items)) = &mut module.content {
            items.retain(|item| !is_for_tests(of_item(item)));
        }
        visit_mut::visit_item_mod_mut(self, module);
    }

    fn visit_item_enum_mut(&mut self, item: &mut ItemEnum) {
        let variants = std::mem::take(&mut item.variants);
        item.variants = variants.into_iter().filter(|variant| !is_for_tests(&variant.attrs)).collect();
    }

    fn visit_item_impl_mut(&mut self, item: &mut ItemImpl) {
        item.items.retain(|item| match item {
            ImplItem::Const(item) => !is_for_tests(&item.attrs),
            ImplItem::Fn(item) => !is_for_tests(&item.attrs),
            _ => true,
        });
        visit_mut::visit_item_impl_mut(self, item);
    }

    fn visit_item_trait_mut(&mut self, item: &mut ItemTrait) {
        item.items.retain(|item| !matches!(item, TraitItem::Fn(item) if is_for_tests(&item.attrs)));
        visit_mut::visit_item_trait_mut(self, item);
    }

    fn visit_expr_match_mut(&mut self, expression: &mut ExprMatch) {
        expression.arms.retain(|arm| !is_for_tests(&arm.attrs));
        visit_mut::visit_expr_match_mut(self, expression);
    }

    fn visit_block_mut(&mut self, block: &mut Block) {
        block.stmts.retain(|statement| match statement {
            Stmt::Local(local) => !is_for_tests(&local.attrs),
            Stmt::Item(item) => !is_for_tests(of_item(item)),
            Stmt::Macro(called) => !is_for_tests(&called.attrs),
            Stmt::Expr(..) => true,
        });
        visit_mut::visit_block_mut(self, block);
    }
}

fn of_item(item: &Item) -> &[Attribute] {
    match item {
        Item::Const(item) => &item.attrs,
        Item::Enum(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Macro(item) => &item.attrs,
        Item::Mod(item) => &item.attrs,
        Item::Static(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Trait(item) => &item.attrs,
        Item::Type(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        _ => &[],
    }
}
