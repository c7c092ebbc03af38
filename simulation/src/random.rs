//! Pseudorandom numbers; the same seed gives the same sequence on every machine.

/// Pseudorandom number generator (`SplitMix64`, Steele, Lea and Flood 2014).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Random(u64);

impl Random {
    /// The generator for that seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number, over the full `u64` range.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number in 0..`end`; `end` must not be 0.
    pub fn below(&mut self, end: usize) -> usize {
        let end = u64::try_from(end).expect("a machine of 64 bits or less");
        usize::try_from(self.number() % end).expect("it is below a usize")
    }

    /// True with probability 1/`times`; `times` must not be 0.
    pub fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    /// A random element; the slice must not be empty.
    pub fn one_of<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_numbers_everywhere() {
        let mut random = Random::new(1_234_567);
        // The first numbers of the reference implementation for this seed.
        let expected = [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423];
        assert_eq!([(); 3].map(|()| random.number()), expected);
    }

    #[test]
    fn every_choice_occurs_eventually() {
        let mut random = Random::new(0);
        let chosen: std::collections::BTreeSet<_> = (0..200).map(|_| random.below(7)).collect();
        assert_eq!(chosen.len(), 7);
    }
}
