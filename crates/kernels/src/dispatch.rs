//! Dispatch: the picks of all tokens grouped by expert, by one stable counting sort.

/// The id of a slot in which nothing was picked, or whose pick was dropped.
pub const EMPTY: u32 = u32::MAX;

/// Which rows of an expert's input come from which token. A row is one (token, slot) pair that has an expert; the rows
/// of expert e are `offsets[e]..offsets[e + 1]`, in the order of tokens, then slots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dispatch {
    /// T.
    pub tokens: usize,
    /// K, slots of a token.
    pub slots: usize,
    /// First row of each expert, and the number of rows N: \[E + 1\].
    pub offsets: Vec<u32>,
    /// The token of each row: \[N\].
    pub token_of_row: Vec<u32>,
    /// The slot `token * K + k` of each row: \[N\].
    pub slot_of_row: Vec<u32>,
    /// The row of each slot, or [`EMPTY`]: \[T, K\].
    pub row_of_slot: Vec<u32>,
    identity: bool,
}

impl Dispatch {
    /// Groups the picks `experts` \[T, K\], ids below `count` or [`EMPTY`]. `None` when an id is out of range, or `experts` is not T·K long.
    pub fn new(experts: &[u32], slots: usize, count: usize) -> Option<Self> {
        let _span = crate::profile::span("grouping by expert");
        if slots == 0 || !experts.len().is_multiple_of(slots) || experts.len() >= EMPTY as usize {
            return None;
        }
        let mut offsets = vec![0u32; count + 1];
        for &expert in experts.iter().filter(|&&expert| expert != EMPTY) {
            *offsets.get_mut(expert as usize + 1)? += 1;
        }
        for e in 0..count {
            offsets[e + 1] += offsets[e];
        }
        let rows = offsets[count] as usize;
        let mut next = offsets.clone();
        let (mut token_of_row, mut slot_of_row) = (vec![0; rows], vec![0; rows]);
        let mut row_of_slot = vec![EMPTY; experts.len()];
        for (slot, &expert) in experts.iter().enumerate() {
            if expert != EMPTY {
                let row = next[expert as usize];
                next[expert as usize] += 1;
                token_of_row[row as usize] = (slot / slots) as u32;
                slot_of_row[row as usize] = slot as u32;
                row_of_slot[slot] = row;
            }
        }
        let tokens = experts.len() / slots;
        Some(Self { tokens, slots, offsets, token_of_row, slot_of_row, row_of_slot, identity: false })
    }

    /// One expert that takes every token: what makes a dense MLP of an expert's.
    pub fn whole(tokens: usize) -> Self {
        let all: Vec<u32> = (0..tokens as u32).collect();
        Self {
            tokens,
            slots: 1,
            offsets: vec![0, tokens as u32],
            token_of_row: all.clone(),
            slot_of_row: all.clone(),
            row_of_slot: all,
            identity: true,
        }
    }

    /// E.
    pub fn experts(&self) -> usize {
        self.offsets.len() - 1
    }

    /// N, the slots that have an expert.
    pub fn rows(&self) -> usize {
        self.token_of_row.len()
    }

    /// Row r is token r, and there is one slot: nothing needs gathering or combining.
    pub fn is_identity(&self) -> bool {
        self.identity
    }

    /// The rows of one expert.
    pub fn rows_of(&self, expert: usize) -> std::ops::Range<usize> {
        self.offsets[expert] as usize..self.offsets[expert + 1] as usize
    }

    /// Experts that have rows, in order.
    pub fn touched(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.experts()).filter(|&e| !self.rows_of(e).is_empty())
    }

    /// Rows of each expert: \[E\].
    pub fn load(&self) -> Vec<u32> {
        self.offsets.windows(2).map(|pair| pair[1] - pair[0]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn rows_are_the_picks_in_order(picks in prop::collection::vec(0u32..7, 0..60), slots in 1usize..4) {
            let picks: Vec<u32> = picks[..picks.len() - picks.len() % slots]
                .iter().map(|&p| if p == 6 { EMPTY } else { p }).collect();
            let d = Dispatch::new(&picks, slots, 6).unwrap();
            // The plainest way: walk the experts, then the slots.
            let mut rows = Vec::new();
            for e in 0..6u32 {
                prop_assert_eq!(d.rows_of(e as usize).start, rows.len());
                rows.extend((0..picks.len()).filter(|&s| picks[s] == e).map(|s| s as u32));
            }
            prop_assert_eq!(&d.slot_of_row, &rows);
            prop_assert_eq!(d.rows(), rows.len());
            for (row, &slot) in rows.iter().enumerate() {
                prop_assert_eq!(d.token_of_row[row], slot / slots as u32);
                prop_assert_eq!(d.row_of_slot[slot as usize], row as u32);
            }
            let empty = d.row_of_slot.iter().filter(|&&r| r == EMPTY).count();
            prop_assert_eq!(empty + d.rows(), picks.len());
            prop_assert_eq!(d.load().iter().sum::<u32>() as usize, d.rows());
        }
    }

    #[test]
    fn bad_picks_are_refused() {
        assert!(Dispatch::new(&[0, 3], 1, 3).is_none());
        assert!(Dispatch::new(&[0, 1, 2], 2, 3).is_none());
        assert!(Dispatch::new(&[], 0, 3).is_none());
    }
}
