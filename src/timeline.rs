//! When what happened during a start: the file that the start-up benchmark reads.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Marks in microseconds since the process started, in the order in which they were reached.
#[derive(Debug)]
pub struct Timeline {
    start: Instant,
    marks: Vec<(&'static str, u64)>,
}

impl Timeline {
    /// Starts counting; called first thing in `main`.
    pub fn start() -> Self {
        Timeline { start: Instant::now(), marks: Vec::new() }
    }

    /// Records that something has just been reached. Only the first time counts.
    pub fn mark(&mut self, name: &'static str) {
        self.mark_at(name, Instant::now());
    }

    /// Records that something was reached at a given time.
    pub fn mark_at(&mut self, name: &'static str, at: Instant) {
        if self.marks.iter().all(|(known, _)| *known != name) {
            let elapsed = at.saturating_duration_since(self.start);
            self.marks.push((name, elapsed.as_micros() as u64));
        }
    }

    /// Writes one JSON object: `marks_us` and `exits`.
    pub fn write_to(
        &self,
        mut to: impl Write,
        exits: &BTreeMap<&'static str, u64>,
    ) -> io::Result<()> {
        let mut marks = self.marks.clone();
        marks.sort_by_key(|(_, at)| *at);
        let marks: serde_json::Map<String, Value> =
            marks.into_iter().map(|(name, at)| (name.to_owned(), json!(at))).collect();
        let text = format!("{}\n", json!({ "marks_us": marks, "exits": exits }));
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

    /// The host time of a guest reading; a reading that makes no sense is "now" at the latest and
    /// the epoch of the process at the earliest.
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
