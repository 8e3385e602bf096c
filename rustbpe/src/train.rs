//! From counted chunks to merges.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use rustc_hash::FxHashMap;

use crate::BpeError;

/// Two adjacent token ids.
pub type Pair = (u32, u32);

/// Ids 0..256 are the bytes themselves; merges follow.
pub const NUM_BYTES: u32 = 256;

/// Learn merges, most frequent pair first; of equals the smaller (left id, right id), so that no run depends
/// on hash order. The merge at index i makes the token 256 + i. Stops early when no pair is left.
///
/// `on_merge(done, planned)` runs after each merge and may stop the training by an error.
///
/// Errors: `VocabTooSmall` below 256, `TooManyChunks`, and those of `on_merge`.
pub fn train<'c>(
    chunks: impl IntoIterator<Item = (&'c [u8], u64)>,
    vocab_size: u32,
    mut on_merge: impl FnMut(usize, usize) -> Result<(), BpeError>,
) -> Result<Vec<Pair>, BpeError> {
    let planned = vocab_size.checked_sub(NUM_BYTES).ok_or(BpeError::VocabTooSmall { vocab_size })?;
    let mut words = Words::new(chunks)?;
    let (mut counts, mut queue) = words.initial_pairs();
    let mut merges = Vec::new();
    while merges.len() < planned as usize {
        let Some(candidate) = queue.pop() else { break };
        let live = counts.get(&candidate.pair).copied().unwrap_or(0);
        if live == 0 {
            continue;
        }
        if candidate.count != live {
            // Counts in the queue go stale as other merges eat a pair; they are refreshed only when they matter.
            queue.push(Candidate { count: live, ..candidate });
            continue;
        }
        let new_id = NUM_BYTES + merges.len() as u32;
        let created = words.merge(&candidate, new_id, &mut counts);
        counts.remove(&candidate.pair);
        for (pair, Seen { count, words }) in created {
            if count > 0 {
                counts.insert(pair, count);
                queue.push(Candidate { count, pair, words });
            }
        }
        merges.push(candidate.pair);
        on_merge(merges.len(), planned as usize)?;
    }
    Ok(merges)
}

/// A pair that may be merged next.
struct Candidate {
    count: u64,
    pair: Pair,
    /// The words that hold the pair, or held it once. The list is complete when the pair enters the queue: all
    /// occurrences of a pair come into existence in the one step that creates its larger id.
    words: Vec<u32>,
}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.count, Reverse(self.pair)).cmp(&(other.count, Reverse(other.pair)))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Candidate {}

/// A pair's weighted count, and the words it was seen in (ascending, each once).
#[derive(Default)]
struct Seen {
    count: u64,
    words: Vec<u32>,
}

impl Seen {
    fn add(&mut self, word: u32, weight: u64) {
        self.count += weight;
        if self.words.last() != Some(&word) {
            self.words.push(word);
        }
    }
}

/// All distinct chunks end to end in one arena: a merge only ever shortens a word, in place.
struct Words {
    ids: Vec<u32>,
    /// (start in `ids`, length now, count)
    spans: Vec<(usize, usize, u64)>,
}

impl Words {
    fn new<'c>(chunks: impl IntoIterator<Item = (&'c [u8], u64)>) -> Result<Self, BpeError> {
        let (mut ids, mut spans) = (Vec::new(), Vec::new());
        for (bytes, count) in chunks {
            if bytes.len() >= 2 && count > 0 {
                spans.push((ids.len(), bytes.len(), count));
                ids.extend(bytes.iter().map(|&b| u32::from(b)));
            }
        }
        match u32::try_from(spans.len()) {
            Ok(_) => Ok(Self { ids, spans }),
            Err(_) => Err(BpeError::TooManyChunks),
        }
    }

    fn initial_pairs(&self) -> (FxHashMap<Pair, u64>, BinaryHeap<Candidate>) {
        let mut seen: FxHashMap<Pair, Seen> = FxHashMap::default();
        for (index, &(start, len, weight)) in self.spans.iter().enumerate() {
            for pair in self.ids[start..start + len].windows(2) {
                seen.entry((pair[0], pair[1])).or_default().add(index as u32, weight);
            }
        }
        let counts = seen.iter().map(|(&pair, seen)| (pair, seen.count)).collect();
        let candidates =
            seen.into_iter().map(|(pair, Seen { count, words })| Candidate { count, pair, words });
        (counts, candidates.collect())
    }

    /// Replace the pair by `new_id` wherever it stands, left to right. Lowers `counts` of the neighbouring pairs
    /// that vanish, and returns the pairs that contain `new_id`.
    fn merge(
        &mut self,
        candidate: &Candidate,
        new_id: u32,
        counts: &mut FxHashMap<Pair, u64>,
    ) -> FxHashMap<Pair, Seen> {
        let (left, right) = candidate.pair;
        let mut created: FxHashMap<Pair, Seen> = FxHashMap::default();
        for &index in &candidate.words {
            let (start, len, weight) = self.spans[index as usize];
            let ids = &mut self.ids[start..start + len];
            let mut lose = |pair: Pair, created: &mut FxHashMap<Pair, Seen>| {
                let count = if pair.0 == new_id {
                    created.get_mut(&pair).map(|seen| &mut seen.count)
                } else {
                    counts.get_mut(&pair)
                };
                if let Some(count) = count {
                    *count -= weight;
                }
            };
            // `read` runs ahead of `write`; ids[..write] is the merged word so far.
            let (mut read, mut write) = (0, 0);
            while read < len {
                if read + 1 == len || (ids[read], ids[read + 1]) != (left, right) {
                    ids[write] = ids[read];
                    (read, write) = (read + 1, write + 1);
                    continue;
                }
                if write > 0 {
                    lose((ids[write - 1], left), &mut created);
                    created.entry((ids[write - 1], new_id)).or_default().add(index, weight);
                }
                if read + 2 < len {
                    lose((right, ids[read + 2]), &mut created);
                    created.entry((new_id, ids[read + 2])).or_default().add(index, weight);
                }
                ids[write] = new_id;
                (read, write) = (read + 2, write + 1);
            }
            self.spans[index as usize].1 = write;
        }
        created
    }
}
