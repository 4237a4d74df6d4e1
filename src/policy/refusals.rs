//! Which destinations a box was refused, and how often: for the outcome file.

use std::cell::RefCell;
use std::rc::Rc;

use serde_json::{Value, json};

use super::destination::{Destination, protocol_name};

/// Most destinations that are told apart: the guest names them.
const MAX_DESTINATIONS: usize = 64;

/// The refusals of a box's life.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Refusals {
    destinations: Vec<(Destination, u64)>,
    /// Of destinations beyond the first [`MAX_DESTINATIONS`].
    others: u64,
}

/// The refusals, as the device that refuses and the one who reports them share them.
pub type SharedRefusals = Rc<RefCell<Refusals>>;

impl Refusals {
    /// Counts one.
    pub fn add(&mut self, destination: Destination) {
        match self.destinations.iter().position(|(known, _)| *known == destination) {
            Some(index) => self.destinations[index].1 += 1,
            None if self.destinations.len() < MAX_DESTINATIONS => {
                self.destinations.push((destination, 1));
            }
            None => self.others += 1,
        }
    }

    /// Whether there was none.
    pub fn is_empty(&self) -> bool {
        self.destinations.is_empty()
    }

    /// As the outcome file has them: the destinations in the order in which they were first refused.
    pub fn to_json(&self) -> Value {
        let destinations = self.destinations.iter().map(|(destination, count)| {
            json!({
                "protocol": protocol_name(destination.protocol),
                "destination": destination.to_string(),
                "count": count,
            })
        });
        json!({ "destinations": destinations.collect::<Vec<_>>(), "others": self.others })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mote_agent::flow::Protocol;

    #[test]
    fn a_guest_cannot_fill_the_outcome() {
        let mut refusals = Refusals::default();
        for port in (1..=100).chain(1..=2) {
            let address = ([192, 0, 2, 1], port).into();
            refusals.add(Destination::new(Protocol::Tcp, address));
        }
        let json = refusals.to_json();
        let first = json!({"protocol": "tcp", "destination": "192.0.2.1:1", "count": 2});
        assert_eq!(json["destinations"][0], first);
        assert_eq!(json["destinations"].as_array().map(Vec::len), Some(MAX_DESTINATIONS));
        assert_eq!(json["others"], 36);
    }
}
