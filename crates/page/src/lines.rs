//! Lines over an axis, with bands.

use serde::{Deserialize, Serialize};

use crate::embed::numbers;
use crate::error::{Result, same_count};
use crate::format::Format;
use crate::html::push_caption;
use crate::page::{Reference, Show};
use crate::rich::Rich;
use crate::table::{Cell, Column, Table};
use crate::thin;

/// Lines with this many points are drawn as if they had all of theirs; [`Lines::most_points`] is that for a start.
const MOST_POINTS: usize = 800;

/// Lines.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Lines {
    /// What is shown.
    pub title: String,
    /// A paragraph below the title; may be empty.
    #[serde(default)]
    pub note: Rich,
    /// What is seen, in a sentence or two, for readers who cannot. Where it is empty, the page says how each line goes.
    #[serde(default)]
    pub summary: String,
    /// The axis to the right.
    pub x: Axis,
    /// The axis upwards.
    pub y: Axis,
    /// The lines.
    pub series: Vec<Line>,
    /// Lines across, such as the level of chance.
    #[serde(default)]
    pub references: Vec<Reference>,
    /// Lines with more points than this are thinned out when the page is written, so that their shape stays.
    #[serde(default = "most_points")]
    pub most_points: usize,
}

fn most_points() -> usize {
    MOST_POINTS
}

/// An axis.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Axis {
    /// What is measured, with its unit.
    pub label: String,
    /// How values are written.
    #[serde(default)]
    pub format: Format,
    /// Whether equal distances are equal ratios. Values that are not above 0 are not drawn.
    #[serde(default)]
    pub log: bool,
    /// Where it begins, if not at the least value.
    #[serde(default)]
    pub min: Option<f64>,
    /// Where it ends, if not at the greatest value.
    #[serde(default)]
    pub max: Option<f64>,
}

/// A line.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Line {
    /// Its name.
    pub name: String,
    /// Where its points are, in ascending order.
    #[serde(with = "numbers")]
    pub x: Vec<f64>,
    /// The points; NaN where the line is broken.
    #[serde(with = "numbers")]
    pub y: Vec<f64>,
    /// The band's lower edge, for each point, or none at all.
    #[serde(default, with = "numbers")]
    pub low: Vec<f64>,
    /// The band's upper edge, for each point, or none at all.
    #[serde(default, with = "numbers")]
    pub high: Vec<f64>,
    /// Points without a line between them.
    #[serde(default)]
    pub points: bool,
}

impl Axis {
    /// An axis with its name.
    pub fn new(label: impl Into<String>) -> Self {
        Self { label: label.into(), ..Self::default() }
    }

    /// With equal distances for equal ratios.
    #[must_use]
    pub fn log(mut self) -> Self {
        self.log = true;
        self
    }

    /// Values written so.
    #[must_use]
    pub fn format(mut self, format: Format) -> Self {
        self.format = format;
        self
    }

    /// From `min` to `max`.
    #[must_use]
    pub fn range(mut self, min: impl Into<Option<f64>>, max: impl Into<Option<f64>>) -> Self {
        self.min = min.into();
        self.max = max.into();
        self
    }
}

impl Line {
    /// A line through points.
    pub fn new(
        name: impl Into<String>,
        x: impl IntoIterator<Item = f64>,
        y: impl IntoIterator<Item = f64>,
    ) -> Self {
        Self { name: name.into(), x: x.into_iter().collect(), y: y.into_iter().collect(), ..Self::default() }
    }

    /// With a band around it.
    #[must_use]
    pub fn band(mut self, low: impl IntoIterator<Item = f64>, high: impl IntoIterator<Item = f64>) -> Self {
        self.low = low.into_iter().collect();
        self.high = high.into_iter().collect();
        self
    }

    /// As points without a line.
    #[must_use]
    pub fn points(mut self) -> Self {
        self.points = true;
        self
    }

    fn keep(&mut self, places: &[usize]) {
        for values in [&mut self.x, &mut self.y, &mut self.low, &mut self.high] {
            if !values.is_empty() {
                *values = places.iter().filter_map(|&place| values.get(place).copied()).collect();
            }
        }
    }

    /// The finite points: x and y.
    fn seen(&self) -> impl Iterator<Item = (f64, f64)> + '_ {
        self.x.iter().copied().zip(self.y.iter().copied()).filter(|(x, y)| x.is_finite() && y.is_finite())
    }

    /// The first, the last, the lowest and the highest point.
    fn marks(&self) -> Option<[(f64, f64); 4]> {
        let lowest = self.seen().min_by(|a, b| a.1.total_cmp(&b.1))?;
        let highest = self.seen().max_by(|a, b| a.1.total_cmp(&b.1))?;
        Some([self.seen().next()?, self.seen().last()?, lowest, highest])
    }
}

impl Lines {
    /// Axes without lines.
    pub fn new(title: impl Into<String>, x: Axis, y: Axis) -> Self {
        Self {
            title: title.into(),
            note: Rich::new(),
            summary: String::new(),
            x,
            y,
            series: Vec::new(),
            references: Vec::new(),
            most_points: MOST_POINTS,
        }
    }

    /// With a paragraph below the title.
    #[must_use]
    pub fn note(mut self, note: impl Into<Rich>) -> Self {
        self.note = note.into();
        self
    }

    /// Adds a line.
    #[must_use]
    pub fn line(mut self, line: Line) -> Self {
        self.series.push(line);
        self
    }

    /// Adds a line across.
    #[must_use]
    pub fn reference(mut self, reference: Reference) -> Self {
        self.references.push(reference);
        self
    }

    /// Lines over the same points are thinned out together, so that a read-out finds all of them at one place.
    fn thin_out(&mut self) {
        let mut done = vec![false; self.series.len()];
        for first in 0..self.series.len() {
            if done[first] {
                continue;
            }
            let group: Vec<usize> =
                (first..self.series.len()).filter(|&i| self.series[i].x == self.series[first].x).collect();
            let ys: Vec<&[f64]> = group.iter().map(|&i| self.series[i].y.as_slice()).collect();
            let xs = &self.series[first].x;
            let is_sound = |&i: &usize| {
                let Line { y, low, high, .. } = &self.series[i];
                y.len() == xs.len()
                    && [low, high].iter().all(|edge| edge.is_empty() || edge.len() == xs.len())
            };
            // What check() refuses is left for it to see. A line with NaN in x has no equal, itself included.
            if group.first() != Some(&first) || !group.iter().all(is_sound) {
                continue;
            }
            let places = thin::places(xs, &ys, self.most_points);
            for i in group {
                done[i] = true;
                self.series[i].keep(&places);
            }
        }
    }

    fn table(&self) -> Table {
        let y = |name: &str| Column::number(name, self.y.format.clone());
        let x = |name: &str| Column::number(name, self.x.format.clone());
        let columns = [
            Column::text("line"),
            y("first"),
            y("last"),
            y("lowest"),
            x("lowest at"),
            y("highest"),
            x("highest at"),
        ];
        let rows = self.series.iter().map(|line| {
            let [first, last, low, high] = line.marks().unwrap_or([(f64::NAN, f64::NAN); 4]);
            let mut row = vec![Cell::from(line.name.as_str())];
            row.extend([first.1, last.1, low.1, low.0, high.1, high.0].map(Cell::from));
            row
        });
        Table::new(format!("{}: {} over {}", self.title, self.y.label, self.x.label), columns).rows(rows)
    }
}

impl Show for Lines {
    fn prepare(&mut self) {
        if self.summary.is_empty() {
            let mut summary = format!("Lines of {} over {}.", self.y.label, self.x.label);
            for line in self.series.iter().take(6) {
                if let Some([first, last, lowest, _]) = line.marks() {
                    let text = |value| self.y.format.text(value);
                    let (first, last, low) = (text(first.1), text(last.1), text(lowest.1));
                    summary.push_str(&format!(" {}: from {first} to {last}, lowest {low}.", line.name));
                }
            }
            for reference in &self.references {
                summary.push_str(&format!(" For comparison: {}.", reference.text(&self.y.format)));
            }
            self.summary = summary;
        }
        self.references.retain(|reference| reference.value.is_finite());
        self.thin_out();
    }

    fn check(&self, at: &str) -> Result<()> {
        for line in &self.series {
            let count = line.x.len();
            same_count(at, &format!("points of {:?}", line.name), count, line.y.len())?;
            let band = if line.low.is_empty() && line.high.is_empty() { 0 } else { count };
            same_count(at, &format!("lower edge of {:?}", line.name), band, line.low.len())?;
            same_count(at, &format!("upper edge of {:?}", line.name), band, line.high.len())?;
        }
        Ok(())
    }

    fn push_static(&self, out: &mut String) {
        push_caption(out, &self.title, &self.note, &self.summary);
        self.table().push_table(out);
    }
}
