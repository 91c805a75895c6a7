//! Sentences: a label and the lists beside it, put into plain English by rules.

use super::ExpertWords;
use super::label::{Label, LabelKind};

/// Tokens that a sentence names.
const NAMED: usize = 3;

/// What there is to say of an expert. `notable` has what is beyond chance of each kind; the label is one of them, or none is.
pub(super) fn of(words: &ExpertWords, notable: &[Label], text: &(dyn Fn(u32) -> String + Sync)) -> String {
    let label = &words.label;
    let named = |label: &Label| {
        let names: Vec<String> = label.ids.iter().take(NAMED).map(|id| quoted(&text(*id))).collect();
        names.join(", ")
    };
    let of_kind = |kind: LabelKind| notable.iter().find(|other| other.kind == kind);
    let share = shares(label);
    let mut parts = Vec::new();
    match label.kind {
        LabelKind::None if words.tokens == 0 => return "no tokens at all".into(),
        LabelKind::None => return format!("nothing stands out among {} tokens", counted(words.tokens)),
        LabelKind::Domain => parts.push(format!("{} {}: {share}", degree(label), one_line(&label.name))),
        LabelKind::Token => parts.push(format!("{} tokens such as {}: {share}", degree(label), named(label))),
        LabelKind::Next => {
            parts.push(format!("{} what comes before {}: {share}", degree(label), named(label)))
        }
        LabelKind::Position => parts.push(format!("{} {}: {share}", degree(label), places(label))),
    }
    // What else is beyond chance, in a few words.
    if label.kind != LabelKind::Domain
        && let Some(domain) = of_kind(LabelKind::Domain)
    {
        parts.push(format!("{} {}", degree(domain), one_line(&domain.name)));
    }
    if label.kind != LabelKind::Token
        && let Some(tokens) = of_kind(LabelKind::Token)
    {
        parts.push(format!("tokens such as {}", named(tokens)));
    }
    if label.kind != LabelKind::Position
        && let Some(place) = of_kind(LabelKind::Position)
    {
        parts.push(format!("{} {}", degree(place), places(place)));
    }
    parts.join("; ")
}

/// How much of an expert's tokens a label is true of.
fn degree(label: &Label) -> &'static str {
    match label.share.unwrap_or(0.0) {
        share if share >= 0.5 => "mostly",
        share if share >= 0.25 => "often",
        _ => "more than its share of",
    }
}

/// "71 % of its tokens against 12 % by chance".
fn shares(label: &Label) -> String {
    let (share, chance) = (label.share.unwrap_or(0.0), label.chance.unwrap_or(0.0));
    format!("{} of its tokens against {} by chance", percent(share), percent(chance))
}

/// A share in percent, with two significant digits.
fn percent(share: f64) -> String {
    let percent = 100.0 * share;
    match percent {
        p if p >= 9.95 || p == 0.0 => format!("{p:.0} %"),
        p if p >= 0.995 => format!("{p:.1} %"),
        p => format!("{p:.2} %"),
    }
}

/// "the first 7 tokens of texts", "positions 7 to 14 of texts", "texts from position 63 on".
fn places(label: &Label) -> String {
    match label.positions {
        Some((0, 0)) => "the first token of texts".into(),
        Some((from, u32::MAX)) => format!("texts from position {from} on"),
        Some((0, to)) => format!("the first {} tokens of texts", u64::from(to) + 1),
        Some((from, to)) => format!("positions {from} to {to} of texts"),
        None => String::new(),
    }
}

/// A number with its thousands apart.
fn counted(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// A text in one line.
fn one_line(text: &str) -> String {
    crate::error::shown(text)
}

/// The text of a token between backticks, in one line; with more of them where it has some itself, as Markdown wants it.
fn quoted(token: &str) -> String {
    let token = one_line(token);
    let longest = token.split(|c| c != '`').map(str::len).max().unwrap_or(0);
    let (ticks, space) = ("`".repeat(longest + 1), if longest > 0 { " " } else { "" });
    format!("{ticks}{space}{token}{space}{ticks}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentences_say_how_much_of_what_against_how_much_by_chance() {
        let label = Label {
            kind: LabelKind::Domain,
            name: "Markdown".into(),
            share: Some(0.71),
            chance: Some(0.12),
            ..Label::default()
        };
        let tokens =
            Label { kind: LabelKind::Token, ids: vec![0, 1, 2], share: Some(0.3), ..Label::default() };
        let words = ExpertWords { label: label.clone(), tokens: 100, ..ExpertWords::default() };
        let text = |id: u32| ["##", "-", "``\n"][id as usize].to_owned();
        let found = of(&words, &[label, tokens], &text);
        let wanted = "mostly Markdown: 71 % of its tokens against 12 % by chance; tokens such as `##`, `-`, ``` ``\\n ```";
        assert_eq!(found, wanted);
        let place = Label {
            kind: LabelKind::Position,
            positions: Some((0, 6)),
            share: Some(0.3),
            chance: Some(0.004),
            ..Label::default()
        };
        let words = ExpertWords { label: place.clone(), tokens: 100, ..ExpertWords::default() };
        let wanted = "often the first 7 tokens of texts: 30 % of its tokens against 0.40 % by chance";
        assert_eq!(of(&words, &[place], &text), wanted);
        let none = ExpertWords { tokens: 1_234_567, ..ExpertWords::default() };
        assert_eq!(of(&none, &[], &text), "nothing stands out among 1,234,567 tokens");
        assert_eq!(of(&ExpertWords::default(), &[], &text), "no tokens at all");
    }
}
