//! With whom the guest speaks without connections, for the [`filter`](super::filter).

use std::hash::{BuildHasher, RandomState};
use std::time::Instant;

use crate::policy::destination::Destination;

/// How many pairs are remembered, at most.
const REMEMBERED: usize = 1024;

/// Pairs of a peer and a port of the guest between which packets pass, until some moment. A new pair may take
/// an old one's place: that one is judged again.
#[derive(Debug)]
pub(super) struct Remembered {
    slots: Vec<Option<(Destination, u16, Instant)>>,
    hasher: RandomState,
}

impl Remembered {
    pub(super) fn new() -> Self {
        Remembered { slots: vec![None; REMEMBERED], hasher: RandomState::new() }
    }

    fn slot(&self, peer: Destination, port: u16) -> usize {
        self.hasher.hash_one((peer, port)) as usize % REMEMBERED
    }

    pub(super) fn add(&mut self, peer: Destination, port: u16, until: Instant) {
        let slot = self.slot(peer, port);
        self.slots[slot] = Some((peer, port, until));
    }

    pub(super) fn has(&self, peer: Destination, port: u16, now: Instant) -> bool {
        self.slots[self.slot(peer, port)]
            .is_some_and(|(known, its, until)| (known, its) == (peer, port) && now < until)
    }
}
