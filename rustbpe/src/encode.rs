//! Applying merges.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use rustc_hash::FxHashMap;

use crate::{BpeError, Pair, NUM_BYTES};

/// A trained vocabulary: bytes, then merges in the order they were learned.
#[derive(Debug, Clone)]
pub struct Vocab {
    ids: FxHashMap<Pair, u32>,
    tokens: Vec<Vec<u8>>,
}

impl Default for Vocab {
    fn default() -> Self {
        Self { ids: FxHashMap::default(), tokens: (0..=u8::MAX).map(|byte| vec![byte]).collect() }
    }
}

impl Vocab {
    /// Errors: `UnknownToken` when a merge names an id that does not exist yet.
    pub fn new(merges: &[Pair]) -> Result<Self, BpeError> {
        let mut vocab = Self::default();
        for (&(left, right), id) in merges.iter().zip(NUM_BYTES..) {
            let token = [vocab.token(left)?, vocab.token(right)?].concat();
            vocab.tokens.push(token);
            vocab.ids.insert((left, right), id);
        }
        Ok(vocab)
    }

    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// The bytes of every token in id order. No two are equal: a byte string has one history of merges.
    pub fn tokens(&self) -> &[Vec<u8>] {
        &self.tokens
    }

    /// The bytes of one token. Errors: `UnknownToken`.
    pub fn token(&self, id: u32) -> Result<&[u8], BpeError> {
        match self.tokens.get(id as usize) {
            Some(token) => Ok(token),
            None => Err(BpeError::UnknownToken { id, vocab_size: self.len() }),
        }
    }

    /// Append the ids of one chunk: merge the present pair with the lowest merged id, leftmost first, until none
    /// is left. The queue makes that n log n, so that a chunk of a million letters does no harm.
    pub fn encode_chunk(&self, chunk: &[u8], out: &mut Vec<u32>) {
        const NONE: usize = usize::MAX;
        let mut ids: Vec<u32> = chunk.iter().map(|&b| u32::from(b)).collect();
        let mut next: Vec<usize> = (1..=ids.len()).collect(); // ids.len() = the end
        let mut previous: Vec<usize> = (0..ids.len()).map(|i| i.checked_sub(1).unwrap_or(NONE)).collect();
        let mut queue: BinaryHeap<Reverse<(u32, usize, Pair)>> = BinaryHeap::new();
        let offer = |queue: &mut BinaryHeap<_>, at: usize, pair: Pair| {
            if let Some(&id) = self.ids.get(&pair) {
                queue.push(Reverse((id, at, pair)));
            }
        };
        for (at, pair) in ids.windows(2).enumerate() {
            offer(&mut queue, at, (pair[0], pair[1]));
        }
        while let Some(Reverse((id, at, (left, right)))) = queue.pop() {
            let gone = next[at];
            // An entry is stale when either side was merged since; a swallowed position points to NONE.
            if gone == NONE || gone == ids.len() || ids[at] != left || ids[gone] != right {
                continue;
            }
            ids[at] = id;
            let after = next[gone];
            next[at] = after;
            next[gone] = NONE;
            if after < ids.len() {
                previous[after] = at;
                offer(&mut queue, at, (id, ids[after]));
            }
            if previous[at] != NONE {
                offer(&mut queue, previous[at], (ids[previous[at]], id));
            }
        }
        let mut at = 0;
        while at < ids.len() {
            out.push(ids[at]);
            at = next[at];
        }
    }

    /// The bytes that `ids` stand for. Errors: `UnknownToken`.
    pub fn decode(&self, ids: &[u32]) -> Result<Vec<u8>, BpeError> {
        let mut bytes = Vec::new();
        for &id in ids {
            bytes.extend_from_slice(self.token(id)?);
        }
        Ok(bytes)
    }
}
