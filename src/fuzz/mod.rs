//! What the fuzzers run (`make fuzz`): for each interface that a guest, a client or passt drives, a
//! function that takes any bytes, does with them what the other side could do, and checks what must
//! always hold. A panic is a finding.
//!
//! The functions are here and not in `tests/fuzz`, which has only the entry points, because they use the
//! benches of the unit tests, and because the unit tests run them too: on every input of the
//! committed corpus, and on every input that was once a finding.

#![allow(clippy::expect_used, clippy::panic, reason = "a failed expectation is a finding")]

mod control;
mod flow;
mod frames;
mod mmio;
mod net;
mod oci;
mod passt;
mod queue;
mod spec;
mod template;
mod vsock;

use crate::sys;

/// A fuzz target: its name, which its entry point and its corpus have too, and the function to run.
pub type Target = (&'static str, fn(&[u8]));

/// All fuzz targets.
pub const TARGETS: [Target; 11] = [
    ("control", control::run),
    ("flow", flow::run),
    ("frames", frames::run),
    ("mmio", mmio::run),
    ("net", net::run),
    ("oci", oci::run),
    ("passt", passt::run),
    ("queue", queue::run),
    ("spec", spec::run),
    ("template", template::run),
    ("vsock", vsock::run),
];

/// Ignores SIGPIPE, as Rust does before `main`, which a fuzzer does not have: writing to a closed socket
/// must be an error, not the end of the process.
pub fn prepare() {
    std::mem::forget(sys::signal_file(&[libc::SIGPIPE]));
}

/// Runs the target of this name.
pub fn run(name: &str, data: &[u8]) {
    let target = TARGETS.iter().find(|(target, _)| *target == name);
    target.expect("a target of this name").1(data);
}

/// The input, from which every decision takes bytes; zeros when there are no more.
#[derive(Debug)]
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next bytes, at most `len`.
    fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (bytes, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        bytes
    }

    /// As many bytes as the next byte says.
    fn short(&mut self) -> &'a [u8] {
        let len = self.u8();
        self.bytes(len.into())
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let bytes = self.bytes(N);
        let mut array = [0; N];
        array[..bytes.len()].copy_from_slice(bytes);
        array
    }

    fn u8(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    fn flag(&mut self) -> bool {
        self.u8() & 1 == 1
    }

    /// One of these values.
    fn choose<T: Copy>(&mut self, from: &[T]) -> T {
        from[usize::from(self.u8()) % from.len()]
    }

    /// A number that is often at or near a limit.
    fn edge(&mut self) -> u32 {
        match self.u8() {
            0 => 0,
            1 => 1,
            2 => u32::MAX,
            3 => 1 << 31,
            4 => u32::MAX >> 1,
            5 => 1 << 16,
            6 => (1 << 16) - 1,
            7 => 256 * 1024,
            8 => self.u32(),
            small => small.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// Runs every committed input of a target.
    fn replay(name: &str) {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz");
        assert!(root.join(format!("fuzz_targets/{name}.rs")).exists(), "an entry point");
        let corpus = root.join("corpus").join(name);
        let files = std::fs::read_dir(&corpus).expect("a committed corpus");
        let mut count = 0;
        for file in files {
            let path = file.expect("an entry").path();
            let data = std::fs::read(&path).expect("an input");
            // Printed only if the test panics.
            println!("{}", path.display());
            run(name, &data);
            count += 1;
        }
        assert!(count > 0, "{name} has a corpus");
    }

    macro_rules! replays {
        ($($name:ident)*) => {
            $(#[test] fn $name() { replay(stringify!($name)); })*

            #[test]
            fn every_target_is_replayed() {
                let replayed = [$(stringify!($name)),*];
                assert_eq!(TARGETS.map(|(name, _)| name), replayed);
            }
        };
    }

    replays!(control flow frames mmio net oci passt queue spec template vsock);
}
