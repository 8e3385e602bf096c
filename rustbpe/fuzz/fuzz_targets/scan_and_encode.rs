//! Any text: the scanner cuts like the regular expression, and what is encoded decodes to the text.
//!
//!     cargo install cargo-fuzz && cd rustbpe && cargo +nightly fuzz run scan_and_encode
#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use rustbpe::{encode_all, train, ChunkCounts, Pair, Splitter, Vocab, DEFAULT_PATTERN};

fn chunks(splitter: &Splitter, text: &str) -> Vec<(usize, usize)> {
    let mut chunks = Vec::new();
    // backtracking gives up on a very long run of spaces; nothing to compare then
    let outcome = splitter.split(text, |start, end| chunks.push((start, end)));
    if outcome.is_err() {
        chunks.clear();
    }
    chunks
}

/// Apply the merges one after the other to the whole chunk.
fn encode_plainly(chunk: &[u8], merges: &[Pair]) -> Vec<u32> {
    let mut ids: Vec<u32> = chunk.iter().map(|&byte| u32::from(byte)).collect();
    for (&pair, id) in merges.iter().zip(256..) {
        let mut at = 0;
        while at + 1 < ids.len() {
            if (ids[at], ids[at + 1]) == pair {
                ids.splice(at..at + 2, [id]);
            }
            at += 1;
        }
    }
    ids
}

fuzz_target!(|text: &str| {
    static SPLITTERS: OnceLock<(Splitter, Splitter)> = OnceLock::new();
    let (scanner, regex) = SPLITTERS.get_or_init(|| {
        let grouped = format!("(?:{DEFAULT_PATTERN})");
        (Splitter::new(DEFAULT_PATTERN).unwrap(), Splitter::new(&grouped).unwrap())
    });
    let found = chunks(scanner, text);
    let expected = chunks(regex, text);
    assert!(expected.is_empty() || found == expected, "{text:?}");

    // a vocabulary learned from the text itself meets every kind of run in it
    let mut counts = ChunkCounts::default();
    counts.add(scanner, text).unwrap();
    let merges = train(&counts, 256 + 64, |_, _| Ok(())).unwrap();
    let vocab = Vocab::from_merges(&merges).unwrap();
    let ids = &encode_all(scanner, &vocab, &[text], None, 1).unwrap()[0];
    assert_eq!(vocab.decode(ids).unwrap(), text.as_bytes());
    let plain: Vec<u32> =
        found.iter().flat_map(|&(start, end)| encode_plainly(&text.as_bytes()[start..end], &merges)).collect();
    assert_eq!(ids, &plain, "{text:?}");
});
