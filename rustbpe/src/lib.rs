//! Byte-level BPE: exact, parallel training and linear-time encoding.
//!
//! `split` cuts a text into chunks (`scan` does it for patterns like GPT-4's), `count` counts them, `train` learns
//! merges from the counts, `vocab` holds them and encodes a chunk, `encode` whole texts. None of these knows
//! Python; `python` (feature `python`) is the thin face that the extension shows.

mod count;
mod encode;
mod error;
#[cfg(feature = "python")]
mod python;
mod scan;
mod short;
mod split;
mod train;
mod vocab;

pub use count::{Batch, ChunkCounts, Counter};
pub use encode::{encode_all, Encoder};
pub use error::BpeError;
pub use scan::DEFAULT_PATTERN;
pub use split::Splitter;
pub use train::{train, Pair, NUM_BYTES};
pub use vocab::{Scratch, Vocab};
