//! The folder of a run: who may write into it, and its checkpoints.
