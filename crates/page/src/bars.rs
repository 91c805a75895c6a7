//! Bars: values of categories, for one series or several side by side.

use serde::{Deserialize, Serialize};

use crate::embed::numbers;
use crate::error::{Result, same_count};
use crate::format::Format;
use crate::html::push_caption;
use crate::page::{Reference, Show};
use crate::rich::Rich;
use crate::table::{Cell, Column, Table};

/// Bars.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Bars {
    /// What is shown.
    pub title: String,
    /// A paragraph below the title; may be empty.
    #[serde(default)]
    pub note: Rich,
    /// What is seen, in a sentence or two, for readers who cannot. Where it is empty, the page says what is greatest and
    /// least.
    #[serde(default)]
    pub summary: String,
    /// The categories, in their order.
    pub categories: Vec<String>,
    /// What the categories are: "domain".
    #[serde(default)]
    pub category: String,
    /// The series.
    pub series: Vec<BarSeries>,
    /// Where the bars go. Horizontal ones have room for long names.
    #[serde(default)]
    pub direction: Direction,
    /// What the values are: "share of tokens".
    #[serde(default)]
    pub axis: String,
    /// How values are written.
    #[serde(default)]
    pub format: Format,
    /// A line across all bars, such as the level of chance.
    #[serde(default)]
    pub reference: Option<Reference>,
}

/// Bars of one colour.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BarSeries {
    /// Its name.
    pub name: String,
    /// A value for each category; NaN where there is none.
    #[serde(with = "numbers")]
    pub values: Vec<f64>,
    /// Lower ends of intervals, one for each category, or none at all.
    #[serde(default, with = "numbers")]
    pub low: Vec<f64>,
    /// Upper ends of intervals, one for each category, or none at all.
    #[serde(default, with = "numbers")]
    pub high: Vec<f64>,
}

/// Where bars go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// To the right.
    #[default]
    Horizontal,
    /// Up.
    Vertical,
}

impl Bars {
    /// Categories without series.
    pub fn new(title: impl Into<String>, categories: impl IntoIterator<Item = impl Into<String>>) -> Self {
        let categories = categories.into_iter().map(Into::into).collect();
        Self { title: title.into(), categories, ..Self::default() }
    }

    /// With a paragraph below the title.
    #[must_use]
    pub fn note(mut self, note: impl Into<Rich>) -> Self {
        self.note = note.into();
        self
    }

    /// Adds a series: a value for each category.
    #[must_use]
    pub fn series(mut self, name: impl Into<String>, values: impl IntoIterator<Item = f64>) -> Self {
        let values = values.into_iter().collect();
        self.series.push(BarSeries { name: name.into(), values, ..BarSeries::default() });
        self
    }

    /// With intervals for the series that was added last.
    #[must_use]
    pub fn interval(
        mut self,
        low: impl IntoIterator<Item = f64>,
        high: impl IntoIterator<Item = f64>,
    ) -> Self {
        if let Some(series) = self.series.last_mut() {
            series.low = low.into_iter().collect();
            series.high = high.into_iter().collect();
        }
        self
    }

    /// Upwards instead of to the right.
    #[must_use]
    pub fn vertical(mut self) -> Self {
        self.direction = Direction::Vertical;
        self
    }

    /// With words for what the categories and the values are.
    #[must_use]
    pub fn axes(mut self, category: impl Into<String>, axis: impl Into<String>) -> Self {
        self.category = category.into();
        self.axis = axis.into();
        self
    }

    /// Values written so.
    #[must_use]
    pub fn format(mut self, format: Format) -> Self {
        self.format = format;
        self
    }

    /// With a line across all bars.
    #[must_use]
    pub fn reference(mut self, reference: Reference) -> Self {
        self.reference = Some(reference);
        self
    }

    fn table(&self) -> Table {
        let mut columns = vec![Column::text(&self.category)];
        for series in &self.series {
            columns.push(Column::number(&series.name, self.format.clone()));
            if !series.low.is_empty() {
                columns.push(Column::number(format!("{} from", series.name), self.format.clone()));
                columns.push(Column::number(format!("{} to", series.name), self.format.clone()));
            }
        }
        let cell = |values: &[f64], place: usize| Cell::from(values.get(place).copied());
        let rows = self.categories.iter().enumerate().map(|(place, category)| {
            let mut row = vec![Cell::from(category.as_str())];
            for series in &self.series {
                row.push(cell(&series.values, place));
                if !series.low.is_empty() {
                    row.extend([cell(&series.low, place), cell(&series.high, place)]);
                }
            }
            row
        });
        Table::new(format!("{}: values", self.title), columns).rows(rows)
    }
}

impl Show for Bars {
    fn prepare(&mut self) {
        self.reference = self.reference.take().filter(|reference| reference.value.is_finite());
        if !self.summary.is_empty() {
            return;
        }
        let all = self.series.iter().flat_map(|series| {
            series
                .values
                .iter()
                .zip(&self.categories)
                .map(|(value, category)| (*value, &series.name, category))
        });
        let finite: Vec<_> = all.filter(|(value, ..)| value.is_finite()).collect();
        let say = |(value, name, category): &(f64, &String, &String)| {
            let name = if self.series.len() > 1 { format!(", {name}") } else { String::new() };
            format!("{} ({category}{name})", self.format.text(*value))
        };
        let greatest = finite.iter().max_by(|a, b| a.0.total_cmp(&b.0));
        let least = finite.iter().min_by(|a, b| a.0.total_cmp(&b.0));
        let mut summary = format!("Bars of {} categories.", self.categories.len());
        if let (Some(greatest), Some(least)) = (greatest, least) {
            summary.push_str(&format!(" Greatest {}, least {}.", say(greatest), say(least)));
        }
        if let Some(reference) = &self.reference {
            summary.push_str(&format!(" For comparison: {}.", reference.text(&self.format)));
        }
        self.summary = summary;
    }

    fn check(&self, at: &str) -> Result<()> {
        for series in &self.series {
            let count = self.categories.len();
            same_count(at, &format!("values of {:?}", series.name), count, series.values.len())?;
            let intervals = if series.low.is_empty() && series.high.is_empty() { 0 } else { count };
            same_count(at, &format!("lower ends of {:?}", series.name), intervals, series.low.len())?;
            same_count(at, &format!("upper ends of {:?}", series.name), intervals, series.high.len())?;
        }
        Ok(())
    }

    fn push_static(&self, out: &mut String) {
        push_caption(out, &self.title, &self.note, &self.summary);
        self.table().push_table(out);
    }
}
