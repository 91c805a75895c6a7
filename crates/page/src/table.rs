//! Tables. They are sorted by a click on a heading, and saved as CSV or JSON by a button.

use serde::{Deserialize, Serialize};

use crate::error::{Result, same_count};
use crate::format::Format;
use crate::html::{push_caption, push_element, push_text};
use crate::page::Show;
use crate::rich::Rich;

/// Rows beyond this many are not in the page without scripts, and behind a button with them.
const SHOWN: usize = 500;

/// A table. The first column names the rows.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Table {
    /// Its caption.
    pub title: String,
    /// A paragraph above it; may be empty.
    #[serde(default)]
    pub note: Rich,
    /// The columns.
    pub columns: Vec<Column>,
    /// The rows, each with a cell for each column.
    pub rows: Vec<Vec<Cell>>,
}

/// A column of a table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Column {
    /// The heading.
    pub name: String,
    /// How its numbers are written. A column with a format is one of numbers: aligned right, sorted by value, greatest
    /// first.
    #[serde(default)]
    pub format: Option<Format>,
    /// Which of its numbers are set in bold.
    #[serde(default)]
    pub best: Option<Best>,
}

/// Which number of a column is the best.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Best {
    /// The greatest.
    Highest,
    /// The least.
    Lowest,
}

/// A cell of a table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Cell {
    /// A number. One that is not finite is shown, and read back, as [`Cell::Missing`].
    Number(f64),
    /// Text.
    Text(String),
    /// Nothing.
    Missing,
}

impl From<f64> for Cell {
    fn from(value: f64) -> Self {
        if value.is_nan() { Self::Missing } else { Self::Number(value) }
    }
}

impl From<usize> for Cell {
    fn from(value: usize) -> Self {
        Self::Number(value as f64)
    }
}

impl From<&str> for Cell {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Cell {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl<T: Into<Cell>> From<Option<T>> for Cell {
    fn from(value: Option<T>) -> Self {
        value.map_or(Self::Missing, Into::into)
    }
}

impl Column {
    /// A column of text.
    pub fn text(name: impl Into<String>) -> Self {
        Self { name: name.into(), format: None, best: None }
    }

    /// A column of numbers.
    pub fn number(name: impl Into<String>, format: Format) -> Self {
        Self { name: name.into(), format: Some(format), best: None }
    }

    /// With its best number in bold.
    #[must_use]
    pub fn best(mut self, best: Best) -> Self {
        self.best = Some(best);
        self
    }
}

impl Table {
    /// A table without rows.
    pub fn new(title: impl Into<String>, columns: impl IntoIterator<Item = Column>) -> Self {
        Self { title: title.into(), columns: columns.into_iter().collect(), ..Self::default() }
    }

    /// With a paragraph above it.
    #[must_use]
    pub fn note(mut self, note: impl Into<Rich>) -> Self {
        self.note = note.into();
        self
    }

    /// Adds a row.
    #[must_use]
    pub fn row(mut self, cells: impl IntoIterator<Item = Cell>) -> Self {
        self.rows.push(cells.into_iter().collect());
        self
    }

    /// Adds rows.
    #[must_use]
    pub fn rows<R: IntoIterator<Item = Cell>>(mut self, rows: impl IntoIterator<Item = R>) -> Self {
        self.rows.extend(rows.into_iter().map(|cells| cells.into_iter().collect()));
        self
    }

    /// The best number of a column, where it has one.
    fn best(&self, column: usize) -> Option<f64> {
        let numbers = self.rows.iter().filter_map(|row| match row.get(column) {
            Some(Cell::Number(value)) => Some(*value),
            _ => None,
        });
        match self.columns.get(column)?.best? {
            Best::Highest => numbers.reduce(f64::max),
            Best::Lowest => numbers.reduce(f64::min),
        }
    }

    /// The table itself, without its note.
    pub(crate) fn push_table(&self, out: &mut String) {
        out.push_str("<div class=\"scroll\"><table>\n");
        push_element(out, "caption", "hush", if self.title.is_empty() { "Table" } else { &self.title });
        out.push_str("<thead><tr>");
        for column in &self.columns {
            let class = if column.format.is_some() { " class=\"number\"" } else { "" };
            out.push_str(&format!("<th{class} scope=\"col\">"));
            push_text(out, &column.name);
            out.push_str("</th>");
        }
        out.push_str("</tr></thead>\n<tbody>\n");
        let best: Vec<_> = (0..self.columns.len()).map(|column| self.best(column)).collect();
        for row in self.rows.iter().take(SHOWN) {
            out.push_str("<tr>");
            for (place, (cell, column)) in row.iter().zip(&self.columns).enumerate() {
                let number = if column.format.is_some() { " number" } else { "" };
                let format = column.format.clone().unwrap_or_default();
                let (text, value) = match cell {
                    Cell::Number(value) => (format.text(*value), Some(*value)),
                    Cell::Text(text) => (text.clone(), None),
                    Cell::Missing => ("–".to_owned(), None),
                };
                let is_best = value.is_some() && value == best.get(place).copied().flatten();
                let best = if is_best { " best" } else { "" };
                let class = format!("{number}{best}");
                let class =
                    if class.is_empty() { class } else { format!(" class=\"{}\"", class.trim_start()) };
                let (tag, scope) = if place == 0 { ("th", " scope=\"row\"") } else { ("td", "") };
                out.push_str(&format!("<{tag}{class}{scope}>"));
                push_text(out, &text);
                out.push_str(&format!("</{tag}>"));
            }
            out.push_str("</tr>\n");
        }
        out.push_str("</tbody>\n</table></div>\n");
        if self.rows.len() > SHOWN {
            push_element(out, "p", "note", &format!("The first {SHOWN} of {} rows.", self.rows.len()));
        }
    }
}

impl Show for Table {
    fn prepare(&mut self) {
        // JSON has no word for them.
        for cell in self.rows.iter_mut().flatten() {
            if matches!(cell, Cell::Number(value) if !value.is_finite()) {
                *cell = Cell::Missing;
            }
        }
    }

    fn check(&self, at: &str) -> Result<()> {
        for (place, row) in self.rows.iter().enumerate() {
            same_count(at, &format!("cells of row {place}"), self.columns.len(), row.len())?;
        }
        Ok(())
    }

    fn push_static(&self, out: &mut String) {
        push_caption(out, &self.title, &self.note, "");
        self.push_table(out);
    }
}
