//! What may be said of a comparison, in words: rules over intervals, and never more than they hold.

use serde::{Deserialize, Serialize};

use crate::analysis::{Analysis, Comparison};
use crate::plan::Equality;
use crate::statistics::Interval;

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finding {
    /// The first arm's loss is lower, and the whole interval says so.
    Better,
    /// The interval holds 0.
    NoGain,
    /// The first arm's loss is higher, and the whole interval says so.
    Worse,
    /// Nothing can be said.
    Unknown,
}

/// A verdict.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// What was found.
    pub finding: Finding,
    /// In two or three words.
    pub label: String,
    /// In a sentence.
    pub sentence: String,
    /// What it rests on, and what speaks against it; a sentence each.
    pub notes: Vec<String>,
}

/// The verdicts of all comparisons, in their order.
pub fn verdicts(analysis: &Analysis) -> Vec<Verdict> {
    analysis.comparisons.iter().map(|c| verdict(c, analysis.intervals, analysis.alpha)).collect()
}

/// The verdict of one of a number of intervals that hold together but for `alpha`.
pub fn verdict(c: &Comparison, intervals: usize, alpha: f64) -> Verdict {
    let (us, them) = (c.subject.words(), c.other.words());
    let seeds = match c.by_seed.len() {
        1 => "1 seed".to_owned(),
        n => format!("{n} seeds"),
    };
    let (at, level) = (c.equality.words(), format!("{:.0} % interval", 100.0 * (1.0 - alpha)));
    let mut notes = Vec::new();
    let Some(d) = c.difference else {
        let sentence = format!(
            "with one seed nothing can be claimed: at {at} {us} minus {them} is {} bits per byte, and how much of that is chance \
             is not known",
            signed(c.mean, c.mean)
        );
        notes.push("three or more seeds give an interval (--seeds 3)".into());
        return Verdict { finding: Finding::Unknown, label: "Not known".into(), sentence, notes };
    };
    let width = d.high - d.low;
    let rates = match c.rates {
        (a, b) if a == b => format!(", both at learning rate {a}"),
        (a, b) if a.is_finite() && b.is_finite() => format!(", at learning rates {a} and {b}"),
        _ => String::new(),
    };
    let numbers = format!(
        "{us} minus {them} is {} bits per byte, {level} {} to {} ({seeds}{rates})",
        signed(d.estimate, width),
        signed(d.low, width),
        signed(d.high, width)
    );
    let by_numbers = match () {
        () if d.high < 0.0 => Finding::Better,
        () if d.low > 0.0 => Finding::Worse,
        () => Finding::NoGain,
    };
    // Whoever was read before its end may only have lost by that.
    let unfair = match by_numbers {
        Finding::Better => c.cut.contains(&c.other),
        Finding::Worse => c.cut.contains(&c.subject),
        _ => false,
    };
    let finding = if unfair || c.unclaimed.is_some() { Finding::Unknown } else { by_numbers };
    let reached = c.reach.as_ref().and_then(|r| r.time).filter(|t| t.high < 1.0);
    let (label, sentence) = match finding {
        Finding::Better => match reached {
            Some(time) => (
                format!("{us} pays"),
                format!(
                    "on this data {us} reaches {}'s final loss in {} of its time, {level} {} to {} ({seeds}); at {at}, {numbers}",
                    them.trim_start_matches("the "),
                    part(time.estimate),
                    part(time.low),
                    part(time.high)
                ),
            ),
            None => (
                format!("{us} is better"),
                format!("on this data {us} is better than {them} at {at}: {numbers}"),
            ),
        },
        Finding::NoGain => ("No gain shown".into(), format!("no gain shown at {at}: {numbers}")),
        Finding::Worse => {
            (format!("{us} is worse"), format!("on this data {us} is worse than {them} at {at}: {numbers}"))
        }
        Finding::Unknown => (
            "Not known".into(),
            match &c.unclaimed {
                Some(why) => format!("no claim at {at}: {numbers}, but {why}"),
                None => format!(
                    "no claim at {at}: {numbers}, but {} was read before its learning rate had come down, which alone may make it lose",
                    if by_numbers == Finding::Better { &them } else { &us }
                ),
            },
        ),
    };
    if let Some(reach) = &c.reach {
        notes.push(match (reach.time, reach.tokens, reach.flops) {
            // There is a ratio only where all seeds came to it: without a difference such are chosen by chance, and say nothing.
            (Some(_), ..) if finding != Finding::Better => {
                format!("{us} came to the final loss of {them} in {} of {} seeds", reach.reached, reach.of)
            }
            (Some(time), Some(tokens), Some(flops)) => format!(
                "to come to the final loss of {them}, {us} took {} of its time, {} of its tokens and {} of its training FLOPs{}",
                ratio_words(&time),
                ratio_words(&tokens),
                ratio_words(&flops),
                if time.high < 1.0 { "" } else { ": not shown to be faster" }
            ),
            _ if reach.reached < reach.of => format!(
                "{us} came to the final loss of {them} in {} of {} seeds: how much sooner or later is not claimed",
                reach.reached, reach.of
            ),
            _ => format!("how soon {us} came to the final loss of {them} has no interval"),
        });
    }
    if intervals > 1 {
        notes.push(format!(
            "{intervals} intervals hold together with {:.0} %: each is one of {:.2} % (Bonferroni){}",
            100.0 * (1.0 - alpha),
            100.0 * d.level,
            c.holm_p.map_or_else(String::new, |p| format!("; p after Holm {}", p_words(p)))
        ));
    }
    if c.by_seed.len() == 2 {
        notes.push("two seeds make intervals very wide".into());
    }
    for arm in &c.risen {
        notes.push(format!(
            "{} overfits: its held-out loss rose again before the end; all runs are read at their lowest held-out loss, as if they had \
             been stopped there",
            arm.words()
        ));
    }
    for cut in c.cut.iter().filter(|_| !unfair) {
        notes.push(format!(
            "{} takes longer and was read where the other ended, before its learning rate had come down: its loss is overstated",
            cut.words()
        ));
    }
    if c.equality == Equality::Time {
        notes.push("time is that of the median step on this machine".into());
    }
    Verdict { finding, label: capital(&label), sentence, notes }
}

/// A ratio with its interval.
fn ratio_words(i: &Interval) -> String {
    format!("{} ({} to {})", part(i.estimate), part(i.low), part(i.high))
}

fn p_words(p: f64) -> String {
    if p < 0.001 { "below 0.001".into() } else { format!("{p:.3}") }
}

/// A ratio: two digits behind the point, or two significant ones; more where it would look like 1, which it is not.
fn part(value: f64) -> String {
    let text = |digits: usize| format!("{value:.digits$}");
    match value {
        v if v >= 100.0 => text(0),
        v if v < 0.1 => text(3),
        1.0 => text(2),
        _ => (2..6).map(text).find(|text| text.trim_end_matches('0') != "1.").unwrap_or_else(|| text(6)),
    }
}

/// With its sign, in as many digits as an interval of `width` deserves.
fn signed(value: f64, width: f64) -> String {
    let digits: usize = match width.abs() {
        w if w >= 0.1 => 2,
        w if w >= 0.01 => 3,
        _ => 4,
    };
    let is_zero = |text: &str| !text.bytes().any(|b| (b'1'..=b'9').contains(&b));
    // What is not 0 does not look like it: an end beside 0 decides.
    let text = |digits: usize| format!("{value:+.digits$}");
    let found = (digits..9).map(text).find(|text| !is_zero(text));
    // Neither -0.00 nor +0.00.
    found.unwrap_or_else(|| text(digits)[1..].to_owned())
}

fn capital(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |c| c.to_uppercase().chain(chars).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::analysis::tests::compared;

    fn said(ends: &[(f64, f64)], seconds: (f64, f64), equality: Equality) -> Verdict {
        verdict(&compared(ends, seconds, equality), 3, 0.05)
    }

    #[test]
    fn a_win_is_told_in_time() {
        let v = said(&[(1.0, 2.0), (1.1, 2.1), (0.9, 1.95)], (9.0, 10.0), Equality::Flops);
        assert_eq!((v.finding, v.label.as_str()), (Finding::Better, "MoE pays"));
        let begins = "on this data MoE reaches dense's final loss in 0.59 of its time, 95 % interval 0.58 to 0.61 (3 seeds)";
        assert!(v.sentence.starts_with(begins), "{}", v.sentence);
        assert!(v.notes.iter().any(|n| n.contains("3 intervals hold together")), "{:?}", v.notes);
    }

    #[test]
    fn a_difference_within_its_interval_is_no_gain() {
        let v = said(&[(2.0, 1.9), (2.1, 2.3), (2.2, 2.1)], (10.0, 10.0), Equality::Active);
        assert_eq!((v.finding, v.label.as_str()), (Finding::NoGain, "No gain shown"));
        assert!(v.sentence.starts_with("no gain shown at equal active parameters and tokens: MoE minus dense is 0.00 bits per byte, 95 % interval -0.4"), "{}", v.sentence);
        // A lower mean is no gain either where the interval holds 0.
        let v = said(&[(1.9, 2.0), (2.1, 2.0), (1.8, 2.1)], (10.0, 10.0), Equality::Flops);
        assert_eq!(v.finding, Finding::NoGain);
        assert!(v.notes.iter().any(|n| n.contains("2 of 3 seeds")), "{:?}", v.notes);
    }

    #[test]
    fn a_loss_is_told_as_one() {
        let v = said(&[(2.5, 2.0), (2.6, 2.1), (2.4, 1.9)], (10.0, 10.0), Equality::Flops);
        assert_eq!((v.finding, v.label.as_str()), (Finding::Worse, "MoE is worse"));
        assert!(
            v.sentence.contains("MoE is worse than dense at equal training FLOPs: MoE minus dense is +0.50"),
            "{}",
            v.sentence
        );
        assert!(v.notes.iter().any(|n| n.contains("in 0 of 3 seeds") && n.contains("not claimed")));
    }

    #[test]
    fn who_was_read_before_its_end_is_not_called_worse() {
        let v = said(&[(1.9, 2.0), (1.91, 2.0), (1.9, 2.01)], (20.0, 10.0), Equality::Time);
        assert_eq!((v.finding, v.label.as_str()), (Finding::Unknown, "Not known"));
        assert!(v.sentence.contains("MoE was read before"), "{}", v.sentence);
        // In the other direction it is safe.
        let v = said(&[(1.0, 2.9), (1.01, 2.9), (1.0, 2.91)], (11.0, 10.0), Equality::Time);
        assert_eq!(v.finding, Finding::Better);
        assert!(v.notes.iter().any(|n| n.contains("overstated")));
    }

    #[test]
    fn one_seed_claims_nothing() {
        let v = said(&[(1.0, 2.0)], (10.0, 10.0), Equality::Flops);
        assert_eq!(v.finding, Finding::Unknown);
        assert!(
            v.sentence.contains("nothing can be claimed") && v.sentence.contains("-1.00"),
            "{}",
            v.sentence
        );
    }

    #[test]
    fn what_cannot_be_compared_is_not_judged() {
        let mut c = compared(&[(1.0, 2.0), (1.1, 2.1), (0.9, 1.95)], (9.0, 10.0), Equality::Flops);
        c.unclaimed = Some("MoE looks at later tokens".into());
        let v = verdict(&c, 1, 0.05);
        assert_eq!(v.finding, Finding::Unknown);
        assert!(
            v.sentence.starts_with("no claim") && v.sentence.ends_with("MoE looks at later tokens"),
            "{}",
            v.sentence
        );
        (c.unclaimed, c.rates) = (None, (0.003, 0.003));
        assert!(verdict(&c, 1, 0.05).sentence.contains("both at learning rate 0.003"));
    }

    #[test]
    fn a_rising_loss_is_called_overfitting() {
        let mut c = compared(&[(1.0, 2.0), (1.1, 2.1)], (10.0, 10.0), Equality::Flops);
        c.risen = vec![c.other.clone()];
        assert!(verdict(&c, 1, 0.05).notes.iter().any(|n| n.contains("dense overfits")));
    }

    #[test]
    fn numbers_are_as_long_as_they_deserve() {
        assert_eq!(signed(0.1234, 0.2), "+0.12");
        assert_eq!(signed(-0.0234, 0.02), "-0.023");
        assert_eq!((signed(-0.0001, 0.5), signed(0.0, 0.5)), ("-0.0001".into(), "0.00".into()));
        assert_eq!((part(0.614), part(0.0123), part(250.4)), ("0.61".into(), "0.012".into(), "250".into()));
        assert_eq!((part(0.997), part(1.0), part(1.002)), ("0.997".into(), "1.00".into(), "1.002".into()));
    }
}
