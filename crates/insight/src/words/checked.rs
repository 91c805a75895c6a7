//! Labels after their check.

use super::ablation::{Ablation, Confirmation, FEWEST_TEXTS, Verdict, student};
use super::{ExpertWords, LabelKind};
use serde::{Deserialize, Serialize};

/// What switching an expert off did, and what became of its label.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Checked {
    /// What it did.
    pub ablation: Ablation,
    /// The other expert of the layer that it is held against.
    pub control: u16,
    /// Whether the label stands.
    pub confirmation: Confirmation,
}

/// A rise of the loss, in nats per token, that nobody would mind.
pub const MARGIN: f64 = 0.01;

/// What an expert is to the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// Without it the loss rises, beyond what chance would do.
    Matters,
    /// Without it the loss rises by less than [`MARGIN`], beyond what chance would hide.
    Redundant,
    /// Without it the loss falls, beyond what chance would do.
    Harms,
    /// There is too little text to tell.
    Unknown,
}

impl Checked {
    /// What the expert is to the model, by the change of the loss over all tokens: at 1 % on one side, over documents as units, of which there
    /// must be three.
    pub fn standing(&self) -> Standing {
        let Some(all) = self.ablation.all.filter(|all| all.texts >= FEWEST_TEXTS) else {
            return Standing::Unknown;
        };
        let Some(error) = all.standard_error else { return Standing::Unknown };
        let reach = student(all.texts - 1) * error;
        match all.mean {
            mean if mean > reach => Standing::Matters,
            mean if mean < -reach => Standing::Harms,
            mean if mean + reach < MARGIN => Standing::Redundant,
            _ => Standing::Unknown,
        }
    }

    /// The label was given and stands.
    pub fn stands(&self) -> bool {
        self.confirmation.verdict == Verdict::Confirmed
    }
}

/// How many labels there are, and how many of them stand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// Experts.
    pub experts: usize,
    /// Those with a label.
    pub labelled: usize,
    /// Those whose label stands.
    pub confirmed: usize,
    /// Those labelled with a domain.
    pub domains: usize,
    /// Those of them whose label stands.
    pub domains_confirmed: usize,
}

impl Tally {
    /// Counts experts, each with its check if there was one.
    pub fn of<'a>(experts: impl Iterator<Item = (&'a ExpertWords, Option<&'a Checked>)>) -> Self {
        let mut tally = Self::default();
        for (words, checked) in experts {
            let stands = checked.is_some_and(Checked::stands);
            tally.experts += 1;
            tally.labelled += usize::from(words.label.kind != LabelKind::None);
            tally.confirmed += usize::from(stands);
            tally.domains += usize::from(words.label.kind == LabelKind::Domain);
            tally.domains_confirmed += usize::from(stands && words.label.kind == LabelKind::Domain);
        }
        tally
    }
}

#[cfg(test)]
mod tests {
    use super::super::ablation::Delta;
    use super::*;

    #[test]
    fn what_an_expert_is_to_the_model_goes_by_the_error() {
        let of_texts = |mean: f64, standard_error: Option<f64>, texts: u64| {
            let all = Some(Delta { mean, standard_error, count: 10, texts });
            Checked { ablation: Ablation { all, ..Ablation::default() }, ..Checked::default() }.standing()
        };
        // t at 1 % with four degrees of freedom is 3.75.
        let of = |mean, error| of_texts(mean, error, 5);
        assert_eq!(of(0.5, Some(0.1)), Standing::Matters);
        assert_eq!(of(-0.5, Some(0.1)), Standing::Harms);
        // Too uncertain to be called redundant, and certain enough.
        assert_eq!(of(0.1, Some(0.1)), Standing::Unknown);
        assert_eq!(of(0.3, Some(0.1)), Standing::Unknown);
        assert_eq!(of(0.002, Some(0.001)), Standing::Redundant);
        assert_eq!(of_texts(0.5, Some(0.001), 2), Standing::Unknown);
        assert_eq!(of(0.5, None), Standing::Unknown);
        assert_eq!(Checked::default().standing(), Standing::Unknown);
    }
}
