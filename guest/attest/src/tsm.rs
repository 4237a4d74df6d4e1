//! Real reports, from a guest kernel with configfs-tsm (Documentation/ABI/testing/configfs-tsm of Linux): a
//! directory that is made gives a report for the bytes that are written into it.

use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::path::Path;

use rustix::mount::MountFlags;
use serde::Serialize;

use crate::certificate::Evidence;
use crate::report::{DATA_LEN, LEN, Report};

/// Where the kernel has it.
pub const DIRECTORY: &str = "/sys/kernel/config/tsm/report";

/// Where configfs belongs; the directory is there if the kernel has it.
const CONFIGFS: &str = "/sys/kernel/config";
/// The directory that this program makes. The agent runs one such program at a time; one that was killed may have left
/// it.
const ENTRY: &str = "mote-attest";
/// The provider whose reports the protocol carries.
const PROVIDER: &str = "sev_guest";
/// How often somebody else may interfere.
const ATTEMPTS: usize = 3;
/// Most bytes of any file: certificates, with much room to spare.
const MAX_LEN: u64 = 64 * 1024;

/// Certificates of the chain that signs a report, in DER; what the provider does not give is empty.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub struct Chain {
    vcek: Vec<u8>,
    ask: Vec<u8>,
    ark: Vec<u8>,
}

/// The directory, if the kernel has it. configfs is mounted if need be.
pub fn find(directory: &Path) -> Option<&Path> {
    if !directory.is_dir() && Path::new(CONFIGFS).is_dir() {
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        // It may be mounted already, in a kernel without TSM.
        let _ = rustix::mount::mount("configfs", CONFIGFS, "configfs", flags, None);
    }
    directory.is_dir().then_some(directory)
}

/// A report with this data.
///
/// # Errors
/// A text that says what could not be done: the guest's firmware or its host gives no report, or not one that the
/// protocol carries.
pub fn evidence(directory: &Path, data: &[u8; DATA_LEN]) -> Result<Evidence, String> {
    let entry = directory.join(ENTRY);
    match fs::create_dir(&entry) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => {
            return Err(format!("create {}: {error}", entry.display()));
        }
        _ => {}
    }
    let read = Entry(&entry).read(data);
    // Its files go with it. If it stays, the next one uses it.
    let _ = fs::remove_dir(&entry);
    read.map_err(|reason| format!("have a report from {}: {reason}", entry.display()))
}

struct Entry<'a>(&'a Path);

impl Entry<'_> {
    fn read(&self, data: &[u8; DATA_LEN]) -> Result<Evidence, String> {
        let provider = self.text("provider")?;
        if provider != PROVIDER {
            return Err(format!(
                "its provider is '{provider}', but the protocol carries reports of '{PROVIDER}' only"
            ));
        }
        let mut before = self.generation()?;
        for _ in 0..ATTEMPTS {
            self.write("inblob", data)?;
            let report = self.bytes("outblob")?;
            // Not every provider has it.
            let table = self.bytes("auxblob").unwrap_or_default();
            // Each write counts: with another one in between, the report may be for other data.
            let after = self.generation()?;
            if after != before.wrapping_add(1) {
                before = after;
                continue;
            }
            let len = report.len();
            let report: [u8; LEN] =
                report.try_into().map_err(|_| format!("it has {len} bytes, not {LEN}"))?;
            let report = Report(report);
            if report.data() != data {
                return Err("it is for other data".into());
            }
            let chain = serde_json::to_vec(&chain(&table)).map_err(|e| e.to_string())?;
            return Ok(Evidence { report, chain });
        }
        Err("something else in the box writes there, too".into())
    }

    fn generation(&self) -> Result<u64, String> {
        let text = self.text("generation")?;
        text.parse().map_err(|_| format!("generation is '{text}', which is no number"))
    }

    fn text(&self, name: &str) -> Result<String, String> {
        Ok(String::from_utf8_lossy(&self.bytes(name)?).trim().to_owned())
    }

    fn bytes(&self, name: &str) -> Result<Vec<u8>, String> {
        let mut bytes = Vec::new();
        let read = |file: fs::File| file.take(MAX_LEN).read_to_end(&mut bytes);
        fs::File::open(self.0.join(name))
            .and_then(read)
            .map_err(|e| format!("read {name}: {e}"))?;
        Ok(bytes)
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), String> {
        let file = fs::OpenOptions::new().write(true).open(self.0.join(name));
        let written: io::Result<()> = file.and_then(|mut file| file.write_all(bytes));
        written.map_err(|e| format!("write {name}: {e}"))
    }
}

/// The certificates of a table of the SEV-ES Guest-Hypervisor Communication Block Standardization (56421, "cert_table"):
/// entries of GUID, offset and length, up to one of zeros. Software disagrees on the order of a GUID's bytes.
fn chain(table: &[u8]) -> Chain {
    const ENTRY_LEN: usize = 24;
    const VCEK: u128 = 0x63da758d_e664_4564_adc5_f4b93be8accd;
    const ASK: u128 = 0x4ab7b379_bbac_4fe4_a02f_05aef327c782;
    const ARK: u128 = 0xc0b406a4_a803_4952_9743_3fb6014cd0ae;
    let mut chain = Chain::default();
    for entry in table.chunks_exact(ENTRY_LEN) {
        let (guid, place) = entry.split_at(16);
        if guid.iter().all(|byte| *byte == 0) {
            break;
        }
        let number = |at: usize| {
            let bytes: [u8; 4] = place[at..at + 4].try_into().unwrap_or_default();
            u32::from_le_bytes(bytes) as usize
        };
        let (start, len) = (number(0), number(4));
        let Some(certificate) = table.get(start..start.saturating_add(len)) else { continue };
        let is = |known: u128| {
            let big = known.to_be_bytes();
            let mut mixed = big;
            for (group, len) in [(0, 4), (4, 2), (6, 2)] {
                mixed[group..group + len].reverse();
            }
            guid == big || guid == mixed
        };
        for (known, to) in [(VCEK, &mut chain.vcek), (ASK, &mut chain.ask), (ARK, &mut chain.ark)] {
            if is(known) {
                *to = certificate.to_owned();
            }
        }
    }
    chain
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{CWD, FileType, Mode};
    use std::path::PathBuf;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::thread;

    /// A directory whose files are pipes, so that each read and each write meets the kernel's half. Nothing here starts a
    /// program: until that had replaced the copy of this process, it would be the other end of any pipe that is open.
    fn tsm() -> PathBuf {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let directory =
            std::env::temp_dir().join(format!("mote-tsm-{}-{count}", std::process::id()));
        let entry = directory.join(ENTRY);
        fs::create_dir_all(&entry).expect("directory");
        for name in ["provider", "generation", "inblob", "outblob", "auxblob"] {
            let (kind, mode) = (FileType::Fifo, Mode::RUSR | Mode::WUSR);
            rustix::fs::mknodat(CWD, entry.join(name), kind, mode, 0).expect("a pipe");
        }
        directory
    }

    /// The kernel's half of a report: what a guest wrote, and the report for `data` of that.
    fn give(entry: &Path, generation: &str, data: impl Fn(&[u8]) -> [u8; DATA_LEN]) {
        let asked = fs::read(entry.join("inblob")).expect("read");
        let Report(mut report) = Report::simulated(&data(&asked));
        report[0] = 2;
        fs::write(entry.join("outblob"), report).expect("written");
        fs::write(entry.join("auxblob"), table()).expect("written");
        fs::write(entry.join("generation"), generation).expect("written");
    }

    fn table() -> Vec<u8> {
        // The bytes of the GUIDs as in the document's text, and as Windows has them.
        let vcek = 0x63da758d_e664_4564_adc5_f4b93be8accd_u128.to_be_bytes();
        let ark = 0xa406b4c0_03a8_5249_9743_3fb6014cd0ae_u128.to_be_bytes();
        let mut table = Vec::new();
        for (guid, start, len) in [(vcek, 72u32, 4u32), (ark, 76, 1000)] {
            table.extend(guid);
            table.extend(start.to_le_bytes());
            table.extend(len.to_le_bytes());
        }
        table.extend([0; 24]);
        table.extend(b"vcek");
        table.resize(76 + 1000, b'a');
        table
    }

    fn same(asked: &[u8]) -> [u8; DATA_LEN] {
        asked.try_into().expect("64 bytes")
    }

    #[test]
    fn a_report_comes_with_its_certificates() {
        let directory = tsm();
        let entry = directory.join(ENTRY);
        let kernel = thread::spawn(move || {
            fs::write(entry.join("provider"), "sev_guest\n").expect("written");
            fs::write(entry.join("generation"), "7\n").expect("written");
            // At first something else writes, too.
            give(&entry, "9\n", |_| [0; DATA_LEN]);
            give(&entry, "10\n", same);
        });
        let Evidence { report, chain } = evidence(&directory, &[5; DATA_LEN]).expect("a report");
        kernel.join().expect("ended");
        assert_eq!((report.0[0], report.data()), (2, &[5; DATA_LEN][..]));
        let chain: serde_json::Value = serde_json::from_slice(&chain).expect("JSON");
        assert_eq!(chain["vcek"], serde_json::json!(b"vcek"));
        assert_eq!(chain["ark"].as_array().expect("bytes").len(), 1000);
        assert_eq!(chain["ask"], serde_json::json!([]));
        fs::remove_dir_all(directory).expect("removed");
    }

    #[test]
    fn what_is_no_report_for_the_guest_is_refused() {
        let refused = |kernel: fn(&Path)| {
            let directory = tsm();
            let entry = directory.join(ENTRY);
            let kernel = thread::spawn(move || kernel(&entry));
            let reason = evidence(&directory, &[5; DATA_LEN]).expect_err("refused");
            kernel.join().expect("ended");
            fs::remove_dir_all(directory).expect("removed");
            reason
        };
        let reason =
            refused(|entry| fs::write(entry.join("provider"), "tdx_guest\n").expect("written"));
        assert!(reason.ends_with(
            "its provider is 'tdx_guest', but the protocol carries reports of 'sev_guest' only"
        ));
        let reason = refused(|entry| {
            fs::write(entry.join("provider"), "sev_guest\n").expect("written");
            fs::write(entry.join("generation"), "1\n").expect("written");
            give(entry, "2\n", |_| [0; DATA_LEN]);
        });
        assert!(reason.ends_with("it is for other data"), "{reason}");
        let missing = evidence(Path::new("/no/such"), &[0; DATA_LEN]).expect_err("refused");
        assert!(missing.starts_with("create /no/such/mote-attest: "), "{missing}");
    }

    #[test]
    fn no_table_makes_certificates_of_what_is_not_there() {
        assert_eq!(chain(&[]), Chain::default());
        let mut broken = table();
        broken[16..24].fill(0xff);
        assert!(chain(&broken).vcek.is_empty());
        assert_eq!(chain(&broken[..30]), Chain::default());
    }
}
