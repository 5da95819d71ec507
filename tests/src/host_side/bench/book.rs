//! Tables in the pages of the book, between `<!-- table: NAME -->` and `<!-- end of table -->`.

use std::{
    fs,
    io::{self, Write},
};

use crate::{Context, Failure, Result, nested_host::checkout};

/// Set to have a benchmark write its tables into the book.
const BLESS: &str = "FANLIGHT_BLESS";
const END: &str = "<!-- end of table -->";

/// Passes output on, and keeps what may be a table.
#[derive(Debug, Default)]
pub struct Output {
    text: Vec<u8>,
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        io::stdout().write_all(bytes)?;
        self.text.extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stdout().flush()
    }
}

impl Output {
    /// Writes the tables into the book if the environment asks for it. `benchmark` names the place, `origin` goes above.
    pub fn bless(&self, benchmark: &str, origin: &str) -> Result<()> {
        if !is_wanted() {
            return Ok(());
        }
        let dir = checkout().join("docs/src/benchmarks");
        let start = format!("<!-- table: {benchmark} -->");
        for page in fs::read_dir(&dir).context(format!("cannot list {}", dir.display()))? {
            let path = page.context("cannot list the book")?.path();
            let old =
                fs::read_to_string(&path).context(format!("cannot read {}", path.display()))?;
            let tables = tables(&String::from_utf8_lossy(&self.text));
            if let Some(new) = replace(&old, &start, &format!("\n{origin}\n\n{tables}\n")) {
                return fs::write(&path, new).context(format!("cannot write {}", path.display()));
            }
        }
        Err(Failure(format!("no page of the book has {start}")))
    }
}

/// Whether the environment asks for tables in the book.
pub fn is_wanted() -> bool {
    std::env::var_os(BLESS).is_some()
}

/// The tables of `text`, with an empty line between them.
fn tables(text: &str) -> String {
    let mut tables = String::new();
    let mut was_row = true;
    for line in text.lines().map(str::trim_end) {
        let is_row = line.starts_with('|');
        if is_row {
            if !was_row && !tables.is_empty() {
                tables.push('\n');
            }
            tables += line;
            tables.push('\n');
        }
        was_row = is_row;
    }
    tables
}

/// The page with `new` between the marks.
fn replace(page: &str, start: &str, new: &str) -> Option<String> {
    let (before, rest) = page.split_once(start)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{start}\n{new}{END}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_come_between_the_marks() {
        let said = "round 1\n| a |\n|---|\r\n| 1 |\nround 2\n\n| b |\n";
        assert_eq!(tables(said), "| a |\n|---|\n| 1 |\n\n| b |\n");
        let page = "# Boot\n<!-- table: boot -->\nold\n<!-- end of table -->\nrest\n";
        let new = replace(page, "<!-- table: boot -->", "new\n").unwrap();
        assert_eq!(
            new,
            "# Boot\n<!-- table: boot -->\nnew\n<!-- end of table -->\nrest\n"
        );
        assert!(replace(page, "<!-- table: api -->", "").is_none());
    }
}
