//! Scalar twins of the kernels: the plainest loops that say what each computes, for tests to hold them to. Kernels
//! whose twin is a few lines have it beside their tests.

pub mod attention;
pub mod norm;
pub mod rotary;
