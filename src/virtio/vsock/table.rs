//! The connection table: every connection with its endpoint, found by slot or by ports; which of them
//! may have something for the guest, and by when which of them are owed something.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::time::Instant;

use super::conn::Conn;
use super::endpoint::Endpoint;
use super::packet::Ports;

/// Most connections at once; clients beyond are refused. The agent's own connections always find
/// room, of which there are no more than reserved ports: without them there is no agent.
pub const MAX_CONNECTIONS: usize = 4096;
/// Most of them that are flows, outgoing and published: the rest is for the clients of the box's own
/// sockets, who must get in whatever the box does on the network.
pub const MAX_FLOWS: usize = 3072;
/// Most of them that are the clients': they cannot take its flows from the box.
pub(super) const MAX_CLIENTS: usize = MAX_CONNECTIONS - MAX_FLOWS;
/// First port given to connections from the host; the guest's own start at 1024 too, but those are
/// a different set.
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
    /// Whether it was an orphan when it was looked at last.
    pub orphaned: bool,
    /// Stands in [`Table::ready`].
    pub(super) queued: bool,
    /// Until when the guest may owe an answer, or a flow's request; or a peer may take nothing.
    due: Option<Instant>,
}

impl Entry {
    /// A connection that nothing has been done for yet.
    pub fn new(conn: Conn, endpoint: Endpoint, fallback_port: Option<u32>) -> Self {
        Entry { conn, endpoint, fallback_port, orphaned: false, queued: false, due: None }
    }

    /// Whether what [`Table::set_due`] is for is still to come.
    pub fn is_owed(&self) -> bool {
        let guest_owes = self.conn.is_requested() || self.endpoint.is_awaiting();
        guest_owes || self.conn.is_resetting() || self.is_orphan()
    }

    /// Whether this is a flow that only waits for its peer. A client of the box's own sockets may take
    /// as long as it likes.
    pub fn is_orphan(&self) -> bool {
        self.endpoint.is_flow() && self.conn.is_forgotten()
    }

    /// Whether it is this that it is waited for.
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
    /// Connections that may have something for the guest, first come first served.
    pub(super) ready: VecDeque<usize>,
    /// The slots that are owed something, by when. What has arrived since does not leave it at once.
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

    /// Whether there is room for another flow where `limit` of them may be.
    pub fn has_room_for_flow(&self, limit: usize) -> bool {
        self.flows < limit && self.count() < MAX_CONNECTIONS
    }

    /// Whether there is room for this client. That of a published port has been accepted because there
    /// was room for a flow.
    pub fn has_room_for_client(&self, endpoint: &Endpoint) -> bool {
        match endpoint.is_flow() {
            true => self.count() < MAX_CONNECTIONS,
            false => self.count() - self.flows < MAX_CLIENTS,
        }
    }

    /// Takes a slot for a connection to come: [`Table::insert`] or [`Table::give_back`] is next.
    pub fn take_slot(&mut self) -> usize {
        self.free.pop().unwrap_or_else(|| {
            self.entries.push(None);
            self.entries.len() - 1
        })
    }

    /// Gives a slot back to which no connection came.
    pub fn give_back(&mut self, index: usize) {
        self.free.push(index);
    }

    /// Adds a connection.
    pub fn insert(&mut self, index: usize, entry: Entry) {
        self.flows += usize::from(entry.endpoint.is_flow());
        self.by_ports.insert(entry.conn.ports(), index);
        self.entries[index] = Some(entry);
    }

    /// Removes the connection in this slot, if that is closed.
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

    /// Has a request that the guest has refused ask its other port, if it has one.
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

    /// A host port that no connection to this port of the guest's has. There is always one: ports are
    /// many more than connections.
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

    /// Says by when a connection is owed something, in place of what was said before.
    pub fn set_due(&mut self, index: usize, due: Instant) {
        let Some(entry) = self.entries.get_mut(index).and_then(Option::as_mut) else { return };
        if let Some(before) = entry.due.replace(due) {
            self.deadlines.remove(&(before, index));
        }
        self.deadlines.insert((due, index));
    }

    /// When [`Table::take_due`] has something next.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(due, _)| *due)
    }

    /// The next slot that is owed something since before `now`, and since when. It may have it by now.
    pub fn take_due(&mut self, now: Instant) -> Option<(Instant, usize)> {
        self.deadlines.first().filter(|(due, _)| now >= *due)?;
        self.deadlines.pop_first()
    }

    /// The slots that are owed something, the longest first.
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

    /// Whether nobody stands in line.
    pub fn is_idle(&self) -> bool {
        self.ready.is_empty()
    }

    /// The connection that is first in line, which it leaves.
    pub fn next_in_line(&mut self) -> Option<usize> {
        let index = self.ready.pop_front()?;
        if let Some(entry) = self.get_mut(index) {
            entry.queued = false;
        }
        Some(index)
    }
}
