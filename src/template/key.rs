//! What must be the same for a template to be used: all that the state of a VM depends on, but for what is renewed.

use std::fs;
use std::hash::{DefaultHasher, Hasher};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result};
use kvm_bindings::{CpuId, Msrs, kvm_cpuid_entry2, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};
use serde::Serialize;

use super::file;
use super::shape::Shape;
use crate::kvm::state;
use crate::sys;

/// A template's key.
#[derive(Debug, Clone, Serialize)]
pub struct Key {
    format: u32,
    /// mote itself, with the kernel and the initramfs in it.
    program: Identity,
    vcpus: u8,
    memory_bytes: u64,
    attests: bool,
    /// Of the first vCPU: the others' follow from it.
    cpuid: Vec<kvm_cpuid_entry2>,
    /// What KVM says of the host's CPU by MSRs, its microcode's version among them.
    features: Vec<(u32, u64)>,
    tsc_khz: u32,
    /// Name, release and version of the host's kernel, with which KVM's capabilities go.
    host: [String; 3],
}

/// Which file it is, and that nobody has changed it since.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct Identity {
    device: u64,
    inode: u64,
    len: u64,
    changed: (i64, i64),
    modified: (i64, i64),
}

impl Identity {
    fn of(path: &Path) -> io::Result<Identity> {
        let metadata = fs::metadata(path)?;
        Ok(Identity {
            device: metadata.dev(),
            inode: metadata.ino(),
            len: metadata.len(),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        })
    }
}

impl Key {
    /// The key of VMs of this shape on this host, of which `vcpu` is one's first, with this CPUID.
    ///
    /// # Errors
    /// The host does not say all that a key has, or its vCPUs have state that a template has no place for.
    pub fn new(shape: &Shape, kvm: &Kvm, vcpu: &VcpuFd, cpuid: &CpuId) -> Result<Key> {
        state::check_host(kvm)?;
        Ok(Key {
            format: file::VERSION,
            program: Identity::of(Path::new("/proc/self/exe"))
                .context("look at mote's own file")?,
            vcpus: shape.vcpus,
            memory_bytes: shape.memory_bytes,
            attests: shape.attests,
            cpuid: cpuid.as_slice().to_vec(),
            features: features(kvm)?,
            tsc_khz: vcpu.get_tsc_khz().context("read the rate of the time stamp counter")?,
            host: sys::kernel_version(),
        })
    }

    /// The key as a file has it.
    ///
    /// # Errors
    /// None that is known.
    pub fn encode(&self) -> Result<Vec<u8>> {
        postcard::to_allocvec(self).context("encode the key")
    }
}

/// A file name for an encoded key: another key may have the same, so the file has the whole.
pub fn name(key: &[u8]) -> String {
    let mut hasher = DefaultHasher::new();
    hasher.write(key);
    format!("{:016x}", hasher.finish())
}

fn features(kvm: &Kvm) -> Result<Vec<(u32, u64)>> {
    let list = kvm.get_msr_feature_index_list().context("list what KVM says of the CPU")?;
    let entries = list.as_slice().iter();
    let entries: Vec<_> =
        entries.map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
    let mut msrs = Msrs::from_entries(&entries).context("list what KVM says of the CPU")?;
    // Those behind one that this CPU does not have are left out, on every start alike.
    let read = kvm.get_msrs(&mut msrs).context("read what KVM says of the CPU")?;
    Ok(msrs.as_slice().iter().take(read).map(|msr| (msr.index, msr.data)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_has_changed_is_another_key() {
        let program = Identity::of(Path::new("/proc/self/exe")).expect("it is there");
        let leaf = kvm_cpuid_entry2 { function: 1, ecx: 1 << 26, ..Default::default() };
        let host = ["Linux", "6.1.0", "#1 SMP"].map(String::from);
        let key = Key {
            format: file::VERSION,
            program,
            vcpus: 2,
            memory_bytes: 256 << 20,
            attests: false,
            cpuid: vec![leaf],
            features: vec![(0x8b, 1)],
            tsc_khz: 2_400_000,
            host,
        };
        type Change = fn(&mut Key);
        let changes: [Change; 14] = [
            |key| key.format += 1,
            |key| key.program.device += 1,
            |key| key.program.inode += 1,
            |key| key.program.len += 1,
            |key| key.program.changed.1 += 1,
            |key| key.program.modified.0 += 1,
            |key| key.vcpus += 1,
            |key| key.memory_bytes += 1 << 20,
            |key| key.attests = true,
            |key| key.cpuid[0].ecx = 0,
            |key| key.cpuid.clear(),
            |key| key.features[0].1 += 1,
            |key| key.tsc_khz += 1,
            |key| key.host[1].push_str("-57"),
        ];
        let encoded = key.encode().expect("encoded");
        for (number, change) in changes.into_iter().enumerate() {
            let mut other = key.clone();
            change(&mut other);
            let other = other.encode().expect("encoded");
            assert_ne!(other, encoded, "change {number}");
            assert_ne!(name(&other), name(&encoded), "change {number}");
        }
    }
}
