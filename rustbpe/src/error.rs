use std::fmt;

use crate::Pair;

/// What a caller can get wrong, or stop.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BpeError {
    VocabTooSmall { vocab_size: u32 },
    BadPattern { pattern: String, reason: String },
    Split { reason: String },
    UnknownToken { id: u32, vocab_size: usize },
    BadBytes,
    BadMerge { id: u32, pair: Pair },
    BadToken { id: u32, token: Vec<u8> },
    TooManyChunks,
    Interrupted,
}

impl fmt::Display for BpeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::VocabTooSmall { vocab_size } => {
                write!(f, "vocab_size {vocab_size} is below the 256 byte tokens; use 256 or more")
            }
            Self::BadPattern { pattern, reason } => {
                write!(f, "the split pattern {pattern:?} is no regular expression: {reason}")
            }
            Self::Split { reason } => {
                write!(f, "a text cannot be split ({reason}); crop texts to fewer characters")
            }
            Self::UnknownToken { id, vocab_size } => {
                write!(
                    f,
                    "token id {id} is not in the vocabulary (ids 0 to {})",
                    vocab_size.saturating_sub(1)
                )
            }
            Self::BadBytes => write!(f, "the first 256 tokens must be the 256 single bytes, each once"),
            Self::BadMerge { id, pair: (left, right) } => {
                write!(f, "token {id} cannot be the merge of {left} and {right}: it needs two lower ids that no other token equals joined")
            }
            Self::BadToken { id, token } => {
                write!(f, "token {id} ({:?}) is not what two tokens before it make; this is no byte-pair vocabulary", String::from_utf8_lossy(token))
            }
            Self::TooManyChunks => write!(f, "more than 2^32 distinct chunks; train on less text"),
            Self::Interrupted => write!(f, "interrupted"),
        }
    }
}

impl std::error::Error for BpeError {}
