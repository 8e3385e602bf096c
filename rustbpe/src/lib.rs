//! Byte-level BPE: exact, parallel training and plain encoding.
//!
//! `count` splits texts into chunks and counts them, `train` learns merges from the counts, `encode` applies
//! them. None of these knows Python; `python` (feature `python`) is the thin face that the extension shows.

mod count;
mod encode;
mod error;
#[cfg(feature = "python")]
mod python;
mod train;

pub use count::{ChunkCounts, Splitter, DEFAULT_PATTERN};
pub use encode::Vocab;
pub use error::BpeError;
pub use train::{train, Pair, NUM_BYTES};
