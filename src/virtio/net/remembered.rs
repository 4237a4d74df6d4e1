//! With whom the guest speaks without connections, for the [`filter`](super::filter).

use std::hash::{BuildHasher, RandomState};
use std::time::Instant;

use crate::policy::destination::Destination;

/// Who is at the other side of the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Side {
    /// passt, which makes connections of frames.
    Passt,
    /// Other boxes, which get the frames.
    Peers,
}

/// How many pairs are remembered, at most.
const REMEMBERED: usize = 1024;

/// Pairs of somebody at one side and a port of the guest between which packets pass, until some moment. A new pair
/// may take an old one's place: that one is judged again.
#[derive(Debug)]
pub(super) struct Remembered {
    slots: Vec<Option<(Pair, Instant)>>,
    hasher: RandomState,
}

/// What comes from one side is no reason to send to the other.
type Pair = (Side, Destination, u16);

impl Remembered {
    pub(super) fn new() -> Self {
        Remembered { slots: vec![None; REMEMBERED], hasher: RandomState::new() }
    }

    fn slot(&self, pair: &Pair) -> usize {
        self.hasher.hash_one(pair) as usize % REMEMBERED
    }

    pub(super) fn add(&mut self, side: Side, other: Destination, port: u16, until: Instant) {
        let pair = (side, other, port);
        let slot = self.slot(&pair);
        self.slots[slot] = Some((pair, until));
    }

    pub(super) fn has(&self, side: Side, other: Destination, port: u16, now: Instant) -> bool {
        let pair = (side, other, port);
        self.slots[self.slot(&pair)].is_some_and(|(known, until)| known == pair && now < until)
    }
}
