//! From texts to counted chunks.

use std::sync::mpsc::{sync_channel, Receiver, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{available_parallelism, JoinHandle};

use rustc_hash::FxHashMap;

use crate::short::Short;
use crate::{BpeError, Splitter};

/// One reader cannot feed more, and each has counts of its own.
const MAX_WORKERS: usize = 16;

/// How often each distinct chunk was seen. 64 bits: the chunk " the" passes 2^31 in a web-sized corpus.
#[derive(Debug, Default)]
pub struct ChunkCounts {
    /// Nearly all chunks: equal keys are found without looking at text elsewhere in memory.
    short: FxHashMap<Short, u64>,
    long: FxHashMap<Box<[u8]>, u64>,
}

impl ChunkCounts {
    /// Errors: `Split`.
    pub fn add(&mut self, splitter: &Splitter, text: &str) -> Result<(), BpeError> {
        let bytes = text.as_bytes();
        splitter.split(text, |start, end| match Short::within(bytes, start, end) {
            Some(short) => *self.short.entry(short).or_default() += 1,
            None => self.add_long(&bytes[start..end], 1),
        })
    }

    /// Add one chunk that was seen `count` times.
    pub fn add_chunk(&mut self, chunk: &[u8], count: u64) {
        match Short::new(chunk) {
            Some(short) => *self.short.entry(short).or_default() += count,
            None => self.add_long(chunk, count),
        }
    }

    fn add_long(&mut self, chunk: &[u8], count: u64) {
        match self.long.get_mut(chunk) {
            Some(total) => *total += count,
            None => drop(self.long.insert(chunk.into(), count)),
        }
    }

    /// The sum of both; the smaller is poured into the larger.
    fn merged(self, other: Self) -> Self {
        let (mut large, small) = if self.len() >= other.len() { (self, other) } else { (other, self) };
        for (chunk, count) in small.short {
            *large.short.entry(chunk).or_default() += count;
        }
        for (chunk, count) in small.long {
            *large.long.entry(chunk).or_default() += count;
        }
        large
    }

    pub fn len(&self) -> usize {
        self.short.len() + self.long.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Give the bytes of every distinct chunk and its count to `visit`, in no particular order.
    pub fn for_each(&self, mut visit: impl FnMut(&[u8], u64)) {
        for (chunk, &count) in &self.short {
            visit(&chunk.to_array()[..chunk.len()], count);
        }
        for (chunk, &count) in &self.long {
            visit(chunk, count);
        }
    }
}

/// Many texts end to end.
#[derive(Debug, Default)]
pub struct Batch {
    text: String,
    ends: Vec<usize>,
}

impl Batch {
    pub fn push(&mut self, text: &str) {
        self.text.push_str(text);
        self.ends.push(self.text.len());
    }

    pub fn num_texts(&self) -> usize {
        self.ends.len()
    }

    pub fn num_bytes(&self) -> usize {
        self.text.len()
    }

    pub fn texts(&self) -> impl Iterator<Item = &str> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, &end)| &self.text[start..end])
    }
}

/// Counts on all cores while more texts are read. The result does not depend on how texts are batched.
pub struct Counter {
    sender: SyncSender<Batch>,
    workers: Vec<JoinHandle<Result<ChunkCounts, BpeError>>>,
}

impl Counter {
    pub fn new(splitter: &Splitter) -> Self {
        let num_workers = available_parallelism().map_or(1, |n| n.get().min(MAX_WORKERS));
        let (sender, receiver) = sync_channel(1);
        let receiver = Arc::new(Mutex::new(receiver));
        let work = || {
            let (splitter, receiver) = (splitter.clone(), receiver.clone());
            std::thread::spawn(move || count_batches(&splitter, &receiver))
        };
        Self { sender, workers: (0..num_workers).map(|_| work()).collect() }
    }

    /// Hand a batch over; waits while all workers are busy. False: they have all failed, and `finish` says why.
    pub fn send(&self, batch: Batch) -> bool {
        self.sender.send(batch).is_ok()
    }

    /// Wait for the workers. Errors: `Split`.
    pub fn finish(self) -> Result<ChunkCounts, BpeError> {
        drop(self.sender);
        let mut total = ChunkCounts::default();
        for worker in self.workers {
            match worker.join() {
                Ok(counts) => total = total.merged(counts?),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        Ok(total)
    }
}

fn count_batches(splitter: &Splitter, receiver: &Mutex<Receiver<Batch>>) -> Result<ChunkCounts, BpeError> {
    let mut counts = ChunkCounts::default();
    loop {
        let received = receiver.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(batch) = received else { return Ok(counts) };
        for text in batch.texts() {
            counts.add(splitter, text)?;
        }
    }
}
