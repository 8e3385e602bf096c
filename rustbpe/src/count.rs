//! From texts to counted chunks.

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

/// What surrounds the digit group's quantifier in GPT-4-like patterns.
const GPT4_HEAD: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}";
const GPT4_TAIL: &str = r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";

/// Cuts a text into chunks; no merge ever crosses a chunk's border.
#[derive(Debug, Clone)]
pub struct Splitter {
    pattern: String,
    engine: Engine,
}

#[derive(Debug, Clone)]
enum Engine {
    /// Any pattern, by backtracking.
    Backtracking(fancy_regex::Regex),
    /// GPT-4-like patterns by a finite automaton, two to three times as fast and without a limit on white space.
    /// See `linear_form`.
    Linear(regex::Regex),
}

impl Splitter {
    /// Errors: `BadPattern`.
    pub fn new(pattern: &str) -> Result<Self, BpeError> {
        let bad = |reason: String| BpeError::BadPattern { pattern: pattern.to_owned(), reason };
        let engine = match linear_form(pattern) {
            Some(linear) => Engine::Linear(regex::Regex::new(&linear).map_err(|e| bad(e.to_string()))?),
            None => Engine::Backtracking(fancy_regex::Regex::new(pattern).map_err(|e| bad(e.to_string()))?),
        };
        Ok(Self { pattern: pattern.to_owned(), engine })
    }

    pub fn pattern(&self) -> &str {
        &self.pattern
    }

    /// Give every chunk of `text` to `visit`, left to right. Errors: `Split` when backtracking gives up.
    pub fn split<'t>(&self, text: &'t str, mut visit: impl FnMut(&'t str)) -> Result<(), BpeError> {
        match &self.engine {
            Engine::Backtracking(regex) => {
                for found in regex.find_iter(text) {
                    let chunk = found.map_err(|e| BpeError::Split { reason: e.to_string() })?;
                    visit(chunk.as_str());
                }
            }
            Engine::Linear(regex) => {
                let mut start = 0;
                while let Some(found) = regex.find_at(text, start) {
                    let chunk = without_last_space(found.as_str(), found.end() == text.len());
                    visit(chunk);
                    start = found.start() + chunk.len();
                }
            }
        }
        Ok(())
    }
}

/// A GPT-4-like pattern without what needs backtracking; None for any other pattern.
///
/// The possessive quantifiers go: what follows them can match nothing that they gave back. `\s+(?!\S)` goes too:
/// it only keeps the last of several spaces for the word after them, which `without_last_space` does.
fn linear_form(pattern: &str) -> Option<String> {
    let digits = pattern.strip_prefix(GPT4_HEAD)?.strip_suffix(GPT4_TAIL)?;
    let is_quantifier = digits.starts_with("{1,") && digits.ends_with('}') && digits.len() <= 5;
    let linear = |part: &str| part.replace("?+", "?").replace("++", "+").replace(r"|\s+(?!\S)", "");
    is_quantifier.then(|| linear(GPT4_HEAD) + digits + &linear(GPT4_TAIL))
}

/// A run of several spaces before a word leaves its last one to the word. Only the last alternative, `\s+`, ends
/// in white space other than a line break.
fn without_last_space(chunk: &str, is_last: bool) -> &str {
    match chunk.char_indices().next_back() {
        Some((at, c)) if at > 0 && !is_last && c.is_whitespace() && c != '\r' && c != '\n' => &chunk[..at],
        _ => chunk,
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
                splitter.split(text, |chunk| *counts.entry(chunk).or_default() += 1)?;
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
