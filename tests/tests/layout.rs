//! The source files depend in one direction: no file imports another one round a circle, rooms and crates know only
//! those below them, and a device is named in few places outside its own file.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
};

/// Names of modules from the root of a crate down to a file.
type Module = Vec<String>;

/// The checkout.
fn checkout() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The files of Rust below `dir`, in order.
fn rust_files(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            files.extend(rust_files(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Whether a file holds unit tests alone, which may import whatever they test.
fn is_test(path: &Path) -> bool {
    path.components().any(|part| {
        let name = part.as_os_str().to_string_lossy();
        let name = name.trim_end_matches(".rs");
        matches!(name, "tests" | "test_util" | "test_image") || name.ends_with("_tests")
    })
}

/// The code of a file without comments, the content of strings, and modules of unit tests.
fn code(text: &str) -> String {
    let text = text
        .split_once("#[cfg(test)]\nmod ")
        .map_or(text, |(code, _)| code);
    let bytes: Vec<char> = text.chars().collect();
    let mut code = String::new();
    let mut at = 0;
    while let Some(&c) = bytes.get(at) {
        let next = bytes.get(at + 1).copied();
        if c == '/' && next == Some('/') {
            while bytes.get(at).is_some_and(|&c| c != '\n') {
                at += 1;
            }
        } else if c == '"' {
            // A raw string ends at its hashes, and a backslash hides a quote in others alone.
            let hashes = code.len() - code.trim_end_matches('#').len();
            let is_raw = code.trim_end_matches('#').ends_with('r');
            at += 1;
            while let Some(&c) = bytes.get(at) {
                let end = bytes[at + 1..].iter().take(hashes).filter(|&&c| c == '#');
                if c == '"' && (!is_raw || end.count() == hashes) {
                    break;
                }
                at += if c == '\\' && !is_raw { 2 } else { 1 };
            }
            at += 1;
            code.push_str("\"\"");
        } else if c == '\'' && (next == Some('\\') || bytes.get(at + 2) == Some(&'\'')) {
            // A character, and no lifetime.
            at += if next == Some('\\') { 3 } else { 2 };
            while bytes.get(at).is_some_and(|&c| c != '\'') {
                at += 1;
            }
            at += 1;
        } else {
            code.push(c);
            at += 1;
        }
    }
    code
}

/// The paths that a tree of `use` stands for.
fn flatten(tree: &str) -> Vec<String> {
    let Some((prefix, rest)) = tree.split_once('{') else {
        let path = tree.split(" as ").next().unwrap_or(tree);
        return vec![path.split_whitespace().collect()];
    };
    let inner = rest.rsplit_once('}').map_or(rest, |(inner, _)| inner);
    let mut depth = 0;
    let branches = inner.split(|c| {
        depth += i32::from(c == '{') - i32::from(c == '}');
        c == ',' && depth == 0
    });
    branches
        .filter(|branch| !branch.trim().is_empty())
        .flat_map(flatten)
        .map(|path| format!("{}{path}", prefix.trim()))
        .collect()
}

/// The paths that the code names: those of `use`, and those elsewhere that start at the crate or above the module.
fn paths(code: &str) -> BTreeSet<String> {
    let mut paths = BTreeSet::new();
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let mut rest = code;
    let mut before = ' ';
    while !rest.is_empty() {
        let starts = |word: &str| !is_word(before) && before != ':' && rest.starts_with(word);
        let len = if starts("use ") {
            let end = rest.find(';').unwrap_or(rest.len());
            paths.extend(flatten(&rest[4..end]));
            end
        } else if starts("crate::") || starts("super::") {
            let end = rest.find(|c| !is_word(c) && c != ':').unwrap_or(rest.len());
            paths.insert(rest[..end].trim_end_matches(':').to_owned());
            end
        } else {
            rest.chars().next().map_or(1, char::len_utf8)
        };
        before = rest[..len].chars().next_back().unwrap_or(' ');
        rest = &rest[len..];
    }
    paths
}

/// The modules of a crate, with their files and what each imports of the others.
struct Crate {
    files: BTreeMap<Module, PathBuf>,
    imports: BTreeMap<Module, BTreeSet<Module>>,
}

impl Crate {
    /// Reads the crate whose sources are in `src`. Folders of `programs` are crates of their own, whose root is there.
    fn read(src: &Path, programs: &[&str]) -> io::Result<Self> {
        let mut files = BTreeMap::new();
        for path in rust_files(src)? {
            let relative = path.strip_prefix(src).unwrap_or(&path);
            if is_test(relative) {
                continue;
            }
            let mut module: Module = relative
                .with_extension("")
                .iter()
                .map(|part| part.to_string_lossy().into_owned())
                .collect();
            if matches!(
                module.last().map(String::as_str),
                Some("mod" | "lib" | "main")
            ) {
                module.pop();
            }
            files.insert(module, path);
        }
        let mut read = Self {
            files,
            imports: BTreeMap::new(),
        };
        for (module, path) in &read.files {
            let paths = paths(&code(&fs::read_to_string(path)?));
            let imports = paths
                .iter()
                .filter_map(|path| read.resolve(module, path, programs));
            let imports = imports.filter(|import| {
                // A module and the one that holds it belong together.
                !import.starts_with(module) && !module.starts_with(import)
            });
            let imports = imports.collect();
            read.imports.insert(module.clone(), imports);
        }
        Ok(read)
    }

    /// The module of this crate that holds what `path` names in `module`.
    fn resolve(&self, module: &Module, path: &str, programs: &[&str]) -> Option<Module> {
        let mut parts = path.split("::").peekable();
        let mut full = module.clone();
        match *parts.peek()? {
            "crate" => {
                let program = module
                    .first()
                    .filter(|name| programs.contains(&name.as_str()));
                full = program.cloned().into_iter().collect();
                parts.next();
            }
            "self" => drop(parts.next()),
            "super" => {
                while parts.next_if_eq(&"super").is_some() {
                    full.pop();
                }
            }
            child => {
                let mut own = module.clone();
                own.push(child.to_owned());
                self.files.get(&own)?;
            }
        }
        full.extend(parts.map(str::to_owned));
        while !full.is_empty() && !self.files.contains_key(&full) {
            full.pop();
        }
        self.files.contains_key(&full).then_some(full)
    }

    /// Modules that can be reached from each other.
    fn circles(&self) -> BTreeSet<Vec<Module>> {
        let reached: BTreeMap<&Module, BTreeSet<&Module>> = self
            .imports
            .keys()
            .map(|module| (module, self.reached(module)))
            .collect();
        let mut circles = BTreeSet::new();
        for (module, from) in &reached {
            let round = from.iter().filter(|other| {
                reached
                    .get(**other)
                    .is_some_and(|back| back.contains(module))
            });
            let circle: Vec<Module> = round.map(|other| (*other).clone()).collect();
            if !circle.is_empty() {
                circles.insert(circle);
            }
        }
        circles
    }

    /// All that a module imports, directly or not.
    fn reached(&self, module: &Module) -> BTreeSet<&Module> {
        let mut reached = BTreeSet::new();
        let mut next: Vec<&Module> = self.imports[module].iter().collect();
        while let Some(module) = next.pop() {
            if reached.insert(module) {
                next.extend(self.imports.get(module).into_iter().flatten());
            }
        }
        reached
    }
}

/// The crates with the folders in them that are programs.
const CRATES: [(&str, &[&str]); 5] = [
    ("api", &[]),
    ("arch", &[]),
    ("devices", &[]),
    ("vmm", &["cli"]),
    ("tests", &["bin"]),
];

#[test]
fn no_files_import_each_other_round_a_circle() {
    let mut found = String::new();
    for (name, programs) in CRATES {
        let read = Crate::read(&checkout().join(name).join("src"), programs).unwrap();
        assert!(read.files.len() > 1, "{name}");
        for circle in read.circles() {
            let modules: Vec<_> = circle.iter().map(|module| module.join("::")).collect();
            found += &format!("{name}: {}\n", modules.join(", "));
        }
    }
    assert!(
        found.is_empty(),
        "files import each other round a circle:\n{found}"
    );
}

/// Crates of this workspace that a crate names in its manifest, outside its tests.
fn own_dependencies(name: &str) -> BTreeSet<String> {
    let manifest = fs::read_to_string(checkout().join(name).join("Cargo.toml")).unwrap();
    let (_, rest) = manifest
        .split_once("\n[dependencies]\n")
        .unwrap_or_default();
    let lines = rest.lines().take_while(|line| !line.starts_with('['));
    let names = lines.filter_map(|line| line.split(['.', ' ']).next());
    let own = names.filter_map(|name| name.strip_prefix("fanlight-"));
    own.map(str::to_owned).collect()
}

#[test]
fn crates_know_those_below_them() {
    let known = |name: &str| {
        own_dependencies(name)
            .into_iter()
            .collect::<Vec<_>>()
            .join(" ")
    };
    assert_eq!(known("api"), "");
    assert_eq!(known("arch"), "");
    assert_eq!(known("devices"), "arch");
    assert_eq!(known("vmm"), "api arch devices");
}

/// Files below `folder` of the sources of `vmm` with the paths that each names.
fn named_below(folder: &str) -> Vec<(PathBuf, BTreeSet<String>)> {
    let files = rust_files(&checkout().join("vmm/src").join(folder)).unwrap();
    let named = files.into_iter().map(|path| {
        let paths = paths(&code(&fs::read_to_string(&path).unwrap()));
        (path, paths)
    });
    named.collect()
}

#[test]
fn nothing_imports_the_command_line() {
    for (path, names) in named_below("") {
        if path.iter().any(|part| part == "cli") {
            continue;
        }
        let bad = names
            .iter()
            .find(|name| name.split("::").any(|part| part == "cli"));
        assert_eq!(bad, None, "{}", path.display());
    }
}

#[test]
fn the_viewer_knows_the_api_alone() {
    for (path, names) in named_below("viewer") {
        let bad = names.iter().find(|name| {
            let is_own = name.starts_with("crate::") && !name.starts_with("crate::viewer");
            is_own || (name.starts_with("fanlight") && !name.starts_with("fanlight_api"))
        });
        assert_eq!(bad, None, "{}", path.display());
    }
}

#[test]
fn the_two_sides_of_tests_do_not_know_each_other() {
    let read = Crate::read(&checkout().join("tests/src"), &["bin"]).unwrap();
    for (side, other) in [("guest_side", "host_side"), ("host_side", "guest_side")] {
        for (module, imports) in &read.imports {
            let bad = imports
                .iter()
                .find(|import| module[..1] == [side] && import[..1] == [other]);
            assert_eq!(bad, None, "{}", module.join("::"));
        }
    }
}

/// A crate of these files and contents.
fn made(files: &[(&str, &str)]) -> Crate {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    Crate::read(dir.path(), &["cli"]).unwrap()
}

#[test]
fn a_circle_is_found() {
    let by_use = made(&[
        ("lib.rs", "mod a; mod b; mod c;"),
        ("a.rs", "use crate::{b::B, Root};"),
        ("b.rs", "use super::c::{self, C as D};"),
        ("c/mod.rs", "use std::fmt;\nfn f() { crate::a::f(); }"),
    ]);
    let circle = ["a", "b", "c"].map(|name| vec![name.to_owned()]);
    assert_eq!(
        by_use.circles().into_iter().collect::<Vec<_>>(),
        [circle.to_vec()]
    );
}

#[test]
fn what_is_no_circle_is_not_found() {
    let read = made(&[
        ("lib.rs", "pub mod a; pub mod b;"),
        // A module and its child belong together.
        ("a/mod.rs", "mod child; use child::Child;"),
        ("a/child.rs", "use super::A; use crate::b::B;"),
        // Neither comments, strings nor unit tests import.
        (
            "b.rs",
            "// use crate::a::A;\nconst X: &str = \"use crate::a::A;\";\n#[cfg(test)]\nmod tests { use crate::a::A; }",
        ),
        ("b/tests.rs", "use crate::a::A;"),
        // The program's root is its own.
        ("cli/main.rs", "mod b; use fanlight::a;"),
        ("cli/b.rs", "use crate::c::C;"),
        (
            "cli/c.rs",
            "const LIFE: &'static str = r#\"crate::b::B\"#; const QUOTE: char = '\"';",
        ),
    ]);
    assert_eq!(read.circles(), BTreeSet::new());
    let imports = &read.imports[&vec!["cli".to_owned(), "b".to_owned()]];
    assert_eq!(
        imports
            .iter()
            .next()
            .map(|import| import.join("::"))
            .as_deref(),
        Some("cli::c")
    );
}

/// Lines of code in these rooms of `vmm` that name a device, outside its own file. A word of the code names it if it
/// is the name or starts with it: `gpu`, `GpuStats`.
fn places(name: &str, rooms: &[&str]) -> Vec<String> {
    let src = checkout().join("vmm/src");
    let own = src.join(format!("vm/devices/{name}.rs"));
    assert!(own.exists(), "{}", own.display());
    let capitalized = name[..1].to_uppercase() + &name[1..];
    let is_name = |word: &str| word.to_lowercase() == name || word.starts_with(&capitalized);
    let mut places = Vec::new();
    for path in rooms
        .iter()
        .flat_map(|room| rust_files(&src.join(room)).unwrap())
    {
        if is_test(path.strip_prefix(&src).unwrap()) || path == own {
            continue;
        }
        for line in code(&fs::read_to_string(&path).unwrap()).lines() {
            if line.split(|c: char| !c.is_alphanumeric()).any(is_name) {
                places.push(format!("{}: {}", path.display(), line.trim()));
            }
        }
    }
    places
}

/// A device is its file `vm/devices/NAME.rs`, the module and the line in the list of kinds. The control room names the
/// API's methods of one: a disk is enlarged, a GPU has calls of the display.
#[test]
fn a_device_is_named_in_few_places() {
    for (name, machine, control) in [("rng", 2, 0), ("disk", 2, 14), ("gpu", 4, 30)] {
        let found = places(name, &["vm", "host", "kvm"]);
        assert!(found.len() <= machine, "{name}:\n{}", found.join("\n"));
        let found = places(name, &["control"]);
        assert!(found.len() <= control, "{name}:\n{}", found.join("\n"));
    }
}
