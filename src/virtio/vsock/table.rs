//! The connection table: every connection with its endpoint, found by slot or by ports; which
//! connections may have something for the guest, and which have a deadline.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::time::Instant;

use super::conn::Conn;
use super::endpoint::Endpoint;
use super::packet::Ports;

/// Most connections at once; clients beyond are refused. Connections to reserved ports are not limited:
/// there is one for each port, and the agent cannot do without them.
pub const MAX_CONNECTIONS: usize = 4096;
/// Most connections that are flows, outgoing and published. The rest is for clients of the box's own
/// sockets, who must find room whatever the box does on the network.
pub const MAX_FLOWS: usize = 3072;
/// Most connections of clients of the box's own sockets: they must not use up the room for flows.
pub(super) const MAX_CLIENTS: usize = MAX_CONNECTIONS - MAX_FLOWS;
/// First host port of connections that the host opens. The guest's own ports start at 1024 too, but
/// they are a separate set.
const FIRST_HOST_PORT: u32 = 1024;

/// A connection and its endpoint.
#[derive(Debug)]
pub struct Entry {
    /// The guest's side.
    pub conn: Conn,
    /// The host's side.
    pub endpoint: Endpoint,
    /// The guest port to ask when the guest refuses the first one.
    pub fallback_port: Option<u32>,
    /// Whether it was an orphan when it was last flushed.
    pub orphaned: bool,
    /// Whether it is in [`Table::ready`].
    pub(super) queued: bool,
    /// The deadline for what the guest owes, or for an orphan's peer to take something.
    due: Option<Instant>,
}

impl Entry {
    /// A new connection, in no line and without a deadline.
    pub fn new(conn: Conn, endpoint: Endpoint, fallback_port: Option<u32>) -> Self {
        Entry { conn, endpoint, fallback_port, orphaned: false, queued: false, due: None }
    }

    /// Whether the deadline still counts: the guest owes an answer, a flow's request or room for a
    /// reset, or an orphan waits for its peer.
    pub fn is_owed(&self) -> bool {
        let guest_owes = self.conn.is_requested() || self.endpoint.is_awaiting();
        guest_owes || self.conn.is_resetting() || self.is_orphan()
    }

    /// Whether this is a flow that the guest has forgotten, and that only waits for its peer to take the
    /// rest. A client of the box's own sockets may take as long as it likes.
    pub fn is_orphan(&self) -> bool {
        self.endpoint.is_flow() && self.conn.is_forgotten()
    }

    /// Whether this is still the deadline.
    pub fn is_due(&self, due: Instant) -> bool {
        self.due == Some(due)
    }
}

/// All connections.
#[derive(Debug)]
pub struct Table {
    pub(super) entries: Vec<Option<Entry>>,
    pub(super) free: Vec<usize>,
    pub(super) by_ports: HashMap<Ports, usize>,
    /// How many of the connections are flows.
    pub(super) flows: usize,
    /// Slots of connections that may have something for the guest, first come first served.
    pub(super) ready: VecDeque<usize>,
    /// Deadlines and their slots. A deadline stays here when what it is for has happened.
    pub(super) deadlines: BTreeSet<(Instant, usize)>,
    next_host_port: u32,
}

impl Default for Table {
    fn default() -> Self {
        Table {
            entries: Vec::new(),
            free: Vec::new(),
            by_ports: HashMap::new(),
            flows: 0,
            ready: VecDeque::new(),
            deadlines: BTreeSet::new(),
            next_host_port: FIRST_HOST_PORT,
        }
    }
}

impl Table {
    /// The connection in this slot.
    pub fn get(&self, index: usize) -> Option<&Entry> {
        self.entries.get(index)?.as_ref()
    }

    /// The connection in this slot.
    pub fn get_mut(&mut self, index: usize) -> Option<&mut Entry> {
        self.entries.get_mut(index)?.as_mut()
    }

    /// The slot of the connection with these ports.
    pub fn find(&self, ports: Ports) -> Option<usize> {
        self.by_ports.get(&ports).copied()
    }

    /// How many connections there are.
    pub fn count(&self) -> usize {
        self.by_ports.len()
    }

    /// All slots, in use or not.
    pub fn slots(&self) -> std::ops::Range<usize> {
        0..self.entries.len()
    }

    /// All connections.
    pub fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter().flatten()
    }

    /// Whether there is room for another flow, if there may be `limit` of them.
    pub fn has_room_for_flow(&self, limit: usize) -> bool {
        self.flows < limit && self.count() < MAX_CONNECTIONS
    }

    /// Whether there is room for this client. For a client of a published port, the number of flows was
    /// checked before it was accepted.
    pub fn has_room_for_client(&self, endpoint: &Endpoint) -> bool {
        match endpoint.is_flow() {
            true => self.count() < MAX_CONNECTIONS,
            false => self.count() - self.flows < MAX_CLIENTS,
        }
    }

    /// Takes a slot for a new connection. The caller then calls [`Table::insert`] or
    /// [`Table::give_back`].
    pub fn take_slot(&mut self) -> usize {
        self.free.pop().unwrap_or_else(|| {
            self.entries.push(None);
            self.entries.len() - 1
        })
    }

    /// Gives back a slot that was not used.
    pub fn give_back(&mut self, index: usize) {
        self.free.push(index);
    }

    /// Adds a connection.
    pub fn insert(&mut self, index: usize, entry: Entry) {
        self.flows += usize::from(entry.endpoint.is_flow());
        self.by_ports.insert(entry.conn.ports(), index);
        self.entries[index] = Some(entry);
    }

    /// Removes the connection in this slot, if it is closed.
    pub fn remove_closed(&mut self, index: usize) -> Option<Entry> {
        let slot = self.entries.get_mut(index)?;
        let entry = slot.take_if(|entry| entry.conn.is_closed())?;
        self.flows -= usize::from(entry.endpoint.is_flow());
        if let Some(due) = entry.due {
            self.deadlines.remove(&(due, index));
        }
        self.by_ports.remove(&entry.conn.ports());
        self.ready.retain(|ready| *ready != index);
        self.free.push(index);
        Some(entry)
    }

    /// Sends a request that the guest has refused to its fallback port. `false` if it has none.
    pub fn ask_elsewhere(&mut self, index: usize) -> bool {
        let Some(entry) = self.get_mut(index).filter(|entry| entry.conn.is_requested()) else {
            return false;
        };
        let Some(guest) = entry.fallback_port.take() else { return false };
        let refused = entry.conn.ports();
        let ports = Ports { host: self.free_host_port(guest), guest };
        self.by_ports.remove(&refused);
        self.by_ports.insert(ports, index);
        if let Some(entry) = self.get_mut(index) {
            entry.conn.redirect(ports);
        }
        true
    }

    /// A host port that no other connection to this guest port has. There is always one: there are many
    /// more ports than connections.
    pub fn free_host_port(&mut self, guest: u32) -> u32 {
        loop {
            let host = self.next_host_port;
            self.next_host_port = match host.wrapping_add(1) {
                next if next < FIRST_HOST_PORT => FIRST_HOST_PORT,
                next => next,
            };
            if !self.by_ports.contains_key(&Ports { host, guest }) {
                return host;
            }
        }
    }

    /// Sets a connection's deadline, in place of an earlier one.
    pub fn set_due(&mut self, index: usize, due: Instant) {
        let Some(entry) = self.entries.get_mut(index).and_then(Option::as_mut) else { return };
        if let Some(before) = entry.due.replace(due) {
            self.deadlines.remove(&(before, index));
        }
        self.deadlines.insert((due, index));
    }

    /// When [`Table::take_due`] has something to return.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(due, _)| *due)
    }

    /// Takes the next deadline that has passed by `now`, and its slot. The connection may not be owed
    /// anything any more ([`Entry::is_owed`]).
    pub fn take_due(&mut self, now: Instant) -> Option<(Instant, usize)> {
        self.deadlines.first().filter(|(due, _)| now >= *due)?;
        self.deadlines.pop_first()
    }

    /// The slots that have a deadline, the earliest first.
    pub fn owed(&self) -> Vec<usize> {
        self.deadlines.iter().map(|(_, index)| *index).collect()
    }

    /// Puts a connection in line for the guest, unless it is there already.
    pub fn line_up(&mut self, index: usize) {
        if let Some(entry) = self.entries.get_mut(index).and_then(Option::as_mut)
            && !std::mem::replace(&mut entry.queued, true)
        {
            self.ready.push_back(index);
        }
    }

    /// Whether no connection is in line.
    pub fn is_idle(&self) -> bool {
        self.ready.is_empty()
    }

    /// Takes the first connection out of the line.
    pub fn next_in_line(&mut self) -> Option<usize> {
        let index = self.ready.pop_front()?;
        if let Some(entry) = self.get_mut(index) {
            entry.queued = false;
        }
        Some(index)
    }
}
