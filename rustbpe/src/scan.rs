//! GPT-4's way to cut a text, by hand: the pattern of `Scanner::for_pattern`, one look at each character.

use std::sync::OnceLock;

/// Kinds of characters, as bits so that a run may be of several kinds.
const LETTER: u8 = 1; // \p{L}
const NUMBER: u8 = 2; // \p{N}
const NEWLINE: u8 = 4; // \r and \n
const SPACE: u8 = 8; // the rest of \s
const OTHER: u8 = 16;

/// Used when no pattern is given: GPT-4's, digits in groups of at most three.
pub const DEFAULT_PATTERN: &str = concat!(
    r"'(?i:[sdmt]|ll|ve|re)",
    r"|[^\r\n\p{L}\p{N}]?+\p{L}+",
    r"|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*",
    r"|\s*[\r\n]",
    r"|\s+(?!\S)",
    r"|\s+",
);

/// Cuts like a pattern that differs from the default one at most in the length of its groups of digits.
#[derive(Debug, Clone)]
pub struct Scanner {
    max_digits: usize,
    kinds: &'static Kinds,
}

impl Scanner {
    /// None for a pattern of another form.
    pub fn for_pattern(pattern: &str) -> Option<Self> {
        let (head, tail) = DEFAULT_PATTERN.split_once("{1,3}")?;
        let digits = pattern.strip_prefix(head)?.strip_suffix(tail)?;
        let max_digits = digits.strip_prefix("{1,")?.strip_suffix('}')?.parse().ok()?;
        (1..=100).contains(&max_digits).then(|| Self { max_digits, kinds: Kinds::get() })
    }

    /// Where the chunk ends that begins at `start`, which must lie on a character before the end of `text`.
    /// The comments quote the alternative of the pattern that each step stands for. The first that fits would win, but
    /// only one can begin with a letter and one with a number, so these need no turn.
    pub fn end_of_chunk(&self, text: &str, start: usize) -> usize {
        let (kind, second) = self.kinds.at(text, start);
        if kind == LETTER {
            return self.kinds.run(text, second, LETTER); // [^\r\n\p{L}\p{N}]?+\p{L}+ without its first part
        }
        if kind == NUMBER {
            return self.end_of_digits(text, second); // \p{N}{1,3}
        }
        let first_byte = text.as_bytes()[start];
        if first_byte == b'\'' {
            if let Some(end) = end_of_contraction(text.as_bytes(), second) {
                return end; // '(?i:[sdmt]|ll|ve|re)
            }
        }
        let (next, third) = self.kinds.at(text, second);
        if next == LETTER && kind != NEWLINE {
            return self.kinds.run(text, third, LETTER); // [^\r\n\p{L}\p{N}]?+\p{L}+
        }
        if kind == OTHER || (first_byte == b' ' && next == OTHER) {
            let end = self.kinds.run(text, second, OTHER);
            return self.kinds.run(text, end, NEWLINE); //  ?[^\s\p{L}\p{N}]++[\r\n]*
        }
        let end = self.kinds.run(text, second, NEWLINE | SPACE);
        let spaces = &text[start..end];
        if let Some(newline) = spaces.rfind(['\r', '\n']) {
            return start + newline + 1; // \s*[\r\n]
        }
        match spaces.char_indices().next_back() {
            Some((last, _)) if last > 0 && end < text.len() => start + last, // \s+(?!\S)
            _ => end,                                                        // \s+
        }
    }

    fn end_of_digits(&self, text: &str, mut at: usize) -> usize {
        for _ in 1..self.max_digits {
            match self.kinds.at(text, at) {
                (NUMBER, after) => at = after,
                _ => break,
            }
        }
        at
    }
}

/// The end of s, d, m, t, ll, ve or re in either case at `at`. `ſ` is an s to a regular expression that ignores case.
fn end_of_contraction(text: &[u8], at: usize) -> Option<usize> {
    let first = text.get(at)?.to_ascii_lowercase();
    let second = text.get(at + 1).map(u8::to_ascii_lowercase);
    match (first, second) {
        (b's' | b'd' | b'm' | b't', _) => Some(at + 1),
        (b'l', Some(b'l')) | (b'v' | b'r', Some(b'e')) => Some(at + 2),
        (0xC5, Some(0xBF)) => Some(at + 2), // ſ
        _ => None,
    }
}

/// The kind of every character.
#[derive(Debug)]
struct Kinds {
    /// By byte; 0 for the bytes of characters beyond ASCII.
    ascii: [u8; 256],
    /// By code point. Zero pages of it stay untouched, so it costs less memory than its megabyte.
    all: Vec<u8>,
}

impl Kinds {
    /// From the tables of the regular expressions' own crate, so that both mean the same Unicode.
    fn get() -> &'static Self {
        static KINDS: OnceLock<Kinds> = OnceLock::new();
        KINDS.get_or_init(|| {
            let mut all = vec![0; char::MAX as usize + 1];
            for (class, kind) in
                [(r"\p{L}", LETTER), (r"\p{N}", NUMBER), (r"\s", SPACE), (r"[\r\n]", NEWLINE)]
            {
                for (first, last) in ranges(class) {
                    all[first as usize..=last as usize].fill(kind);
                }
            }
            let mut ascii = [0; 256];
            for (kind, &found) in ascii.iter_mut().zip(&all[..128]) {
                *kind = if found == 0 { OTHER } else { found };
            }
            Self { ascii, all }
        })
    }

    /// (kind of the character at `at`, where the next one begins); (0, at) at the end.
    #[inline(always)]
    fn at(&self, text: &str, at: usize) -> (u8, usize) {
        match text.as_bytes().get(at) {
            None => (0, at),
            Some(&byte) => match self.ascii[byte as usize] {
                0 => self.wide(text, at),
                kind => (kind, at + 1),
            },
        }
    }

    #[inline(never)]
    fn wide(&self, text: &str, at: usize) -> (u8, usize) {
        match text[at..].chars().next() {
            None => (0, at),
            Some(c) => match self.all[c as usize] {
                0 => (OTHER, at + c.len_utf8()),
                kind => (kind, at + c.len_utf8()),
            },
        }
    }

    /// The end of the characters of `kinds` that follow `at`.
    #[inline(always)]
    fn run(&self, text: &str, mut at: usize, kinds: u8) -> usize {
        let bytes = text.as_bytes();
        loop {
            while at < bytes.len() && self.ascii[bytes[at] as usize] & kinds != 0 {
                at += 1;
            }
            let (kind, after) = self.at(text, at);
            if kind & kinds == 0 {
                return at;
            }
            at = after;
        }
    }
}

/// The code points of a character class.
fn ranges(class: &str) -> Vec<(u32, u32)> {
    use regex_syntax::hir::{Class, HirKind};
    match regex_syntax::parse(class).map(|hir| hir.into_kind()) {
        Ok(HirKind::Class(Class::Unicode(class))) => {
            class.iter().map(|range| (range.start() as u32, range.end() as u32)).collect()
        }
        _ => Vec::new(),
    }
}
