//! What a user says of a router, its balancing and its experts: the `[router]` and `[balance]` tables, and what of `[experts]` is
//! beyond plain ones.

mod balance;
mod experts;
mod router;

pub use balance::{AuxCounts, BalanceConfig, Convention, DenseGradient, Scope};
pub use experts::Extras;
pub use router::{Drop, GroupMask, HashScore, Noise, RandomEval, RouterConfig, Second};
