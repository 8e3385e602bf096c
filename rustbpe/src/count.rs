//! From texts to counted chunks.

use fancy_regex::Regex;
use rayon::prelude::*;
use rustc_hash::FxHashMap;

use crate::BpeError;

/// Used when no pattern is given: GPT-4's split, digits in groups of at most three.
pub const DEFAULT_PATTERN: &str = concat!(
    r"'(?i:[sdmt]|ll|ve|re)",
    r"|[^\r\n\p{L}\p{N}]?+\p{L}+",
    r"|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*",
    r"|\s*[\r\n]",
    r"|\s+(?!\S)",
    r"|\s+",
);

/// Cuts a text into chunks; no merge ever crosses a chunk's border.
#[derive(Debug, Clone)]
pub struct Splitter(Regex);

impl Splitter {
    /// Errors: `BadPattern`.
    pub fn new(pattern: &str) -> Result<Self, BpeError> {
        let bad = |e: fancy_regex::Error| BpeError::BadPattern {
            pattern: pattern.to_owned(),
            reason: e.to_string(),
        };
        Regex::new(pattern).map(Self).map_err(bad)
    }

    pub fn pattern(&self) -> &str {
        self.0.as_str()
    }

    /// The chunks of `text`, left to right. Errors: `Split` when the regex engine gives up, which the default
    /// pattern does on some million white-space characters in a row.
    pub fn split<'t>(&'t self, text: &'t str) -> impl Iterator<Item = Result<&'t str, BpeError>> + 't {
        self.0.find_iter(text).map(|found| match found {
            Ok(m) => Ok(m.as_str()),
            Err(e) => Err(BpeError::Split { reason: e.to_string() }),
        })
    }
}

/// How often each distinct chunk was seen. 64 bits: the chunk " the" passes 2^31 in a web-sized corpus.
#[derive(Debug, Default)]
pub struct ChunkCounts(FxHashMap<Box<str>, u64>);

impl ChunkCounts {
    /// Count the chunks of many texts on all cores. The result does not depend on how texts are batched.
    pub fn add(&mut self, splitter: &Splitter, texts: &[String]) -> Result<(), BpeError> {
        let counted = texts
            .par_iter()
            .try_fold(FxHashMap::default, |mut counts: FxHashMap<&str, u64>, text| {
                for chunk in splitter.split(text) {
                    *counts.entry(chunk?).or_default() += 1;
                }
                Ok(counts)
            })
            .try_reduce(FxHashMap::default, |a, b| Ok(merged(a, b)))?;
        for (chunk, count) in counted {
            match self.0.get_mut(chunk) {
                Some(total) => *total += count,
                None => {
                    self.0.insert(chunk.into(), count);
                }
            }
        }
        Ok(())
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// (bytes of the chunk, its count), in no particular order.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], u64)> {
        self.0.iter().map(|(chunk, &count)| (chunk.as_bytes(), count))
    }
}

/// The sum of two maps; the smaller one is poured into the larger.
fn merged<'t>(a: FxHashMap<&'t str, u64>, b: FxHashMap<&'t str, u64>) -> FxHashMap<&'t str, u64> {
    let (mut large, small) = if a.len() >= b.len() { (a, b) } else { (b, a) };
    for (chunk, count) in small {
        *large.entry(chunk).or_default() += count;
    }
    large
}
