//! Byte strings short enough to be a number.

use std::hash::{Hash, Hasher};

const CAPACITY: usize = 15;

/// Up to 15 bytes by value: compared and hashed as two machine words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Short(u128); // the highest byte is the length

impl Short {
    /// None when `bytes` are too long.
    #[inline]
    pub fn new(bytes: &[u8]) -> Option<Self> {
        let mut padded = [0; CAPACITY + 1];
        padded[..CAPACITY].get_mut(..bytes.len())?.copy_from_slice(bytes);
        padded[CAPACITY] = bytes.len() as u8;
        Some(Self(u128::from_le_bytes(padded)))
    }

    /// `text[start..end]`, by one load of 16 bytes where there are so many.
    #[inline]
    pub fn within(text: &[u8], start: usize, end: usize) -> Option<Self> {
        let len = end - start;
        match text.get(start..start + CAPACITY + 1).and_then(|bytes| bytes.try_into().ok()) {
            Some(bytes) if len <= CAPACITY => {
                let kept = u128::from_le_bytes(bytes) & ((1 << (8 * len)) - 1);
                Some(Self(kept | (len as u128) << (8 * CAPACITY)))
            }
            _ => Self::new(&text[start..end]),
        }
    }

    pub fn len(self) -> usize {
        (self.0 >> (8 * CAPACITY)) as usize
    }

    /// The first `len` are the bytes.
    pub fn to_array(self) -> [u8; CAPACITY + 1] {
        self.0.to_le_bytes()
    }
}

impl Hash for Short {
    #[inline]
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.0 as u64);
        state.write_u64((self.0 >> 64) as u64);
    }
}
