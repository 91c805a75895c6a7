//! The non-linearities of expert MLPs.

/// A non-linearity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
pub enum Activation {
    /// x · σ(x).
    Silu,
    /// x · Φ(x), by erf.
    Gelu,
    /// max(x, 0).
    Relu,
    /// max(x, 0)².
    Relu2,
}
