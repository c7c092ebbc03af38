//! Reproducible random numbers, determined by a seed.

/// The environment variable with the seed.
pub const SEED: &str = "POLDER_SEED";

/// A source of random numbers (`SplitMix64`, Steele, Lea and Flood 2014). The same seed gives the same numbers.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// A source with that seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A random number below `limit`, which must not be 0.
    pub fn below(&mut self, limit: usize) -> usize {
        let limit = limit as u64;
        usize::try_from(self.number() % limit).expect("it is below a usize")
    }

    /// Returns true with a probability of `percent` %.
    pub fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    /// A random element. The slice must not be empty.
    pub fn one_of<'a, T>(&mut self, several: &'a [T]) -> &'a T {
        &several[self.below(several.len())]
    }

    /// Shuffles the elements (Fisher and Yates).
    pub fn shuffle<T>(&mut self, several: &mut [T]) {
        for last in (1..several.len()).rev() {
            several.swap(last, self.below(last + 1));
        }
    }

    /// An independent source, derived from this one.
    #[must_use]
    pub fn branch(&mut self) -> Self {
        Self(self.number())
    }
}

/// The seed from the environment, or a new one. It is printed now, and again if this program fails.
pub fn announced_seed() -> u64 {
    let given = std::env::var(SEED).ok();
    let seed = match &given {
        Some(text) => text.parse().unwrap_or_else(|_| panic!("{SEED} is a number, and not {text:?}")),
        None => {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            u64::from(now.map_or(0, |now| now.subsec_nanos()))
        }
    };
    println!("{SEED}={seed}");
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        usual(panic);
        eprintln!("It happened with {SEED}={seed}");
    }));
    seed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_numbers() {
        let numbers = |seed| {
            let mut random = Random::new(seed);
            std::iter::repeat_with(|| random.below(1000)).take(20).collect::<Vec<_>>()
        };
        assert_eq!(numbers(7), numbers(7));
        assert_ne!(numbers(7), numbers(8));
    }

    #[test]
    fn a_shuffle_loses_nothing() {
        let mut all: Vec<_> = (0..50).collect();
        Random::new(1).shuffle(&mut all);
        assert_ne!(all, (0..50).collect::<Vec<_>>());
        all.sort_unstable();
        assert_eq!(all, (0..50).collect::<Vec<_>>());
    }
}
