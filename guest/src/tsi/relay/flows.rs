//! Where flows are kept. Each has a key, by which events, indexes and turns name it; a key that has
//! outlived its flow names nothing.

/// Which protocol's table a flow is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// An application's TCP connection to the outside.
    Outgoing,
    /// Datagrams between an application's socket and one destination.
    Udp,
    /// A client of a published port.
    Published,
}

/// Names a flow. A later flow in the same slot has another generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    /// The table.
    pub kind: Kind,
    /// The place in it.
    pub slot: u32,
    /// How many flows have been there before.
    pub generation: u32,
}

/// Which of a flow's sockets is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The one to the host.
    Vsock,
    /// The one to the application or to the box's server.
    Tcp,
}

/// The flows of one kind.
#[derive(Debug)]
pub struct Flows<F> {
    kind: Kind,
    slots: Vec<Slot<F>>,
    free: Vec<u32>,
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
            self.slots.len() as u32 - 1
        });
        Key { kind: self.kind, slot, generation: self.slots[slot as usize].generation }
    }

    fn slot(&mut self, key: Key) -> Option<&mut Slot<F>> {
        self.slots.get_mut(key.slot as usize).filter(|slot| slot.generation == key.generation)
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
            self.free.push(key.slot);
        }
    }

    /// All flows, and their keys.
    pub fn iter(&self) -> impl Iterator<Item = (Key, &F)> {
        let kind = self.kind;
        self.slots.iter().enumerate().filter_map(move |(slot, Slot { generation, flow })| {
            let key = Key { kind, slot: slot as u32, generation: *generation };
            Some((key, flow.as_ref()?))
        })
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
        assert_eq!((third.slot, flows.take(first)), (first.slot, None));
        flows.put(first, "too late");
        flows.remove(first);
        let all: Vec<_> = flows.iter().collect();
        assert_eq!(all, [(third, &"third"), (second, &"second")]);
    }
}
