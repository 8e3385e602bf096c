//! A vocabulary: the 256 bytes, then what merges make of them.

use std::sync::OnceLock;

use rustc_hash::{FxBuildHasher, FxHashMap};

use crate::short::Short;
use crate::{BpeError, Pair, NUM_BYTES};

/// No token, or no node.
const NONE: u32 = u32::MAX;
/// Bytes of a chunk up to which merging pair by pair is quicker, though it is quadratic.
const MAX_MERGED: usize = 40;
const BYTE_PAIRS: usize = 1 << 16;

/// Ids 0 to 255 are the bytes, in any order; the merge at index i makes id 256 + i of two lower ones.
#[derive(Debug, Clone)]
pub struct Vocab {
    /// The bytes of all tokens end to end, and where each token ends in them.
    text: Vec<u8>,
    ends: Vec<usize>,
    merges: Vec<Pair>,
    byte_ids: [u32; NUM_BYTES as usize],
    /// What a merge makes: of two bytes by (left << 8 | right), of others by the pair.
    by_bytes: Vec<u32>,
    by_pair: FxHashMap<Pair, u32>,
    short: FxHashMap<Short, u32>,
    long: FxHashMap<Box<[u8]>, u32>,
    /// Of all tokens; made for the first long chunk.
    trie: OnceLock<Trie>,
}

/// Memory for `Vocab::encode_chunk`.
#[derive(Debug, Default)]
pub struct Scratch {
    ids: Vec<u32>,
    merged: Vec<u32>,
    failed: Vec<bool>,
}

impl Vocab {
    /// Our own order: the byte b has id b. Errors: `BadMerge`.
    pub fn from_merges(merges: &[Pair]) -> Result<Self, BpeError> {
        let bytes: Vec<u8> = (0..=u8::MAX).collect();
        Self::new(&bytes, merges)
    }

    /// `bytes` are those of the ids 0 to 255. Errors: `BadBytes`, `BadMerge`.
    pub fn new(bytes: &[u8], merges: &[Pair]) -> Result<Self, BpeError> {
        let mut vocab = Self {
            text: Vec::new(),
            ends: Vec::new(),
            merges: Vec::new(),
            byte_ids: [NONE; NUM_BYTES as usize],
            by_bytes: vec![NONE; BYTE_PAIRS],
            by_pair: FxHashMap::with_capacity_and_hasher(merges.len(), FxBuildHasher),
            short: FxHashMap::with_capacity_and_hasher(merges.len() + bytes.len(), FxBuildHasher),
            long: FxHashMap::default(),
            trie: OnceLock::new(),
        };
        for (&byte, id) in bytes.iter().zip(0..) {
            vocab.byte_ids[byte as usize] = id;
            vocab.push(&[byte]);
        }
        if vocab.short.len() != NUM_BYTES as usize || bytes.len() != NUM_BYTES as usize {
            return Err(BpeError::BadBytes);
        }
        for &(left, right) in merges {
            vocab.merge(left, right)?;
        }
        Ok(vocab)
    }

    /// From the bytes of every token in id order, as tiktoken keeps them. Which two tokens each was made of is what
    /// the ones before it make of its bytes. Errors: `BadBytes`, `BadToken`.
    pub fn from_tokens<T: AsRef<[u8]>>(tokens: &[T]) -> Result<Self, BpeError> {
        let (bytes, merged) = tokens.split_at_checked(NUM_BYTES as usize).ok_or(BpeError::BadBytes)?;
        let bytes: Option<Vec<u8>> = bytes.iter().map(|token| single(token.as_ref())).collect();
        let mut vocab = Self::new(&bytes.ok_or(BpeError::BadBytes)?, &[])?;
        let mut scratch = Scratch::default();
        for token in merged {
            vocab.merge_plainly(token.as_ref(), &mut scratch);
            match scratch.ids[..] {
                [left, right] => vocab.merge(left, right)?,
                _ => {
                    return Err(BpeError::BadToken { id: vocab.len() as u32, token: token.as_ref().to_vec() })
                }
            }
        }
        Ok(vocab)
    }

    fn merge(&mut self, left: u32, right: u32) -> Result<(), BpeError> {
        let id = self.len() as u32;
        let token = match (self.token(left), self.token(right)) {
            (Ok(left), Ok(right)) => [left, right].concat(),
            _ => return Err(BpeError::BadMerge { id, pair: (left, right) }),
        };
        if self.id(&token).is_some() {
            return Err(BpeError::BadMerge { id, pair: (left, right) });
        }
        self.merges.push((left, right));
        match byte_pair(left, right) {
            Some(index) => self.by_bytes[index] = id,
            None => drop(self.by_pair.insert((left, right), id)),
        }
        self.push(&token);
        Ok(())
    }

    fn push(&mut self, token: &[u8]) {
        let id = self.len() as u32;
        match Short::new(token) {
            Some(short) => self.short.insert(short, id),
            None => self.long.insert(token.into(), id),
        };
        self.text.extend_from_slice(token);
        self.ends.push(self.text.len());
    }

    pub fn len(&self) -> usize {
        self.ends.len()
    }

    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The two ids that each id from 256 on was made of.
    pub fn merges(&self) -> &[Pair] {
        &self.merges
    }

    /// The bytes of every token in id order. No two are equal.
    pub fn tokens(&self) -> impl Iterator<Item = &[u8]> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, &end)| &self.text[start..end])
    }

    /// The bytes of one token. Errors: `UnknownToken`.
    pub fn token(&self, id: u32) -> Result<&[u8], BpeError> {
        match self.ends.get(id as usize) {
            Some(&end) => Ok(&self.text[self.start(id)..end]),
            None => Err(BpeError::UnknownToken { id, vocab_size: self.len() }),
        }
    }

    fn start(&self, id: u32) -> usize {
        match id {
            0 => 0,
            _ => self.ends[id as usize - 1],
        }
    }

    fn token_len(&self, id: u32) -> usize {
        self.ends[id as usize] - self.start(id)
    }

    /// The token with exactly these bytes.
    pub fn id(&self, token: &[u8]) -> Option<u32> {
        match Short::new(token) {
            Some(short) => self.short_id(short),
            None => self.long.get(token).copied(),
        }
    }

    #[inline]
    pub(crate) fn short_id(&self, token: Short) -> Option<u32> {
        self.short.get(&token).copied()
    }

    /// What the merge of a pair makes, or NONE.
    #[inline]
    fn merged(&self, left: u32, right: u32) -> u32 {
        match byte_pair(left, right) {
            Some(index) => self.by_bytes[index],
            None => self.by_pair.get(&(left, right)).copied().unwrap_or(NONE),
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

    /// Append the ids of one chunk: what is left when the present pair with the lowest merged id was merged,
    /// leftmost first, until there was none.
    pub fn encode_chunk(&self, chunk: &[u8], scratch: &mut Scratch, out: &mut Vec<u32>) {
        if let Some(id) = self.id(chunk) {
            out.push(id);
        } else if chunk.len() <= MAX_MERGED || !self.fit_neighbours(chunk, &mut scratch.failed, out) {
            self.merge_plainly(chunk, scratch);
            out.extend_from_slice(&scratch.ids);
        }
    }

    /// The ids of a chunk, in `scratch.ids`, by merging pair after pair.
    fn merge_plainly(&self, chunk: &[u8], Scratch { ids, merged, .. }: &mut Scratch) {
        ids.clear();
        ids.extend(chunk.iter().map(|&byte| self.byte_ids[byte as usize]));
        merged.clear(); // what each id makes with the next one
        merged.extend(ids.windows(2).map(|pair| self.merged(pair[0], pair[1])));
        while let Some((at, &id)) = merged.iter().enumerate().min_by_key(|&(_, &id)| id) {
            if id == NONE {
                return;
            }
            ids[at] = id;
            ids.remove(at + 1);
            merged.remove(at);
            if at > 0 {
                merged[at - 1] = self.merged(ids[at - 1], id);
            }
            if at < merged.len() {
                merged[at] = self.merged(id, ids[at + 1]);
            }
        }
    }

    /// The same in linear time, appended to `out`. False, and nothing appended, when no tokens fit, as can be only in
    /// a vocabulary that no training makes.
    ///
    /// Ids are a chunk's encoding if and only if each two neighbours are `can_be_neighbours`, and only one such
    /// sequence exists. So take the longest token, then a shorter one when it does not fit the one before it, and
    /// step back when none does. `failed` marks places from which nothing leads to the end, so that each is tried
    /// once. (Observation and proof: H. van Antwerpen, A. Neubeck, "So many tokens, so little time", GitHub blog,
    /// 2024.)
    fn fit_neighbours(&self, chunk: &[u8], failed: &mut Vec<bool>, out: &mut Vec<u32>) -> bool {
        let trie = self.trie.get_or_init(|| Trie::new(self.tokens()));
        failed.clear();
        failed.resize(chunk.len() + 1, false);
        let (first, mut at) = (out.len(), 0);
        let mut candidate = trie.longest(chunk);
        loop {
            if candidate == NONE {
                failed[at] = true;
                let Some(last) = (out.len() > first).then(|| out.pop()).flatten() else { return false };
                at -= self.token_len(last);
                candidate = trie.shorter(last);
                continue;
            }
            let end = at + self.token_len(candidate);
            let fits = !failed[end] && (at == 0 || self.can_be_neighbours(out[out.len() - 1], candidate));
            if !fits {
                candidate = trie.shorter(candidate);
                continue;
            }
            out.push(candidate);
            at = end;
            if at == chunk.len() {
                return true;
            }
            candidate = trie.longest(&chunk[at..]);
        }
    }

    /// Whether the bytes of both tokens, encoded together, give these two tokens.
    ///
    /// Undo merges, the newest first, and look at the two tokens that then touch each other at the border: had
    /// they a merge older than the next merge of either side, it would have come first.
    fn can_be_neighbours(&self, mut left: u32, mut right: u32) -> bool {
        let (mut left_goes, mut right_goes) = (NONE, NONE); // the merge that ends the time of each
        loop {
            let id = self.merged(left, right);
            // the same merge on both sides: the leftmost comes first
            if id != NONE && id < left_goes && id <= right_goes {
                return false;
            }
            // of the same merge, the right one is the newer
            let newest = left.max(right);
            let Some(&(newest_left, newest_right)) =
                newest.checked_sub(NUM_BYTES).and_then(|index| self.merges.get(index as usize))
            else {
                return true;
            };
            if left > right {
                (left, left_goes) = (newest_right, newest);
            } else {
                (right, right_goes) = (newest_left, newest);
            }
        }
    }
}

/// The place of two bytes in `Vocab::by_bytes`.
#[inline]
fn byte_pair(left: u32, right: u32) -> Option<usize> {
    (left < NUM_BYTES && right < NUM_BYTES).then_some((left << 8 | right) as usize)
}

fn single(token: &[u8]) -> Option<u8> {
    match token {
        [byte] => Some(*byte),
        _ => None,
    }
}

/// Finds the tokens that a text begins with. Node 0 is the empty text.
#[derive(Debug, Clone)]
struct Trie {
    /// (node, next byte) -> (node, the token that ends there)
    children: FxHashMap<(u32, u8), (u32, u32)>,
    /// By the first two bytes of a text: their node, or NONE, and the longest token that they begin with.
    starts: Vec<(u32, u32)>,
    /// Of each node, and the token that ends at it.
    parents: Vec<u32>,
    tokens: Vec<u32>,
    /// The node of each token.
    nodes: Vec<u32>,
}

impl Trie {
    /// Tokens come in the order of their ids.
    fn new<'t>(tokens: impl Iterator<Item = &'t [u8]>) -> Self {
        let mut trie = Self {
            children: FxHashMap::default(),
            starts: Vec::new(),
            parents: vec![NONE],
            tokens: vec![NONE],
            nodes: Vec::new(),
        };
        for (token, id) in tokens.zip(0..) {
            trie.insert(token, id);
        }
        let bytes = || 0..=u8::MAX;
        trie.starts = bytes()
            .flat_map(|first| bytes().map(move |second| (first, second)))
            .map(|(a, b)| trie.start(a, b))
            .collect();
        trie
    }

    fn start(&self, first: u8, second: u8) -> (u32, u32) {
        let (node, byte) = self.children.get(&(0, first)).copied().unwrap_or((NONE, NONE));
        match self.children.get(&(node, second)) {
            Some(&(child, NONE)) => (child, byte),
            Some(&found) => found,
            None => (NONE, byte),
        }
    }

    fn insert(&mut self, token: &[u8], id: u32) {
        let mut node = 0;
        for (at, &byte) in token.iter().enumerate() {
            let new = self.parents.len() as u32;
            let child = self.children.entry((node, byte)).or_insert((new, NONE));
            if child.0 == new {
                self.parents.push(node);
                self.tokens.push(NONE);
            }
            if at + 1 == token.len() {
                child.1 = id;
            }
            node = child.0;
        }
        self.tokens[node as usize] = id;
        self.nodes.push(node);
    }

    /// The longest token that `text` begins with.
    fn longest(&self, text: &[u8]) -> u32 {
        let (mut node, mut found, rest) = match *text {
            [first, second, ref rest @ ..] => {
                let (node, found) = self.starts[usize::from(first) << 8 | usize::from(second)];
                (node, found, rest)
            }
            _ => (0, NONE, text),
        };
        for &byte in rest {
            let Some(&(child, token)) = self.children.get(&(node, byte)) else { break };
            node = child;
            if token != NONE {
                found = token;
            }
        }
        found
    }

    /// The longest token, but itself, that a token begins with.
    fn shorter(&self, token: u32) -> u32 {
        let mut node = self.parents[self.nodes[token as usize] as usize];
        while node != 0 && self.tokens[node as usize] == NONE {
            node = self.parents[node as usize];
        }
        self.tokens[node as usize]
    }
}
