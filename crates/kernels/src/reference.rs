//! Scalar twins of the kernels: the plainest loops that say what each computes, for tests to hold them to.
