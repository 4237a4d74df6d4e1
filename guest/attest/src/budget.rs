//! How much of something all clients have together.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Instant;

/// An amount that clients take parts of, and give back.
#[derive(Debug)]
pub struct Budget {
    left: Mutex<usize>,
    returned: Condvar,
}

/// A part of a budget, until it is dropped.
#[derive(Debug)]
pub struct Part<'a> {
    budget: &'a Budget,
    amount: usize,
}

impl Budget {
    /// All of it.
    pub const fn new(amount: usize) -> Self {
        Budget { left: Mutex::new(amount), returned: Condvar::new() }
    }

    /// Takes a part, and waits for it until the deadline, if there is one. `None` if it is not to be had until then.
    pub fn take(&self, amount: usize, deadline: Option<Instant>) -> Option<Part<'_>> {
        // Nothing panics while it has the lock, and a number cannot be half changed.
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        while *left < amount {
            left = match deadline {
                None => self.returned.wait(left).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let limit = deadline.saturating_duration_since(Instant::now());
                    if limit.is_zero() {
                        return None;
                    }
                    let waited = self.returned.wait_timeout(left, limit);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        *left -= amount;
        Some(Part { budget: self, amount })
    }
}

impl Drop for Part<'_> {
    fn drop(&mut self) {
        *self.budget.left.lock().unwrap_or_else(PoisonError::into_inner) += self.amount;
        self.budget.returned.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_there_again_for_others() {
        let budget = Budget::new(3);
        let now = Some(Instant::now());
        let two = budget.take(2, now).expect("there");
        assert!(budget.take(2, now).is_none());
        let one = budget.take(1, now).expect("there");
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| budget.take(3, None).is_some());
            drop((one, two));
            assert!(waiting.join().expect("ended"));
        });
    }
}
