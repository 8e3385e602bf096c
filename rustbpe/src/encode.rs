//! From texts to ids.

use std::panic::resume_unwind;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::available_parallelism;

use crate::short::Short;
use crate::{BpeError, Splitter, Vocab};

const CACHE_BITS: u32 = 13;
const CACHED_IDS: usize = 6;
/// A shorter text has few words twice: it is not worth the cache.
const MIN_CACHED_TEXT: usize = 2048; // bytes

/// Encodes one text after the other, and remembers the chunks it met: most of a text is words seen before.
pub struct Encoder<'v> {
    splitter: &'v Splitter,
    vocab: &'v Vocab,
    cache: Vec<Cached>,
    failed: Vec<bool>,
}

/// A chunk and its ids; no ids = an empty place.
#[derive(Clone, Copy, Default)]
struct Cached {
    chunk: Short,
    len: u32,
    ids: [u32; CACHED_IDS],
}

impl<'v> Encoder<'v> {
    pub fn new(splitter: &'v Splitter, vocab: &'v Vocab) -> Self {
        Self { splitter, vocab, cache: Vec::new(), failed: Vec::new() }
    }

    /// Append the ids of `text`. Errors: `Split`.
    pub fn encode(&mut self, text: &str, out: &mut Vec<u32>) -> Result<(), BpeError> {
        let Self { splitter, vocab, cache, failed } = self;
        if cache.is_empty() && text.len() >= MIN_CACHED_TEXT {
            *cache = vec![Cached::default(); 1 << CACHE_BITS];
        }
        let bytes = text.as_bytes();
        splitter.split(text, |start, end| {
            let chunk = Short::within(bytes, start, end);
            let place = chunk.and_then(|chunk| Some((chunk, cache.get_mut(chunk.slot(CACHE_BITS))?)));
            let Some((chunk, cached)) = place else {
                return vocab.encode_chunk(&bytes[start..end], failed, out);
            };
            if cached.chunk != chunk || cached.len == 0 {
                let first = out.len();
                vocab.encode_chunk(&bytes[start..end], failed, out);
                let new = &out[first..];
                if new.len() <= CACHED_IDS {
                    *cached = Cached { chunk, len: new.len() as u32, ids: [0; CACHED_IDS] };
                    cached.ids[..new.len()].copy_from_slice(new);
                }
                return;
            }
            out.extend_from_slice(&cached.ids[..cached.len as usize]);
        })
    }
}

/// The ids of each text, after `prepend`, by `num_threads` threads (0 = one a core). Errors: `Split`.
pub fn encode_all(
    splitter: &Splitter,
    vocab: &Vocab,
    texts: &[&str],
    prepend: Option<u32>,
    num_threads: usize,
) -> Result<Vec<Vec<u32>>, BpeError> {
    let next = AtomicUsize::new(0);
    let work = || {
        let (mut encoder, mut done) = (Encoder::new(splitter, vocab), Vec::new());
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(text) = texts.get(index) else { return Ok(done) };
            let mut ids = Vec::from_iter(prepend);
            encoder.encode(text, &mut ids)?;
            done.push((index, ids));
        }
    };
    let num_cores = || available_parallelism().map_or(1, |n| n.get());
    let num_threads = if num_threads == 0 { num_cores() } else { num_threads }.min(texts.len());
    let mut rows = vec![Vec::new(); texts.len()];
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..num_threads).map(|_| scope.spawn(work)).collect();
        let mine = work();
        let theirs =
            others.into_iter().map(|worker| worker.join().unwrap_or_else(|panic| resume_unwind(panic)));
        for done in std::iter::once(mine).chain(theirs) {
            for (index, ids) in done? {
                rows[index] = ids;
            }
        }
        Ok(rows)
    })
}
