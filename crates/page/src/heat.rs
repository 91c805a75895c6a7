//! Heat maps: a value for each row and column, as a colour.

use serde::{Deserialize, Serialize};

use crate::embed::numbers;
use crate::error::{Result, invalid, same_count};
use crate::format::Format;
use crate::html::push_caption;
use crate::page::{Reference, Show};
use crate::rich::Rich;
use crate::table::{Cell, Column, Table};

/// Maps with more cells than this have a row of extremes for each of theirs in the page without scripts.
const MOST_CELLS: usize = 1024;

/// A heat map.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Heat {
    /// What is shown.
    pub title: String,
    /// A paragraph below the title; may be empty.
    #[serde(default)]
    pub note: Rich,
    /// What is seen, in a sentence or two, for readers who cannot. Where it is empty, the page says what is greatest and
    /// least.
    #[serde(default)]
    pub summary: String,
    /// What a row is: "layer".
    #[serde(default)]
    pub row: String,
    /// What a column is: "expert".
    #[serde(default)]
    pub column: String,
    /// What a value is: "share of tokens".
    #[serde(default)]
    pub value: String,
    /// Names of the rows.
    pub rows: Vec<String>,
    /// Names of the columns.
    pub columns: Vec<String>,
    /// The values, row after row: \[rows, columns\]; NaN where there is none.
    #[serde(with = "numbers")]
    pub values: Vec<f64>,
    /// Which colour a value has.
    #[serde(default)]
    pub scale: Scale,
    /// How values are written.
    #[serde(default)]
    pub format: Format,
}

/// Which colour a value has. Values beyond the ends have the colour of the end.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Scale {
    /// From the least value to the greatest.
    #[default]
    Whole,
    /// From `low` to `high`.
    Sequential {
        /// The value of the faintest colour.
        low: f64,
        /// The value of the strongest colour.
        high: f64,
    },
    /// Away from a centre, in one colour below it and another above. Each side goes from the centre to its own end: a share
    /// cannot be further below an even one than 0, but far above it.
    Diverging {
        /// The value of the strongest colour below the centre.
        low: f64,
        /// The value without colour, mostly the level of chance.
        centre: Reference,
        /// The value of the strongest colour above the centre.
        high: f64,
    },
}

impl Scale {
    /// From `low` to `high`.
    pub fn sequential(low: f64, high: f64) -> Self {
        Self::Sequential { low, high }
    }

    /// Away from the level of chance, to `low` below it and `high` above.
    pub fn diverging(low: f64, chance: f64, high: f64) -> Self {
        Self::Diverging { low, centre: Reference::chance(chance), high }
    }
}

impl Heat {
    /// A map without values.
    pub fn new(
        title: impl Into<String>,
        rows: impl IntoIterator<Item = impl Into<String>>,
        columns: impl IntoIterator<Item = impl Into<String>>,
    ) -> Self {
        Self {
            title: title.into(),
            rows: rows.into_iter().map(Into::into).collect(),
            columns: columns.into_iter().map(Into::into).collect(),
            ..Self::default()
        }
    }

    /// With a paragraph below the title.
    #[must_use]
    pub fn note(mut self, note: impl Into<Rich>) -> Self {
        self.note = note.into();
        self
    }

    /// With its values, row after row: \[rows, columns\].
    #[must_use]
    pub fn values(mut self, values: impl IntoIterator<Item = f64>) -> Self {
        self.values = values.into_iter().collect();
        self
    }

    /// With words for what a row, a column and a value are.
    #[must_use]
    pub fn axes(
        mut self,
        row: impl Into<String>,
        column: impl Into<String>,
        value: impl Into<String>,
    ) -> Self {
        self.row = row.into();
        self.column = column.into();
        self.value = value.into();
        self
    }

    /// With colours so.
    #[must_use]
    pub fn scale(mut self, scale: Scale) -> Self {
        self.scale = scale;
        self
    }

    /// Values written so.
    #[must_use]
    pub fn format(mut self, format: Format) -> Self {
        self.format = format;
        self
    }

    /// The least and the greatest of values, with their places.
    fn ends(values: &[f64]) -> Option<[(usize, f64); 2]> {
        let seen = || values.iter().copied().enumerate().filter(|(_, value)| value.is_finite());
        let least = seen().min_by(|a, b| a.1.total_cmp(&b.1))?;
        // The first of equals, as the least one is.
        let greatest = seen().rev().max_by(|a, b| a.1.total_cmp(&b.1))?;
        Some([least, greatest])
    }

    /// "layer 3, expert 17" for a place among the values.
    fn place(&self, place: usize) -> String {
        let across = self.columns.len().max(1);
        let name = |kind: &str, names: &[String], at: usize| {
            let name = names.get(at).map_or("", String::as_str);
            if kind.is_empty() { name.to_owned() } else { format!("{kind} {name}") }
        };
        let row = name(&self.row, &self.rows, place / across);
        format!("{row}, {}", name(&self.column, &self.columns, place % across))
    }

    fn table(&self) -> Table {
        let number = |name: &str| Column::number(name, self.format.clone());
        let by_row = self.rows.iter().zip(self.values.chunks(self.columns.len().max(1)));
        if self.values.len() <= MOST_CELLS {
            let corner = format!("{} \\ {}", self.row, self.column);
            let columns =
                [Column::text(corner)].into_iter().chain(self.columns.iter().map(|name| number(name)));
            let rows = by_row.map(|(name, values)| {
                [Cell::from(name.as_str())].into_iter().chain(values.iter().copied().map(Cell::from))
            });
            return Table::new(format!("{}: values", self.title), columns).rows(rows);
        }
        let columns = [
            Column::text(&self.row),
            number("least"),
            Column::text(format!("least: {}", self.column)),
            number("greatest"),
            Column::text(format!("greatest: {}", self.column)),
            number("mean"),
        ];
        let rows = by_row.map(|(name, values)| {
            let mut row = vec![Cell::from(name.as_str())];
            for end in Self::ends(values).map_or([None; 2], |ends| ends.map(Some)) {
                row.push(Cell::from(end.map(|(_, value)| value)));
                row.push(end.and_then(|(place, _)| self.columns.get(place)).map(String::as_str).into());
            }
            let finite: Vec<f64> = values.iter().copied().filter(|value| value.is_finite()).collect();
            row.push(Cell::from(finite.iter().sum::<f64>() / finite.len() as f64));
            row
        });
        Table::new(format!("{}: least, greatest and mean", self.title), columns).rows(rows)
    }
}

impl Show for Heat {
    fn prepare(&mut self) {
        if !self.summary.is_empty() {
            return;
        }
        let (rows, columns) = (self.rows.len(), self.columns.len());
        let mut summary = format!("Heat map of {rows} rows and {columns} columns.");
        if let Some([least, greatest]) = Self::ends(&self.values) {
            let say = |(place, value)| format!("{} ({})", self.format.text(value), self.place(place));
            summary.push_str(&format!(" Greatest {}, least {}.", say(greatest), say(least)));
        }
        if let Scale::Diverging { centre, .. } = &self.scale {
            summary.push_str(&format!(" For comparison: {}.", centre.text(&self.format)));
        }
        self.summary = summary;
    }

    fn check(&self, at: &str) -> Result<()> {
        let cells = self.rows.len().saturating_mul(self.columns.len());
        let what = format!("values of {} rows and {} columns", self.rows.len(), self.columns.len());
        same_count(at, &what, cells, self.values.len())?;
        let ordered = match &self.scale {
            Scale::Whole => true,
            Scale::Sequential { low, high } => low < high && (high - low).is_finite(),
            Scale::Diverging { low, centre, high } => {
                *low < centre.value && centre.value < *high && (high - low).is_finite()
            }
        };
        if !ordered {
            return Err(invalid(
                at,
                format!("the scale does not ascend between finite ends: {:?}", self.scale),
            ));
        }
        Ok(())
    }

    fn push_static(&self, out: &mut String) {
        push_caption(out, &self.title, &self.note, &self.summary);
        self.table().push_table(out);
    }
}
