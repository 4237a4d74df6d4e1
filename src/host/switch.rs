//! The process that exchanges frames with the other boxes of the same network (contract §2.13). It is a child of
//! mote's, which, confined, can reach no socket by its name.
//!
//! ```text
//! mote         network device ── frames, as on the connection to passt ┐
//! mote-switch                    own socket, and one to each other box ┴ datagrams ── the boxes' sockets
//! ```
//!
//! A box that takes no frames holds nobody up but for a moment: each has a socket of its own, and what it does
//! not take is lost, as on a switch. The process ends with mote. It is confined, too: where the host permits
//! that, the directory of the sockets is its root.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, ErrorKind, PipeReader};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use event_manager::EventSet;

use super::helper;
use crate::confine::{self, Isolation};
use crate::log;
use crate::plan::{Switch, socket_name, socket_owner};
use crate::sys::{self, Interest};
use crate::virtio::net::passt::{Connection, FRAME_LEN, Lost};
use crate::virtio::net::peers::{self, Mac};

/// Most frames in one direction before the other has its turn.
const BATCH: usize = 64;
/// How long a box may make this one wait that takes no more frames, and how often.
const PATIENCE: Duration = Duration::from_millis(10);
const PATIENT_AGAIN: Duration = Duration::from_secs(1);
/// Most boxes to which there is a socket.
const MOST_BOXES: usize = 256;

/// A box's switch.
#[derive(Debug)]
pub struct SwitchProcess {
    process: OwnedFd,
    answer: PipeReader,
}

impl SwitchProcess {
    /// Starts the process, which takes frames for the box at `socket`. Returns mote's connection to it, too. Must
    /// be called before there are threads.
    ///
    /// # Errors
    /// The host refuses a process or a descriptor, or the directory cannot be read.
    pub fn start(
        plan: &Switch,
        isolation: Isolation,
        socket: UnixDatagram,
    ) -> Result<(SwitchProcess, UnixStream)> {
        let directory = File::open(&plan.directory).with_context(|| {
            format!("network.bridge_socket_dir: open {}", plan.directory.display())
        })?;
        let (ours, theirs) = UnixStream::pair().context("create a socket pair")?;
        let (answer, to) = io::pipe().context("create a pipe")?;
        let keep: [RawFd; 5] = [
            theirs.as_raw_fd(),
            socket.as_raw_fd(),
            directory.as_raw_fd(),
            to.as_raw_fd(),
            log::descriptor(),
        ];
        let mut parts = Some((theirs, socket, directory, to));
        let pid = sys::process::start_detached(c"mote-switch", &keep, || {
            let Some((mote, socket, directory, mut to)) = parts.take() else { return };
            let confined = confine::confine_switch(isolation, directory)
                .and_then(|()| Frames::new(mote, socket, plan).context("prepare its sockets"));
            if helper::tell(&mut to, confined.as_ref().err())
                && let Ok(frames) = confined
            {
                drop(to);
                // Its end is mote's.
                let _ = frames.carry();
            }
        })
        .context("start the process that exchanges frames with other boxes")?;
        let process = sys::process::process_file(pid).context("watch mote-switch")?;
        Ok((SwitchProcess { process, answer }, ours))
    }

    /// The process.
    pub fn process(&self) -> &OwnedFd {
        &self.process
    }

    /// Waits until the process is confined, or `stop` is readable.
    ///
    /// # Errors
    /// It could not be confined, or could not work then.
    pub fn wait_until_confined(&mut self, stop: &File) -> Result<()> {
        helper::wait_until_confined(
            "that exchanges frames with other boxes",
            &mut self.answer,
            stop,
        )
    }
}

/// What the process has.
#[derive(Debug)]
struct Frames<'a> {
    plan: &'a Switch,
    mote: Connection,
    /// The box's own socket.
    own: UnixDatagram,
    boxes: HashMap<Mac, OtherBox>,
    buffer: Vec<u8>,
}

#[derive(Debug)]
struct OtherBox {
    /// Connected to the box's own.
    socket: UnixDatagram,
    /// When it was first waited for, not long ago.
    waited_at: Option<Instant>,
}

/// How far the frames of mote's have gone.
enum Progress {
    /// All that there were.
    Done,
    /// There may be more.
    More,
    /// One waits for this box.
    Waits(Mac),
}

impl<'a> Frames<'a> {
    fn new(mote: UnixStream, own: UnixDatagram, plan: &'a Switch) -> io::Result<Frames<'a>> {
        own.set_nonblocking(true)?;
        Ok(Frames {
            plan,
            mote: Connection::new(mote)?,
            own,
            boxes: HashMap::new(),
            // One byte more than a frame has: what is longer can be told.
            buffer: vec![0; FRAME_LEN.end() + 1],
        })
    }

    /// Carries frames until mote's end.
    fn carry(mut self) -> Result<(), Lost> {
        loop {
            let progress = self.move_to_boxes()?;
            let is_over = self.move_to_mote();
            let is_flushed = self.mote.flush()?;
            let limit = match progress {
                Progress::More => Some(Duration::ZERO),
                _ if !is_over => Some(Duration::ZERO),
                Progress::Waits(_) => Some(PATIENCE),
                Progress::Done => None,
            };
            let waits_for = match &progress {
                Progress::Waits(mac) => self.boxes.get(mac),
                _ => None,
            };
            let room = waits_for.map_or(Interest::NONE, |other| Interest::write(&other.socket));
            let wants_frames = !matches!(progress, Progress::Waits(_));
            let mote = Interest::new(self.mote.socket(), wants_frames, !is_flushed);
            let ready = sys::poll([mote, Interest::read(&self.own), room], limit);
            let [is_ready, _, _] = ready.map_err(Lost::Failed)?;
            if is_ready {
                self.mote.note(EventSet::IN | EventSet::OUT);
            }
        }
    }

    /// Moves frames of the guest's to the boxes they are for.
    fn move_to_boxes(&mut self) -> Result<Progress, Lost> {
        for _ in 0..BATCH {
            let Some(frame) = self.mote.frame()? else { return Ok(Progress::Done) };
            let len = frame.len();
            match peers::ends(frame) {
                // The guest speaks for itself alone, even if it has broken into mote.
                Some((to, from)) if from == self.plan.mac => {
                    if peers::is_group(to) {
                        for other in others(self.plan.mac) {
                            let _ = send(&mut self.boxes, other, frame);
                        }
                    } else if !send(&mut self.boxes, to, frame) && self.may_wait(to) {
                        return Ok(Progress::Waits(to));
                    }
                }
                _ => {}
            }
            self.mote.take_frame(len);
        }
        Ok(Progress::More)
    }

    /// Whether the frame that this box has not taken is kept for it.
    fn may_wait(&mut self, to: Mac) -> bool {
        let Some(other) = self.boxes.get_mut(&to) else { return false };
        let now = Instant::now();
        let recent = other.waited_at.filter(|at| now - *at < PATIENT_AGAIN);
        let since = *other.waited_at.insert(recent.unwrap_or(now));
        now - since < PATIENCE
    }

    /// Moves frames of the boxes' to mote. `false` if there may be more.
    fn move_to_mote(&mut self) -> bool {
        for _ in 0..BATCH {
            // Errors pass, like that of a signal.
            let Ok(len) = self.own.recv(&mut self.buffer) else { return true };
            let frame = &self.buffer[..len];
            // A guest that takes no frames loses them, and does not make those who send them wait.
            if self.mote.has_room() && peers::may_send(frame, self.plan.mac, &self.plan.subnet) {
                self.mote.put_copy(frame);
            }
        }
        false
    }
}

/// Sends a frame to a box. `false` if it takes no more at the moment; a frame for a box that is not there is lost.
fn send(boxes: &mut HashMap<Mac, OtherBox>, to: Mac, frame: &[u8]) -> bool {
    let is_new = !boxes.contains_key(&to);
    if is_new {
        if boxes.len() >= MOST_BOXES {
            boxes.clear();
        }
        let Ok(socket) = connect(to) else { return true };
        boxes.insert(to, OtherBox { socket, waited_at: None });
    }
    let Some(other) = boxes.get_mut(&to) else { return true };
    match other.socket.send(frame) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => return false,
        Ok(_) => {}
        // It has ended. Another may have come in its place.
        Err(_) => {
            boxes.remove(&to);
            return is_new || send(boxes, to, frame);
        }
    }
    true
}

/// A socket that sends to the box with this address.
fn connect(to: Mac) -> io::Result<UnixDatagram> {
    let socket = UnixDatagram::unbound()?;
    socket.connect(socket_name(to))?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// The other boxes that there are.
fn others(own: Mac) -> impl Iterator<Item = Mac> {
    let names = fs::read_dir(".").into_iter().flatten().flatten();
    names
        .filter_map(|name| socket_owner(name.file_name().as_encoded_bytes()))
        .filter(move |mac| *mac != own)
}
