//! JSON inside of HTML, and the numbers in it: short, and with null for what is missing.

use std::io;

use serde::Serialize;
use serde_json::ser::{CompactFormatter, Formatter};

use crate::error::Result;

/// Numbers on a page need no more digits than this; with all of them it would be half as long again.
const DIGITS: usize = 10;

/// Writes JSON whose fractions have at most [`DIGITS`] significant digits.
struct Short(CompactFormatter);

impl Formatter for Short {
    fn write_f64<W: ?Sized + io::Write>(&mut self, writer: &mut W, value: f64) -> io::Result<()> {
        if value.fract() == 0.0 && value.abs() < 1e15 {
            return write!(writer, "{value:.0}");
        }
        let rounded = format!("{value:.*e}", DIGITS - 1).parse().unwrap_or(value);
        self.0.write_f64(writer, rounded)
    }
}

/// `value` as JSON that may stand in a script element: it holds no `<`, so that nothing in it can end the element or open
/// a comment.
pub(crate) fn json(value: &impl Serialize) -> Result<String> {
    let mut out = Vec::new();
    value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, Short(CompactFormatter)))?;
    let text = String::from_utf8_lossy(&out);
    // All four stand in strings only. The separators were no part of JavaScript's strings before 2019.
    Ok(text
        .replace('<', "\\u003c")
        .replace('>', "\\u003e")
        .replace('\u{2028}', "\\u2028")
        .replace('\u{2029}', "\\u2029"))
}

/// Numbers of which some may be missing: NaN here, null in JSON.
pub(crate) mod numbers {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(crate) fn serialize<S: Serializer>(values: &[f64], serializer: S) -> Result<S::Ok, S::Error> {
        values.serialize(serializer)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<f64>, D::Error> {
        let values = Vec::<Option<f64>>::deserialize(deserializer)?;
        Ok(values.into_iter().map(|value| value.unwrap_or(f64::NAN)).collect())
    }
}

/// A number that may be missing: NaN here, null in JSON.
pub(crate) mod number {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(crate) fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        value.serialize(serializer)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        Ok(Option::<f64>::deserialize(deserializer)?.unwrap_or(f64::NAN))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short_and_whole_ones_whole() {
        let values = [1.0 / 3.0, 1e6, 123456789012.0, f64::NAN, 1.5e-9, 0.1, -2.0];
        assert_eq!(
            json(&values.as_slice()).unwrap(),
            "[0.3333333333,1000000,123456789012,null,1.5e-9,0.1,-2]"
        );
    }

    #[test]
    fn nothing_in_json_ends_its_element() {
        let text = "</script><!--<script>\u{2028}\0\"";
        let written = json(&text).unwrap();
        assert!(!written.contains(['<', '>', '\0', '\u{2028}']), "{written}");
        assert_eq!(serde_json::from_str::<String>(&written).unwrap(), text);
    }
}
