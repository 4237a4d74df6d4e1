//! Where flows are kept. Each has a key, by which events, indexes and turns name it; a key that has
//! outlived its flow names nothing.

use std::ops::Range;

/// Which table a flow is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// An application's TCP connection to the outside.
    Outgoing,
    /// Datagrams between an application's socket and one destination.
    Udp,
    /// A client of a published port.
    Published,
}

/// Names a flow: its table, its slot there, and the slot's generation, which tells it from earlier and
/// later flows there. The lower half is below [`Key::END`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key(u64);

impl Key {
    /// Above the table and the slot of every key.
    pub const END: u64 = 3 << Key::KIND_SHIFT;
    const KIND_SHIFT: u32 = 29;
    const GENERATION_SHIFT: u32 = 32;

    fn new(kind: Kind, slot: usize, generation: u32) -> Self {
        let generation = u64::from(generation) << Key::GENERATION_SHIFT;
        Key(generation | (kind as u64) << Key::KIND_SHIFT | slot as u64)
    }

    /// The key as a number, from which [`Key::from_data`] makes it again.
    pub fn to_data(self) -> u64 {
        self.0
    }

    /// The key that was this number.
    pub fn from_data(data: u64) -> Self {
        Key(data)
    }

    /// Which table the flow is in.
    pub fn kind(self) -> Kind {
        match self.0 >> Key::KIND_SHIFT & 3 {
            0 => Kind::Outgoing,
            1 => Kind::Udp,
            _ => Kind::Published,
        }
    }

    fn slot(self) -> usize {
        (self.0 & ((1 << Key::KIND_SHIFT) - 1)) as usize
    }

    fn generation(self) -> u32 {
        (self.0 >> Key::GENERATION_SHIFT) as u32
    }
}

/// Which of a flow's sockets is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The one to the host.
    Vsock,
    /// The one to the application or to the box's server.
    Inner,
}

/// The flows of one kind.
#[derive(Debug)]
pub struct Flows<F> {
    kind: Kind,
    slots: Vec<Slot<F>>,
    free: Vec<usize>,
}

#[derive(Debug)]
struct Slot<F> {
    generation: u32,
    flow: Option<F>,
}

impl<F> Flows<F> {
    /// An empty table.
    pub fn new(kind: Kind) -> Self {
        Flows { kind, slots: Vec::new(), free: Vec::new() }
    }

    /// A key for a flow that is yet to be put in its place.
    pub fn reserve(&mut self) -> Key {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { generation: 0, flow: None });
            self.slots.len() - 1
        });
        self.key(slot)
    }

    fn slot(&mut self, key: Key) -> Option<&mut Slot<F>> {
        self.slots.get_mut(key.slot()).filter(|slot| slot.generation == key.generation())
    }

    /// The flow with this key, if it is there.
    pub fn get_mut(&mut self, key: Key) -> Option<&mut F> {
        self.slot(key)?.flow.as_mut()
    }

    /// Takes a flow out, to be put back or removed.
    pub fn take(&mut self, key: Key) -> Option<F> {
        self.slot(key)?.flow.take()
    }

    /// Puts a flow in its place.
    pub fn put(&mut self, key: Key, flow: F) {
        if let Some(slot) = self.slot(key) {
            slot.flow = Some(flow);
        }
    }

    /// Drops a flow, if it has not been taken out, and gives its place to others.
    pub fn remove(&mut self, key: Key) {
        if let Some(slot) = self.slot(key) {
            slot.flow = None;
            slot.generation = slot.generation.wrapping_add(1);
            self.free.push(key.slot());
        }
    }

    /// All flows.
    pub fn iter(&self) -> impl Iterator<Item = &F> {
        self.slots.iter().filter_map(|slot| slot.flow.as_ref())
    }

    /// All places, with or without a flow.
    pub fn slots(&self) -> Range<usize> {
        0..self.slots.len()
    }

    /// The key of what is in one of the places now.
    pub fn key(&self, slot: usize) -> Key {
        Key::new(self.kind, slot, self.slots[slot].generation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_names_one_flow_for_ever() {
        let mut flows = Flows::new(Kind::Udp);
        let first = flows.reserve();
        assert_eq!(flows.get_mut(first), None, "reserved, not put");
        flows.put(first, "first");
        let second = flows.reserve();
        flows.put(second, "second");
        flows.remove(first);
        let third = flows.reserve();
        flows.put(third, "third");
        assert_eq!((third.slot(), flows.take(first)), (first.slot(), None));
        flows.put(first, "too late");
        flows.remove(first);
        assert_eq!(flows.iter().collect::<Vec<_>>(), [&"third", &"second"]);
        assert_eq!(flows.slots().map(|slot| flows.key(slot)).collect::<Vec<_>>(), [third, second]);
    }

    #[test]
    fn keys_have_room_for_all_their_parts() {
        for kind in [Kind::Outgoing, Kind::Udp, Kind::Published] {
            let key = Key::new(kind, (1 << Key::KIND_SHIFT) - 1, u32::MAX);
            assert_eq!((key.kind(), key.generation()), (kind, u32::MAX));
            assert!(key.to_data() & u64::from(u32::MAX) < Key::END);
        }
    }
}
