//! From texts to ids.

use std::panic::resume_unwind;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::available_parallelism;

use crate::short::Short;
use crate::vocab::Scratch;
use crate::{BpeError, Splitter, Vocab};

/// Encodes one text after the other.
pub struct Encoder<'v> {
    splitter: &'v Splitter,
    vocab: &'v Vocab,
    scratch: Scratch,
}

impl<'v> Encoder<'v> {
    pub fn new(splitter: &'v Splitter, vocab: &'v Vocab) -> Self {
        Self { splitter, vocab, scratch: Scratch::default() }
    }

    /// Append the ids of `text`. Errors: `Split`.
    pub fn encode(&mut self, text: &str, out: &mut Vec<u32>) -> Result<(), BpeError> {
        let Self { splitter, vocab, scratch } = self;
        let bytes = text.as_bytes();
        splitter.split(text, |start, end| {
            match Short::within(bytes, start, end).and_then(|it| vocab.short_id(it)) {
                Some(id) => out.push(id), // nine chunks of ten are a token
                None => vocab.encode_chunk(&bytes[start..end], scratch, out),
            }
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
