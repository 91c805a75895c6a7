//! Sizes as people write them: `4096`, `4k`, `1.5M`, `64Ki`.

/// Reads a size. `k`, `M`, `G` (or `B`) and `T` are powers of a thousand, `Ki`, `Mi`, `Gi` and `Ti` powers of 1024;
/// a fraction is accepted where the result is a whole number, `_` separates digits.
///
/// ```
/// use senmon_train::sizes::parse_size;
/// assert_eq!(parse_size("4096"), Some(4096));
/// assert_eq!(parse_size("4k"), Some(4000));
/// assert_eq!(parse_size("4Ki"), Some(4096));
/// assert_eq!(parse_size("1.5M"), Some(1_500_000));
/// assert_eq!(parse_size("many"), None);
/// ```
pub fn parse_size(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text.find(|c: char| !(c.is_ascii_digit() || c == '.' || c == '_')).unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let factor: u64 = match suffix {
        "" => 1,
        "k" | "K" => 1_000,
        "m" | "M" => 1_000_000,
        "g" | "G" | "b" | "B" => 1_000_000_000,
        "t" | "T" => 1_000_000_000_000,
        "Ki" | "ki" => 1 << 10,
        "Mi" | "mi" => 1 << 20,
        "Gi" | "gi" => 1 << 30,
        "Ti" | "ti" => 1 << 40,
        _ => return None,
    };
    let number = number.replace('_', "");
    let (whole, fraction) = match number.split_once('.') {
        None => (number.as_str(), ""),
        Some((w, f)) if !f.is_empty() && f.bytes().all(|b| b.is_ascii_digit()) => (w, f),
        Some(_) => return None,
    };
    if !whole.bytes().all(|b| b.is_ascii_digit()) || whole.is_empty() {
        return None;
    }
    let whole = whole.parse::<u64>().ok()?.checked_mul(factor)?;
    if fraction.is_empty() {
        return Some(whole);
    }
    // fraction · factor / 10^digits must be whole.
    let scale = 10u128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let part = fraction.parse::<u128>().ok()?.checked_mul(u128::from(factor))?;
    if part % scale != 0 {
        return None;
    }
    whole.checked_add(u64::try_from(part / scale).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_a_size() {
        for (text, value) in [
            ("0", 0),
            (" 12 ", 12),
            ("8M", 8_000_000),
            ("2.5k", 2500),
            ("1_000", 1000),
            ("0.5Ki", 512),
            ("7B", 7_000_000_000),
        ] {
            assert_eq!(parse_size(text), Some(value), "{text}");
        }
        for text in
            ["", "k", "-1", "1.", ".5", "1.2.3", "1.0001k", "4kk", "99999999999999999999", "9999999999T", "_"]
        {
            assert_eq!(parse_size(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_answered(text in ".{0,24}") {
            let _ = parse_size(&text);
        }

        #[test]
        fn plain_numbers_survive(n: u64) {
            prop_assert_eq!(parse_size(&n.to_string()), Some(n));
        }
    }
}
