//! The order of the contestants.

/// The order in a round. The first one changes, and none always follows the same one: what one leaves behind would
/// always disturb the same next one.
pub fn order(contestants: usize, round: u32) -> Vec<usize> {
    let mut order: Vec<usize> = (0..contestants).collect();
    order.rotate_left(round as usize % contestants.max(1));
    if round % 2 == 1 {
        order.reverse();
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_contestant_has_a_turn_in_each_round_and_the_order_changes() {
        let orders: Vec<_> = (0..4).map(|round| order(3, round)).collect();
        assert_eq!(orders, [vec![0, 1, 2], vec![0, 2, 1], vec![2, 0, 1], vec![2, 1, 0]]);
        assert_eq!(order(0, 1), [0; 0]);
    }
}
