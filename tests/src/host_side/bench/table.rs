//! Tables of the book: a column for each VMM, a row for each figure, and how far its rounds are apart.

use super::Rounds;

/// What a VMM has in a row.
#[derive(Clone, Debug)]
pub enum Cell {
    /// A figure of each round that came to its end.
    Figures(Vec<f64>),
    /// It cannot do this, and says so.
    Refused,
    /// It has no such thing.
    None,
    /// No round came to its end.
    Failed,
}

/// A figure of all VMMs.
#[derive(Clone, Debug)]
pub struct Row {
    /// What was measured.
    pub what: String,
    /// Its unit, empty for plain numbers.
    pub unit: &'static str,
    /// Digits behind the point.
    pub decimals: usize,
    /// In the order of the columns.
    pub cells: Vec<Cell>,
}

/// A table.
#[derive(Clone, Debug)]
pub struct Table {
    columns: Vec<String>,
    /// The columns whose ratio is the last one of the table.
    ratio: [usize; 2],
    rows: Vec<Row>,
}

impl Cell {
    /// The figure of each round that has it.
    pub fn of<T>(rounds: &Rounds<T>, figure: impl Fn(&T) -> Option<f64>) -> Self {
        if rounds.samples.is_empty() {
            return Self::Failed;
        }
        let figures: Vec<_> = rounds.samples.iter().filter_map(figure).collect();
        match figures.is_empty() {
            true => Self::None,
            false => Self::Figures(figures),
        }
    }

    /// A row: the figure of each VMM.
    pub fn row<T>(all: &[Rounds<T>], figure: impl Fn(&T) -> Option<f64>) -> Vec<Self> {
        all.iter().map(|rounds| Self::of(rounds, &figure)).collect()
    }

    /// The middle one of the figures.
    pub fn median(&self) -> Option<f64> {
        match self {
            Self::Figures(figures) => Some(super::median(figures, |figure| *figure)),
            Self::Refused | Self::None | Self::Failed => None,
        }
    }

    fn text(&self, unit: &str, decimals: usize) -> String {
        let (Self::Figures(figures), Some(median)) = (self, self.median()) else {
            return match self {
                Self::Refused => "refused",
                Self::Failed => "failed",
                Self::None | Self::Figures(_) => "–",
            }
            .into();
        };
        let least = figures.iter().copied().fold(f64::INFINITY, f64::min);
        let most = figures.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let unit = match unit {
            "" => String::new(),
            unit => format!(" {unit}"),
        };
        match figures.len() {
            1 => format!("{median:.decimals$}{unit}"),
            _ => format!("{median:.decimals$}{unit} ({least:.decimals$}–{most:.decimals$})"),
        }
    }
}

impl Table {
    /// A table with these columns. Its last column is the first of `ratio` divided by the second.
    pub fn new(columns: &[&str], ratio: [usize; 2]) -> Self {
        Self {
            columns: columns.iter().map(|column| (*column).into()).collect(),
            ratio,
            rows: Vec::new(),
        }
    }

    /// Adds a row.
    pub fn row(&mut self, what: &str, unit: &'static str, decimals: usize, cells: Vec<Cell>) {
        self.rows.push(Row {
            what: what.into(),
            unit,
            decimals,
            cells,
        });
    }

    /// The table in Markdown.
    pub fn text(&self) -> String {
        let mut text = String::from("| |");
        for column in &self.columns {
            text += &format!(" {column} |");
        }
        text += " ratio |\n|---|";
        text += &"---|".repeat(self.columns.len() + 1);
        for row in &self.rows {
            text += &format!("\n| {} |", row.what);
            for cell in &row.cells {
                text += &format!(" {} |", cell.text(row.unit, row.decimals));
            }
            let [one, other] = self.ratio.map(|column| row.cells.get(column)?.median());
            text += &match one.zip(other) {
                Some((one, other)) if other != 0.0 => format!(" {:.2} |", one / other),
                _ => " – |".into(),
            };
        }
        text + "\n"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_has_medians_spread_and_ratio() {
        let mut table = Table::new(&["A", "B"], [0, 1]);
        let figures = |all: &[f64]| Cell::Figures(all.to_vec());
        let cells = vec![figures(&[3.0, 1.0, 2.0]), figures(&[4.0])];
        table.row("time", "s", 1, cells);
        table.row("export", "", 0, vec![figures(&[5.0, 5.0]), Cell::Refused]);
        table.row("none", "", 0, vec![Cell::None, Cell::Failed]);
        assert_eq!(
            table.text(),
            "| | A | B | ratio |\n|---|---|---|---|\n\
             | time | 2.0 s (1.0–3.0) | 4.0 s | 0.50 |\n\
             | export | 5 (5–5) | refused | – |\n\
             | none | – | failed | – |\n"
        );
    }
}
