//! The fast paths against slow plain ones, on random text.

use std::collections::HashMap;

use rustbpe::{
    encode_all, train, Batch, BpeError, ChunkCounts, Counter, Pair, Scratch, Splitter, Vocab, DEFAULT_PATTERN,
};

/// A small linear congruential generator (Knuth's MMIX constants), so that tests need no crate for it.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % n
    }

    fn text(&mut self, alphabet: &[char], max_len: usize) -> String {
        let len = self.below(max_len + 1);
        (0..len).map(|_| alphabet[self.below(alphabet.len())]).collect()
    }
}

fn never_stop(_done: usize, _planned: usize) -> Result<(), BpeError> {
    Ok(())
}

fn merge_once(ids: &[u32], pair: Pair, new_id: u32) -> Vec<u32> {
    let (mut out, mut i) = (Vec::new(), 0);
    while i < ids.len() {
        if i + 1 < ids.len() && (ids[i], ids[i + 1]) == pair {
            out.push(new_id);
            i += 2;
        } else {
            out.push(ids[i]);
            i += 1;
        }
    }
    out
}

fn to_ids(chunk: &str) -> Vec<u32> {
    chunk.bytes().map(u32::from).collect()
}

/// Recount every pair of every word before each merge.
fn train_plainly(chunks: &[(String, u64)], num_merges: usize) -> Vec<Pair> {
    let mut words: Vec<(Vec<u32>, u64)> = chunks.iter().map(|(c, n)| (to_ids(c), *n)).collect();
    let mut merges = Vec::new();
    while merges.len() < num_merges {
        let mut counts: HashMap<Pair, u64> = HashMap::new();
        for (ids, count) in &words {
            for pair in ids.windows(2) {
                *counts.entry((pair[0], pair[1])).or_default() += count;
            }
        }
        let Some(most) = counts.values().max() else { break };
        let best = *counts.iter().filter(|(_, n)| *n == most).map(|(pair, _)| pair).min().unwrap();
        for (ids, _) in &mut words {
            *ids = merge_once(ids, best, 256 + merges.len() as u32);
        }
        merges.push(best);
    }
    merges
}

/// Apply the merges one after the other to the whole chunk.
fn encode_plainly(chunk: &str, merges: &[Pair]) -> Vec<u32> {
    let mut ids = to_ids(chunk);
    for (pair, new_id) in merges.iter().zip(256..) {
        ids = merge_once(&ids, *pair, new_id);
    }
    ids
}

fn random_chunks(random: &mut Random) -> Vec<(String, u64)> {
    let alphabet: Vec<char> = "aaab c日é".chars().collect();
    (0..30).map(|_| (random.text(&alphabet, 24), random.below(4) as u64)).collect()
}

fn counted(chunks: &[(String, u64)]) -> ChunkCounts {
    let mut counts = ChunkCounts::default();
    for (chunk, count) in chunks {
        counts.add_chunk(chunk.as_bytes(), *count);
    }
    counts
}

fn learn(chunks: &[(String, u64)], num_merges: u32) -> Vec<Pair> {
    train(&counted(chunks), 256 + num_merges, never_stop).unwrap()
}

fn encode(vocab: &Vocab, chunk: &str) -> Vec<u32> {
    let mut ids = Vec::new();
    vocab.encode_chunk(chunk.as_bytes(), &mut Scratch::default(), &mut ids);
    ids
}

#[test]
fn training_equals_recounting_everything_before_each_merge() {
    let mut random = Random(1);
    for _ in 0..200 {
        let mut chunks = random_chunks(&mut random);
        chunks.retain(|(_, count)| *count > 0);
        assert_eq!(learn(&chunks, 40), train_plainly(&chunks, 40), "{chunks:?}");
    }
}

#[test]
fn of_equally_frequent_pairs_the_smaller_ids_win() {
    let chunks = [("bc".to_owned(), 5), ("ad".to_owned(), 5), ("ac".to_owned(), 5)];
    let pair = |text: &str| (u32::from(text.as_bytes()[0]), u32::from(text.as_bytes()[1]));
    assert_eq!(learn(&chunks, 9), [pair("ac"), pair("ad"), pair("bc")]);
}

#[test]
fn training_stops_when_no_pair_is_left() {
    assert_eq!(learn(&[("abc".to_owned(), 1)], 100), [(97, 98), (256, 99)]);
    assert_eq!(learn(&[], 100), []);
}

#[test]
fn counts_pass_32_bits() {
    let chunks = [("ab".to_owned(), u64::from(u32::MAX)), ("xab".to_owned(), 7), ("cd".to_owned(), 1 << 32)];
    assert_eq!(learn(&chunks, 1), [(97, 98)]); // 2^32 - 1 + 7 beats 2^32
}

#[test]
fn no_two_tokens_have_the_same_bytes() {
    let mut random = Random(2);
    for _ in 0..50 {
        let merges = learn(&random_chunks(&mut random), 60);
        let vocab = Vocab::from_merges(&merges).unwrap();
        let mut tokens: Vec<&[u8]> = vocab.tokens().collect();
        let num_tokens = tokens.len();
        tokens.sort();
        tokens.dedup();
        assert_eq!(tokens.len(), num_tokens);
    }
}

#[test]
fn encoding_equals_applying_each_merge_in_turn_and_decodes_back() {
    let mut random = Random(3);
    for _ in 0..300 {
        let merges = learn(&random_chunks(&mut random), 60);
        let vocab = Vocab::from_merges(&merges).unwrap();
        for (chunk, _) in random_chunks(&mut random) {
            let ids = encode(&vocab, &chunk);
            assert_eq!(ids, encode_plainly(&chunk, &merges), "{chunk:?}");
            assert_eq!(vocab.decode(&ids).unwrap(), chunk.as_bytes());
        }
    }
}

#[test]
fn long_chunks_equal_applying_each_merge_in_turn() {
    let mut random = Random(5);
    for _ in 0..300 {
        let text = |random: &mut Random| random.text(&['a', 'a', 'a', 'b'], 200);
        let merges = learn(&[(text(&mut random), 1), (text(&mut random), 1)], 80);
        let vocab = Vocab::from_merges(&merges).unwrap();
        let many = random.text(&"aab c日é".chars().collect::<Vec<_>>(), 200);
        for chunk in [text(&mut random), text(&mut random), "a".repeat(random.below(300)), many] {
            assert_eq!(encode(&vocab, &chunk), encode_plainly(&chunk, &merges), "{chunk:?}");
        }
    }
}

#[test]
fn the_tokens_alone_tell_the_merges() {
    let mut random = Random(6);
    for _ in 0..50 {
        let merges = learn(&random_chunks(&mut random), 60);
        let vocab = Vocab::from_merges(&merges).unwrap();
        let tokens: Vec<&[u8]> = vocab.tokens().collect();
        assert_eq!(Vocab::from_tokens(&tokens).unwrap().merges(), merges);
    }
}

/// The default pattern inside one more group: the regular expression runs what the scanner does not recognise.
fn regex_twin(pattern: &str) -> Splitter {
    Splitter::new(&format!("(?:{pattern})")).unwrap()
}

fn split<'t>(splitter: &Splitter, text: &'t str) -> Vec<&'t str> {
    let mut chunks = Vec::new();
    splitter.split(text, |start, end| chunks.push(&text[start..end])).unwrap();
    chunks
}

#[test]
fn the_scanner_equals_the_regular_expression() {
    let alphabet: Vec<char> =
        "a Zsé'tlvEſ日7٣½  \u{a0}\u{3000}\u{85}\t\u{b}\n\r\r.,$\u{301}😀".chars().collect();
    let mut random = Random(4);
    for pattern in [DEFAULT_PATTERN.to_owned(), DEFAULT_PATTERN.replace("{1,3}", "{1,2}")] {
        let (fast, plain) = (Splitter::new(&pattern).unwrap(), regex_twin(&pattern));
        for _ in 0..50_000 {
            let text = random.text(&alphabet, 16);
            let chunks = split(&fast, &text);
            assert_eq!(chunks, split(&plain, &text), "{text:?}");
            assert_eq!(chunks.concat(), text);
        }
    }
}

#[test]
fn the_scanner_knows_the_kind_of_every_character() {
    let (fast, plain) = (Splitter::new(DEFAULT_PATTERN).unwrap(), regex_twin(DEFAULT_PATTERN));
    for c in '\0'..=char::MAX {
        let text = format!("{c}a{c}{c}1{c} .{c}'{c}");
        assert_eq!(split(&fast, &text), split(&plain, &text), "{text:?}");
    }
}

#[test]
fn digits_come_by_three_and_a_word_keeps_one_space_before_it() {
    let splitter = Splitter::new(DEFAULT_PATTERN).unwrap();
    assert_eq!(
        split(&splitter, "it's 12345   ok \n\n x"),
        ["it", "'s", " ", "123", "45", "  ", " ok", " \n\n", " x"]
    );
}

#[test]
fn two_million_spaces_are_one_chunk_and_a_word() {
    let text = " ".repeat(2_000_000) + "x";
    let chunks = split(&Splitter::new(DEFAULT_PATTERN).unwrap(), &text);
    assert_eq!(chunks.iter().map(|chunk| chunk.len()).collect::<Vec<_>>(), [1_999_999, 2]);
}

fn sorted(counts: &ChunkCounts) -> Vec<(Vec<u8>, u64)> {
    let mut all = Vec::new();
    counts.for_each(|chunk, count| all.push((chunk.to_vec(), count)));
    all.sort();
    all
}

#[test]
fn counts_do_not_depend_on_batches_nor_on_threads() {
    let long = "word".repeat(10);
    let texts: Vec<String> = (0..100).map(|i| format!("the cat {} sat on {long}", i % 7)).collect();
    let splitter = Splitter::new(DEFAULT_PATTERN).unwrap();
    let mut plain = ChunkCounts::default();
    for text in &texts {
        plain.add(&splitter, text).unwrap();
    }
    for size in [1, 7, 100] {
        let counter = Counter::new(&splitter);
        for texts in texts.chunks(size) {
            let mut batch = Batch::default();
            texts.iter().for_each(|text| batch.push(text));
            assert!(counter.send(batch));
        }
        assert_eq!(sorted(&counter.finish().unwrap()), sorted(&plain));
    }
    assert!(sorted(&plain).contains(&(b" cat".to_vec(), 100)));
    assert!(sorted(&plain).contains(&(format!(" {long}").into_bytes(), 100)));
}

#[test]
fn many_texts_on_many_threads_give_the_ids_of_each_alone() {
    let mut random = Random(7);
    let alphabet: Vec<char> = "ab c.é1".chars().collect();
    let texts: Vec<String> = (0..200).map(|_| random.text(&alphabet, 60)).collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let splitter = Splitter::new(DEFAULT_PATTERN).unwrap();
    let vocab = Vocab::from_merges(&learn(&random_chunks(&mut random), 60)).unwrap();
    let plain: Vec<Vec<u32>> = texts
        .iter()
        .map(|text| split(&splitter, text).iter().flat_map(|chunk| encode(&vocab, chunk)).collect())
        .collect();
    for num_threads in [0, 1, 3] {
        assert_eq!(encode_all(&splitter, &vocab, &texts, None, num_threads).unwrap(), plain);
    }
    assert!(encode_all(&splitter, &vocab, &[], None, 2).unwrap().is_empty());
    assert_eq!(encode_all(&splitter, &vocab, &["", "a"], Some(9), 2).unwrap(), [vec![9], vec![9, 97]]);
}

#[test]
fn what_a_caller_gets_wrong_is_an_error_and_no_panic() {
    assert_eq!(train(&counted(&[]), 255, never_stop), Err(BpeError::VocabTooSmall { vocab_size: 255 }));
    assert!(matches!(Splitter::new("("), Err(BpeError::BadPattern { .. })));
    let bytes = Vocab::from_merges(&[]).unwrap();
    assert_eq!(bytes.decode(&[97, 256]), Err(BpeError::UnknownToken { id: 256, vocab_size: 256 }));
    for merges in [vec![(97, 300)], vec![(97, 256)], vec![(97, 98), (97, 98)]] {
        assert!(matches!(Vocab::from_merges(&merges), Err(BpeError::BadMerge { .. })), "{merges:?}");
    }
    assert_eq!(Vocab::new(b"ab", &[]).err(), Some(BpeError::BadBytes));
    assert_eq!(Vocab::from_tokens(&["a"]).err(), Some(BpeError::BadBytes));
    let mut tokens: Vec<Vec<u8>> = bytes.tokens().map(<[u8]>::to_vec).collect();
    tokens.push(b"abc".to_vec());
    assert!(matches!(Vocab::from_tokens(&tokens), Err(BpeError::BadToken { id: 256, .. })));
    let spaces = " ".repeat(2_000_000) + "x";
    assert!(matches!(regex_twin(DEFAULT_PATTERN).split(&spaces, |_, _| ()), Err(BpeError::Split { .. })));
}

#[test]
fn the_callback_stops_the_merge_loop() {
    let stop_at_two = |done, _| if done == 2 { Err(BpeError::Interrupted) } else { Ok(()) };
    assert_eq!(train(&counted(&[("abcdef".to_owned(), 1)]), 300, stop_at_two), Err(BpeError::Interrupted));
}
