//! Text for terminals: width and line breaks.

/// Widest text, also on a wider terminal.
pub const MAX_WIDTH: usize = 100;
/// Narrowest text, also on a narrower terminal.
const MIN_WIDTH: usize = 40;

/// Columns of the terminal on standard output, else of `COLUMNS`, within limits.
pub fn terminal_width() -> usize {
    let terminal = rustix::termios::tcgetwinsize(std::io::stdout());
    let terminal = terminal.ok().map(|size| usize::from(size.ws_col));
    let variable = || std::env::var("COLUMNS").ok()?.parse().ok();
    let columns = terminal.filter(|columns| *columns != 0).or_else(variable);
    columns.map_or(MAX_WIDTH, |columns| columns.clamp(MIN_WIDTH, MAX_WIDTH))
}

/// `text` in lines of at most `width` columns, all indented.
pub fn wrap(text: &str, indent: usize, width: usize) -> String {
    let mut wrapped = String::new();
    let mut column = 0;
    for word in text.split_whitespace() {
        let length = word.chars().count();
        if column == 0 {
            wrapped += &" ".repeat(indent);
            column = indent;
        } else if column + 1 + length > width {
            wrapped.push('\n');
            wrapped += &" ".repeat(indent);
            column = indent;
        } else {
            wrapped.push(' ');
            column += 1;
        }
        wrapped += word;
        column += length;
    }
    wrapped.push('\n');
    wrapped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_break_between_words() {
        assert_eq!(wrap("one two  three", 2, 9), "  one two\n  three\n");
        assert_eq!(wrap("enormous", 2, 4), "  enormous\n");
    }
}
