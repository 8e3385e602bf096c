use std::fmt;

/// What a caller can get wrong, or stop.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BpeError {
    VocabTooSmall { vocab_size: u32 },
    BadPattern { pattern: String, reason: String },
    Split { reason: String },
    UnknownToken { id: u32, vocab_size: usize },
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
                write!(f, "token id {id} is not in the vocabulary (ids 0 to {})", vocab_size - 1)
            }
            Self::TooManyChunks => write!(f, "more than 2^32 distinct chunks; train on less text"),
            Self::Interrupted => write!(f, "interrupted"),
        }
    }
}

impl std::error::Error for BpeError {}
