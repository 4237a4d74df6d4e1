//! A flow whose two TCP connections are both there: bytes pass between them until its end.

use vmm_sys_util::epoll::EventSet;

use super::flows::{Key, Side};
use super::shared::{Shared, Wake};
use crate::tsi::program::Id;
use crate::tsi::stream::{Progress, Stream};

/// Bytes flow.
#[derive(Debug)]
pub struct Spliced {
    // Boxed: it is much larger than the states before.
    stream: Box<Stream>,
    id: Id,
    /// Has a turn to come.
    queued: bool,
}

impl Spliced {
    /// A flow between the stream's sockets, of which nothing is known yet.
    pub fn new(stream: Stream, id: Id) -> Self {
        Spliced { stream: Box::new(stream), id, queued: false }
    }

    /// Names the flow.
    pub fn id(&self) -> Id {
        self.id
    }

    /// The connection.
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Notes that the application has closed its socket.
    pub fn note_close(&mut self) {
        self.stream.note_close();
    }

    /// Has it served after the others.
    pub fn queue_turn(&mut self, key: Key, shared: &mut Shared) {
        if !std::mem::replace(&mut self.queued, true) {
            shared.queue_turn(key);
        }
    }

    /// Takes note of what it is served for.
    pub fn note(&mut self, wake: Wake) {
        match wake {
            Wake::Ready(side, set) => {
                let ready = match side {
                    Side::Vsock => &mut self.stream.vsock_ready,
                    Side::Inner => &mut self.stream.tcp_ready,
                };
                let over = EventSet::HANG_UP | EventSet::ERROR;
                ready.readable |= set.intersects(EventSet::IN | EventSet::READ_HANG_UP | over);
                ready.writable |= set.intersects(EventSet::OUT | over);
            }
            Wake::Turn => self.queued = false,
        }
    }

    /// Moves what can be moved; `None` at the flow's end.
    pub fn step(mut self, key: Key, shared: &mut Shared) -> Option<Self> {
        match self.stream.pump(&mut shared.scratch) {
            Progress::Waiting => {}
            Progress::More => self.queue_turn(key, shared),
            Progress::Over => return None,
            Progress::Broken => {
                self.stream.reset();
                return None;
            }
        }
        Some(self)
    }
}
