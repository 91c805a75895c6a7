//! How numbers are written. `page.js` has the same rules in `fmt`, for what it draws; the browser test holds them together.

use serde::{Deserialize, Serialize};

/// How a number is written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Format {
    /// Its form.
    pub style: Style,
    /// Digits after the point; significant digits for [`Style::Auto`] and [`Style::Compact`].
    pub digits: u8,
    /// A unit behind the number; may be empty.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub unit: String,
    /// Whether positive numbers have a plus sign, as differences should.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub signed: bool,
}

/// The form of a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Style {
    /// Whole numbers whole, others with a number of significant digits.
    Auto,
    /// A fixed number of digits after the point.
    Fixed,
    /// A share, 1 being 100%.
    Percent,
    /// Thousands, millions, billions and trillions as k, M, B and T.
    Compact,
    /// A ratio: 1.50×.
    Times,
}

impl Default for Format {
    fn default() -> Self {
        Self::auto()
    }
}

impl Format {
    /// Whole numbers whole, others with four significant digits.
    pub fn auto() -> Self {
        Self::of(Style::Auto, 4)
    }

    /// Whole numbers, thousands grouped.
    pub fn integer() -> Self {
        Self::of(Style::Fixed, 0)
    }

    /// A fixed number of digits after the point (20 at most).
    pub fn fixed(digits: u8) -> Self {
        Self::of(Style::Fixed, digits)
    }

    /// A share between 0 and 1 as a percentage.
    pub fn percent(digits: u8) -> Self {
        Self::of(Style::Percent, digits)
    }

    /// Three significant digits with k, M, B or T.
    pub fn compact() -> Self {
        Self::of(Style::Compact, 3)
    }

    /// A ratio, written as 1.50×.
    pub fn times(digits: u8) -> Self {
        Self::of(Style::Times, digits)
    }

    /// With a unit behind the number.
    #[must_use]
    pub fn unit(mut self, unit: impl Into<String>) -> Self {
        self.unit = unit.into();
        self
    }

    /// With a plus sign before positive numbers.
    #[must_use]
    pub fn signed(mut self) -> Self {
        self.signed = true;
        self
    }

    fn of(style: Style, digits: u8) -> Self {
        Self { style, digits, unit: String::new(), signed: false }
    }

    /// The number as text; a dash for one that is not finite, as JSON has no word for it.
    pub fn text(&self, value: f64) -> String {
        if !value.is_finite() {
            return "–".to_owned();
        }
        let size = value.abs();
        let digits = usize::from(self.digits.min(20));
        let fixed = |number: f64| {
            // Beyond, no digit is sure.
            if number < 1e15 { grouped(&fixed(number, digits)) } else { significant(number, 4) }
        };
        let body = match self.style {
            Style::Fixed => fixed(size),
            Style::Percent => fixed(size * 100.0) + "%",
            Style::Times => fixed(size) + "×",
            Style::Compact => compact(size, digits),
            Style::Auto => significant(size, digits),
        };
        let nothing = !body.contains(|c: char| ('1'..='9').contains(&c));
        let sign = match () {
            () if nothing => "",
            () if value < 0.0 => "−",
            () if self.signed => "+",
            () => "",
        };
        let gap = if self.unit.is_empty() { "" } else { "\u{a0}" };
        format!("{sign}{body}{gap}{}", self.unit)
    }
}

/// `toFixed` of JavaScript: like Rust's own, but halves are rounded up, not to even.
fn fixed(size: f64, digits: usize) -> String {
    let scaled = size * 10f64.powi(digits as i32);
    // Exact: only then is a half a half, and not the nearest number to something else.
    let half = scaled.fract() == 0.5 && (size * 2f64.powi(digits as i32 + 1)).fract() == 0.0;
    let rounded = if half { scaled.ceil() / 10f64.powi(digits as i32) } else { size };
    format!("{rounded:.digits$}")
}

/// Commas between groups of three digits before the point, from five digits on: 1234 is read as easily without.
fn grouped(number: &str) -> String {
    let (whole, rest) = number.find('.').map_or((number, ""), |point| number.split_at(point));
    if whole.len() < 5 {
        return number.to_owned();
    }
    let mut out = String::with_capacity(number.len() + number.len() / 3);
    for (i, digit) in whole.chars().enumerate() {
        if i > 0 && (whole.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out + rest
}

fn without_zeros(number: String) -> String {
    if number.contains('.') { number.trim_end_matches('0').trim_end_matches('.').to_owned() } else { number }
}

fn significant(size: f64, digits: usize) -> String {
    if size == 0.0 {
        return "0".to_owned();
    }
    if !(1e-4..1e15).contains(&size) {
        return format!("{size:.*e}", digits.max(1) - 1);
    }
    if size.fract() == 0.0 {
        return grouped(&fixed(size, 0));
    }
    let shortest = format!("{size:e}");
    let exponent: i32 = shortest.rsplit('e').next().and_then(|text| text.parse().ok()).unwrap_or(0);
    let decimals = (digits as i32 - 1 - exponent).clamp(0, 20);
    grouped(&without_zeros(fixed(size, decimals as usize)))
}

fn compact(size: f64, digits: usize) -> String {
    if size >= 1e15 {
        return significant(size, digits);
    }
    for (unit, letter) in [(1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")] {
        // From where three digits would be rounded up to the unit.
        if size >= unit * 0.9995 {
            let scaled = size / unit;
            let before = if scaled >= 100.0 { 3 } else { 1 + usize::from(scaled >= 10.0) };
            return grouped(&without_zeros(fixed(scaled, digits.saturating_sub(before)))) + letter;
        }
    }
    significant(size, digits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_as_people_read_them() {
        let cases = [
            (Format::auto(), 0.0, "0"),
            (Format::auto(), 1234.0, "1234"),
            (Format::auto(), 1234567.0, "1,234,567"),
            (Format::auto(), 2.0 / 3.0, "0.6667"),
            (Format::auto(), 0.5, "0.5"),
            (Format::auto(), 0.0000123, "1.230e-5"),
            (Format::auto(), 98765.4321, "98,765"),
            (Format::auto(), f64::NAN, "–"),
            (Format::auto(), f64::NEG_INFINITY, "–"),
            (Format::percent(1), 1e20, "1.000e22%"),
            (Format::integer(), 12345.6, "12,346"),
            (Format::integer(), -0.2, "0"),
            (Format::integer(), 2.5, "3"),
            (Format::fixed(1), 1.45, "1.4"),
            (Format::fixed(2), 0.125, "0.13"),
            (Format::fixed(3).signed(), 0.0214, "+0.021"),
            (Format::fixed(3).signed(), -0.0214, "−0.021"),
            (Format::percent(1), 0.0078125, "0.8%"),
            (Format::percent(0), 1.0, "100%"),
            (Format::times(2), 1.5, "1.50×"),
            (Format::compact(), 999.0, "999"),
            (Format::compact(), 999_600.0, "1M"),
            (Format::compact(), 1_250_000.0, "1.25M"),
            (Format::compact(), 64_000.0, "64k"),
            (Format::compact(), 6.92e9, "6.92B"),
            (Format::integer().unit("tokens/s"), 31234.0, "31,234\u{a0}tokens/s"),
        ];
        for (format, value, text) in cases {
            assert_eq!(format.text(value), text, "{value} as {format:?}");
        }
    }
}
