//! When what happened during a start: the file that the start-up benchmark reads.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Exits to user space, by reason.
#[derive(Debug, Default)]
pub struct ExitCounts {
    /// Port I/O.
    pub port: AtomicU64,
    /// Accesses to the registers of devices.
    pub mmio: AtomicU64,
    /// All others, such as a signal to the vCPU's thread.
    pub other: AtomicU64,
}

impl ExitCounts {
    fn read(&self) -> BTreeMap<&'static str, u64> {
        [("port_io", &self.port), ("mmio", &self.mmio), ("other", &self.other)]
            .map(|(name, count)| (name, count.load(Ordering::Relaxed)))
            .into()
    }
}

/// A point that the start has reached, and when, in microseconds since the process started.
#[derive(Debug, Clone)]
struct Mark {
    name: &'static str,
    at_us: u64,
}

/// The points reached and when, each only once, and how often the guest has exited on the way.
#[derive(Debug)]
pub struct Timeline {
    start: Instant,
    marks: Vec<Mark>,
    /// Whether the VM has started from a template (`used`), or why not; None before that is known.
    pub template: Option<String>,
    /// None before there is a guest.
    exits: Option<Arc<ExitCounts>>,
}

impl Timeline {
    /// Starts counting; called first thing in `main`.
    pub fn start() -> Self {
        Timeline { start: Instant::now(), marks: Vec::new(), template: None, exits: None }
    }

    /// Records that a point has just been reached. Only the first time counts.
    pub fn mark(&mut self, name: &'static str) {
        self.mark_at(name, Instant::now());
    }

    /// Records that a point was reached at a given time.
    pub fn mark_at(&mut self, name: &'static str, at: Instant) {
        if self.marks.iter().all(|mark| mark.name != name) {
            let elapsed = at.saturating_duration_since(self.start);
            self.marks.push(Mark { name, at_us: elapsed.as_micros() as u64 });
        }
    }

    /// Where the guest's exits are to be counted.
    pub fn count_exits(&mut self) -> Arc<ExitCounts> {
        Arc::clone(self.exits.get_or_insert_default())
    }

    /// Writes one JSON object: `marks_us`, `exits` and, once that is known, `template`.
    ///
    /// # Errors
    /// The writer fails.
    pub fn write_to(&self, mut to: impl Write) -> io::Result<()> {
        let mut marks = self.marks.clone();
        marks.sort_by_key(|mark| mark.at_us);
        let marks: serde_json::Map<String, Value> =
            marks.into_iter().map(|mark| (mark.name.to_owned(), json!(mark.at_us))).collect();
        let exits = self.exits.as_ref().map(|counts| counts.read()).unwrap_or_default();
        let mut timeline = json!({ "marks_us": marks, "exits": exits });
        if let Some(template) = &self.template {
            timeline["template"] = json!(template);
        }
        let text = format!("{timeline}\n");
        to.write_all(text.as_bytes())
    }
}

/// Translates the guest's monotonic clock to the host's, from one pair of readings.
#[derive(Debug, Clone, Copy)]
pub struct GuestClock {
    host: Instant,
    guest_ns: u64,
}

impl GuestClock {
    /// The guest's clock read `guest_ns` (about) now.
    pub fn new(guest_ns: u64) -> Self {
        GuestClock { host: Instant::now(), guest_ns }
    }

    /// The host time of a guest reading: never later than now. A difference that the host's clock cannot
    /// express counts as none.
    pub fn to_host(self, guest_ns: u64) -> Instant {
        if guest_ns >= self.guest_ns {
            let later = Duration::from_nanos(guest_ns - self.guest_ns);
            return self.host.checked_add(later).map_or(self.host, |at| at.min(Instant::now()));
        }
        let earlier = Duration::from_nanos(self.guest_ns - guest_ns);
        self.host.checked_sub(earlier).unwrap_or(self.host)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_times_keep_their_distances() {
        let clock = GuestClock::new(1_000_000_000);
        let earlier = clock.to_host(400_000_000);
        assert_eq!(clock.host - earlier, Duration::from_millis(600));
        assert!(clock.to_host(u64::MAX) <= Instant::now());
    }
}
