//! Medians and percentiles.

/// A figure that stands for several values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Statistic {
    /// The median.
    Median,
    /// The 99th percentile: the smallest value that at least 99 % of all values do not exceed. It is the largest value
    /// where there are fewer than 100.
    P99,
}

impl Statistic {
    /// The name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Median => "median",
            Self::P99 => "p99",
        }
    }

    /// The statistic of these values; `None` if there are none.
    pub fn of(self, values: &[f64]) -> Option<f64> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        match self {
            Self::Median => {
                let middle = sorted.len().checked_sub(1)?;
                Some(f64::midpoint(sorted[middle / 2], sorted[middle.div_ceil(2)]))
            }
            Self::P99 => sorted.get((sorted.len() * 99).div_ceil(100).checked_sub(1)?).copied(),
        }
    }
}

/// The median, the smallest and the largest of some values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spread {
    /// The median.
    pub median: f64,
    /// The smallest value.
    pub min: f64,
    /// The largest value.
    pub max: f64,
}

impl Spread {
    /// The spread of these values; `None` if there are none.
    pub fn of(values: &[f64]) -> Option<Self> {
        Some(Self {
            median: Statistic::Median.of(values)?,
            min: values.iter().copied().min_by(f64::total_cmp)?,
            max: values.iter().copied().max_by(f64::total_cmp)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_of_values_is_between_the_middle_two() {
        assert_eq!(Statistic::Median.of(&[4.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(Statistic::Median.of(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(Statistic::Median.of(&[7.0]), Some(7.0));
        assert_eq!(Statistic::Median.of(&[]), None);
    }

    #[test]
    fn the_99th_percentile_of_few_values_is_the_largest() {
        let values: Vec<f64> = (1..=200).map(f64::from).collect();
        assert_eq!(Statistic::P99.of(&values), Some(198.0));
        assert_eq!(Statistic::P99.of(&values[..100]), Some(99.0));
        assert_eq!(Statistic::P99.of(&values[..99]), Some(99.0));
        assert_eq!(Statistic::P99.of(&values[..1]), Some(1.0));
        assert_eq!(Statistic::P99.of(&[]), None);
    }

    #[test]
    fn a_spread_has_the_extremes() {
        assert_eq!(Spread::of(&[3.0, 1.0, 2.0]), Some(Spread { median: 2.0, min: 1.0, max: 3.0 }));
        assert_eq!(Spread::of(&[]), None);
    }
}
