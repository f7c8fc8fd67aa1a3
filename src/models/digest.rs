use rayon::prelude::*;

/// Tells models apart: 64 bits over bytes, the same on every machine. Against accidents, not against forgery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Digest(u64);

/// Bytes that one thread takes at a time; part of what the digest is.
const BLOCK: usize = 1 << 24;
/// An odd number with its bits spread: 2^64 over the golden ratio.
const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;

impl Default for Digest {
    fn default() -> Digest {
        Digest(MULTIPLIER)
    }
}

impl Digest {
    /// Takes `bytes`, and how many they are.
    pub fn add(&mut self, bytes: &[u8]) {
        let blocks: Vec<u64> = bytes.par_chunks(BLOCK).map(of_block).collect();
        for value in blocks.into_iter().chain([bytes.len() as u64]) {
            self.0 = mixed(self.0, value);
        }
    }

    pub fn value(self) -> u64 {
        self.0
    }
}

fn of_block(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<8>();
    let state = words.iter().fold(0, |state, word| mixed(state, u64::from_le_bytes(*word)));
    rest.iter().fold(state, |state, &byte| mixed(state, u64::from(byte)))
}

/// The shift brings the product's high bits, which hang on every bit of the word, down to where the next product spreads
/// them again.
fn mixed(state: u64, word: u64) -> u64 {
    let product = (state ^ word).wrapping_mul(MULTIPLIER);
    product ^ (product >> 32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(parts: &[&[u8]]) -> u64 {
        let mut digest = Digest::default();
        parts.iter().for_each(|part| digest.add(part));
        digest.value()
    }

    #[test]
    fn every_bit_and_every_length_counts() {
        let bytes = vec![7u8; BLOCK + 13];
        let whole = of(&[&bytes]);
        for (at, bit) in [(0, 0), (7, 7), (BLOCK - 1, 7), (BLOCK, 0), (BLOCK + 12, 3)] {
            let mut other = bytes.clone();
            other[at] ^= 1 << bit;
            assert_ne!(of(&[&other]), whole, "byte {at} bit {bit}");
        }
        assert_ne!(of(&[&bytes[1..]]), whole);
        assert_ne!(of(&[b"ab", b"c"]), of(&[b"a", b"bc"]), "where one file ends");
        assert_ne!(of(&[b"", b"a"]), of(&[b"a", b""]), "the order");
    }
}
