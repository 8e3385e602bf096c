//! From counted chunks to merges.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;

use rustc_hash::FxHashMap;

use crate::{BpeError, ChunkCounts};

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
pub fn train(
    chunks: &ChunkCounts,
    vocab_size: u32,
    mut on_merge: impl FnMut(usize, usize) -> Result<(), BpeError>,
) -> Result<Vec<Pair>, BpeError> {
    let planned = vocab_size.checked_sub(NUM_BYTES).ok_or(BpeError::VocabTooSmall { vocab_size })?;
    let mut words = Words::new(chunks)?;
    let mut pairs = words.byte_pairs();
    let (mut before, mut after) = (Neighbours::default(), Neighbours::default());
    let mut merges = Vec::new();
    while merges.len() < planned as usize {
        let Some(candidate) = pairs.pop() else { break };
        let (left, right) = candidate.pair;
        let new_id = NUM_BYTES + merges.len() as u32;
        words.merge(candidate.pair, &pairs.places[candidate.words], new_id, &mut before, &mut after);
        for lost in &before.met {
            pairs.lose((lost.id, left), lost.lost);
        }
        for lost in &after.met {
            pairs.lose((right, lost.id), lost.lost);
        }
        pairs.counts.remove(&candidate.pair);
        before.drain(&mut pairs, |id| (id, new_id));
        after.drain(&mut pairs, |id| (new_id, id));
        merges.push(candidate.pair);
        on_merge(merges.len(), planned as usize)?;
    }
    Ok(merges)
}

/// A pair that may be merged next.
struct Candidate {
    count: u64,
    pair: Pair,
    /// In `Pairs::places`: the words that hold the pair, or held it once. The list is complete from the start: all
    /// occurrences of a pair come into existence in the one step that creates its larger id.
    words: Range<usize>,
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

/// All pairs that stand somewhere.
#[derive(Default)]
struct Pairs {
    counts: FxHashMap<Pair, u64>,
    queue: BinaryHeap<Candidate>,
    /// The words of all pairs, list after list.
    places: Vec<u32>,
}

impl Pairs {
    fn push(&mut self, pair: Pair, count: u64, words: Range<usize>) {
        self.counts.insert(pair, count);
        self.queue.push(Candidate { count, pair, words });
    }

    /// The most frequent pair. Counts in the queue go stale as other merges eat a pair; they are refreshed only
    /// when they matter.
    fn pop(&mut self) -> Option<Candidate> {
        loop {
            let candidate = self.queue.pop()?;
            match self.counts.get(&candidate.pair) {
                Some(&count) if count == candidate.count => return Some(candidate),
                Some(&count) => self.queue.push(Candidate { count, ..candidate }),
                None => (),
            }
        }
    }

    fn lose(&mut self, pair: Pair, lost: u64) {
        if let Some(count) = self.counts.get_mut(&pair) {
            *count -= lost;
            if *count == 0 {
                self.counts.remove(&pair);
            }
        }
    }
}

/// The tokens on one side of the pair that is being merged.
#[derive(Default)]
struct Neighbours {
    met: Vec<Neighbour>,
    /// By id: its place in `met` + 1; 0 = not met.
    places: Vec<u32>,
    /// (place in `met`, word), words ascending.
    words: Vec<(u32, u32)>,
}

struct Neighbour {
    id: u32,
    /// Weighted occurrences that the old pair loses, and that the new one has.
    lost: u64,
    made: u64,
    num_words: usize,
    last_word: u32,
}

impl Neighbours {
    fn add(&mut self, id: u32, word: u32, weight: u64, lost: u64) {
        if self.places.len() <= id as usize {
            self.places.resize(id as usize + 1, 0);
        }
        let place = &mut self.places[id as usize];
        if *place == 0 {
            self.met.push(Neighbour { id, lost: 0, made: 0, num_words: 0, last_word: 0 });
            *place = self.met.len() as u32;
        }
        let neighbour = &mut self.met[*place as usize - 1];
        neighbour.lost += lost;
        neighbour.made += weight;
        if neighbour.num_words == 0 || neighbour.last_word != word {
            neighbour.num_words += 1;
            neighbour.last_word = word;
            self.words.push((*place - 1, word));
        }
    }

    /// Take back an occurrence of the new pair with `id` that was added.
    fn undo(&mut self, id: u32, weight: u64) {
        if let Some(&place) = self.places.get(id as usize) {
            self.met[place as usize - 1].made -= weight;
        }
    }

    /// Add the new pairs, and forget all.
    fn drain(&mut self, pairs: &mut Pairs, pair: impl Fn(u32) -> Pair) {
        let mut starts = Vec::with_capacity(self.met.len());
        let mut end = pairs.places.len();
        for neighbour in &self.met {
            starts.push(end);
            end += neighbour.num_words;
        }
        pairs.places.resize(end, 0);
        let mut next = starts.clone();
        for &(place, word) in &self.words {
            pairs.places[next[place as usize]] = word;
            next[place as usize] += 1;
        }
        for (neighbour, start) in self.met.drain(..).zip(starts) {
            self.places[neighbour.id as usize] = 0;
            if neighbour.made > 0 {
                pairs.push(pair(neighbour.id), neighbour.made, start..start + neighbour.num_words);
            }
        }
        self.words.clear();
    }
}

/// All distinct chunks end to end in one arena: a merge only ever shortens a word, in place.
struct Words {
    ids: Vec<u32>,
    spans: Vec<Span>,
}

struct Span {
    start: usize,
    len: u32,
    weight: u64,
}

impl Words {
    fn new(chunks: &ChunkCounts) -> Result<Self, BpeError> {
        let (mut ids, mut spans) = (Vec::new(), Vec::new());
        chunks.for_each(|bytes, weight| {
            if bytes.len() >= 2 {
                spans.push(Span { start: ids.len(), len: bytes.len() as u32, weight });
                ids.extend(bytes.iter().map(|&b| u32::from(b)));
            }
        });
        match u32::try_from(spans.len()) {
            Ok(_) => Ok(Self { ids, spans }),
            Err(_) => Err(BpeError::TooManyChunks),
        }
    }

    /// Every pair of bytes, as neighbours that come after a byte.
    fn byte_pairs(&self) -> Pairs {
        let mut pairs = Pairs::default();
        let mut after: Vec<Neighbours> = (0..NUM_BYTES).map(|_| Neighbours::default()).collect();
        for (index, span) in self.spans.iter().enumerate() {
            for pair in self.ids[span.start..span.start + span.len as usize].windows(2) {
                after[pair[0] as usize].add(pair[1], index as u32, span.weight, 0);
            }
        }
        for (left, mut after) in (0..NUM_BYTES).zip(after) {
            after.drain(&mut pairs, |right| (left, right));
        }
        pairs
    }

    /// Replace the pair by `new_id` wherever it stands in `words`, left to right.
    fn merge(
        &mut self,
        (left, right): Pair,
        words: &[u32],
        new_id: u32,
        before: &mut Neighbours,
        after: &mut Neighbours,
    ) {
        for &word in words {
            let Span { start, len, weight } = self.spans[word as usize];
            let ids = &mut self.ids[start..start + len as usize];
            // `read` runs ahead of `write`; ids[..write] is the merged word so far.
            let (mut read, mut write) = (0, 0);
            while read < ids.len() {
                if read + 1 == ids.len() || (ids[read], ids[read + 1]) != (left, right) {
                    ids[write] = ids[read];
                    (read, write) = (read + 1, write + 1);
                    continue;
                }
                if write > 0 {
                    let id = ids[write - 1];
                    if id == new_id {
                        after.undo(left, weight); // what stood after the last occurrence was this one
                    }
                    before.add(id, word, weight, if id == new_id { 0 } else { weight });
                }
                if let Some(&id) = ids.get(read + 2) {
                    after.add(id, word, weight, weight);
                }
                ids[write] = new_id;
                (read, write) = (read + 2, write + 1);
            }
            self.spans[word as usize].len = write as u32;
        }
    }
}
