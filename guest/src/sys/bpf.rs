//! `bpf(2)`: maps, programs, and their attachment to a cgroup. What is loaded, [`crate::tsi`] has from the build script.
//!
//! Nothing is asked of the kernel but what is needed: it is mote's own (resources/kernel.config), so there is nothing
//! to find out about it, and each question would cost a start.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::ptr;

use super::{check, owned};

/// Of include/uapi/linux/bpf.h, as all numbers and structures here.
const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_LOOKUP_ELEM: libc::c_int = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_MAP_DELETE_ELEM: libc::c_int = 3;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_BTF_LOAD: libc::c_int = 18;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_MAP_TYPE_SK_STORAGE: u32 = 24;

/// How much of the verifier's log an error repeats: its end, where the reason is.
const LOG_TOLD_LEN: usize = 512;
const LOG_LEN: usize = 1 << 20;

/// When an entry may be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Write {
    /// Always (`BPF_ANY`).
    Any = 0,
    /// If there is none of that key (`BPF_NOEXIST`).
    New = 1,
    /// If there is one already (`BPF_EXIST`).
    Existing = 2,
}

/// A map, as programs declare it.
#[derive(Debug)]
pub struct MapDefinition {
    /// As in the source.
    pub name: &'static str,
    /// `BPF_MAP_TYPE_…`.
    pub kind: u32,
    /// Bytes of a key.
    pub key_len: u32,
    /// Bytes of a value.
    pub value_len: u32,
    /// Most entries; of a ring buffer, its bytes.
    pub max_entries: u32,
    /// `BPF_F_…`.
    pub flags: u32,
}

/// A program, as it is given to the kernel.
#[derive(Debug)]
pub struct ProgramDefinition {
    /// As in the source.
    pub name: &'static str,
    /// `BPF_PROG_TYPE_…`.
    pub kind: u32,
    /// `BPF_CGROUP_…`: where it is attached.
    pub attach_type: u32,
    /// `struct bpf_insn`. One that loads a map, or an address within the value of one, has the map's index among
    /// its object's (`BPF_PSEUDO_MAP_IDX`, `BPF_PSEUDO_MAP_IDX_VALUE`).
    pub instructions: &'static [u64],
    /// Which maps it refers to, by those indices.
    pub maps: &'static [usize],
}

/// What one source is compiled to.
#[derive(Debug)]
pub struct ObjectDefinition {
    /// Its maps.
    pub maps: &'static [MapDefinition],
    /// Its programs.
    pub programs: &'static [ProgramDefinition],
    /// Of the programs: which helpers they may call.
    pub license: &'static CStr,
}

/// Makes a `bpf(2)` call.
///
/// # Safety
/// `attributes` is laid out as the command's part of `union bpf_attr`; what is not in it is zero for the kernel. The
/// addresses in it are valid for what the command does with them.
unsafe fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<libc::c_int> {
    let attributes = ptr::from_ref(attributes);
    // SAFETY: the kernel reads as many bytes as `attributes` has; the rest is the caller's promise.
    check(
        unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<T>()) } as libc::c_int
    )
}

fn address<T>(pointer: *const T) -> u64 {
    pointer.expose_provenance() as u64
}

/// A name as the kernel keeps it, for whoever lists what is loaded: cut, and ended by a NUL.
fn object_name(name: &str) -> [u8; 16] {
    let mut kept = [0; 16];
    for (to, from) in kept[..15].iter_mut().zip(name.bytes()) {
        *to = from;
    }
    kept
}

/// A map, whatever is in it.
#[derive(Debug)]
pub struct Created {
    pub(super) fd: OwnedFd,
    pub(super) definition: &'static MapDefinition,
}

impl AsRawFd for Created {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl Created {
    /// A map of this definition that was created before, and came to this process by its descriptor.
    pub fn adopt(fd: OwnedFd, definition: &'static MapDefinition) -> Self {
        Created { fd, definition }
    }

    /// The same map once more.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Created { fd: self.fd.try_clone()?, definition: self.definition })
    }
}

impl AsFd for Created {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Creates a map.
pub fn create_map(definition: &'static MapDefinition) -> io::Result<Created> {
    #[repr(C)]
    struct Attributes {
        kind: u32,
        key_len: u32,
        value_len: u32,
        max_entries: u32,
        flags: u32,
        inner_map_fd: u32,
        numa_node: u32,
        name: [u8; 16],
        interface: u32,
        btf_fd: u32,
        btf_key_type: u32,
        btf_value_type: u32,
    }
    // Storage of sockets must have types, which are the numbers that key and value are here.
    let types = match definition.kind {
        BPF_MAP_TYPE_SK_STORAGE => Some(load_types()?),
        _ => None,
    };
    let typed = types.as_ref().map_or(0, |_| BTF_NUMBER);
    let attributes = Attributes {
        kind: definition.kind,
        key_len: definition.key_len,
        value_len: definition.value_len,
        max_entries: definition.max_entries,
        flags: definition.flags,
        inner_map_fd: 0,
        numa_node: 0,
        name: object_name(definition.name),
        interface: 0,
        btf_fd: types.as_ref().map_or(0, |types| types.as_raw_fd() as u32),
        btf_key_type: typed,
        btf_value_type: typed,
    };
    // SAFETY: the layout is the command's; there are no addresses.
    let fd = owned(unsafe { bpf(BPF_MAP_CREATE, &attributes) }?);
    Ok(Created { fd, definition })
}

/// The type that [`load_types`] describes, by its place.
const BTF_NUMBER: u32 = 1;

/// Describes a 32-bit number to the kernel (Documentation/bpf/btf.rst).
fn load_types() -> io::Result<OwnedFd> {
    /// `struct btf_header`, a `struct btf_type` of `BTF_KIND_INT` with its encoding, and the strings.
    #[repr(C)]
    struct Types {
        magic: u16,
        version: u8,
        flags: u8,
        header_len: u32,
        type_offset: u32,
        types_len: u32,
        string_offset: u32,
        strings_len: u32,
        name_offset: u32,
        info: u32,
        size: u32,
        encoding: u32,
        strings: [u8; 8],
    }
    #[repr(C)]
    struct Attributes {
        types: u64,
        log: u64,
        len: u32,
        log_len: u32,
        log_level: u32,
    }
    static TYPES: Types = Types {
        magic: 0xeb9f,
        version: 1,
        flags: 0,
        header_len: 24,
        type_offset: 0,
        types_len: 16,
        string_offset: 16,
        strings_len: 8,
        name_offset: 1,
        info: 1 << 24,
        size: 4,
        encoding: 32,
        strings: *b"\0number\0",
    };
    let len = size_of::<Types>() as u32;
    let attributes =
        Attributes { types: address(&raw const TYPES), log: 0, len, log_len: 0, log_level: 0 };
    // SAFETY: the layout is the command's. The kernel reads `len` bytes of `TYPES`, which has as many.
    Ok(owned(unsafe { bpf(BPF_BTF_LOAD, &attributes) }?))
}

/// A map whose entries the agent reads and writes, with keys of `K` bytes and values of `V`.
#[derive(Debug)]
pub struct Map<const K: usize, const V: usize> {
    fd: OwnedFd,
}

#[repr(C)]
struct ElementAttributes {
    map_fd: u32,
    _pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

impl<const K: usize, const V: usize> Map<K, V> {
    /// A map with these sizes; others are refused as invalid input.
    pub fn new(Created { fd, definition }: Created) -> io::Result<Self> {
        // The kernel reads and writes as many bytes as it was told when it created it.
        if (definition.key_len as usize, definition.value_len as usize) != (K, V) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(Map { fd })
    }

    fn attributes(&self, key: &[u8; K], value: *const [u8; V], write: Write) -> ElementAttributes {
        ElementAttributes {
            map_fd: self.fd.as_raw_fd() as u32,
            _pad: 0,
            key: address(key),
            value: address(value),
            flags: write as u64,
        }
    }

    /// The value of a key; `None` if there is none.
    pub fn get(&self, key: &[u8; K]) -> Option<[u8; V]> {
        let mut value = [0; V];
        let attributes = self.attributes(key, &raw mut value, Write::Any);
        // SAFETY: the kernel reads the map's `K` bytes of `key` and writes its `V` bytes to `value`, which live to the
        // end of the call.
        unsafe { bpf(BPF_MAP_LOOKUP_ELEM, &attributes) }.ok()?;
        Some(value)
    }

    /// Writes an entry.
    pub fn set(&self, key: &[u8; K], value: &[u8; V], write: Write) -> io::Result<()> {
        let attributes = self.attributes(key, value, write);
        // SAFETY: the kernel reads the map's `K` bytes of `key` and its `V` bytes of `value`, which outlive the call.
        unsafe { bpf(BPF_MAP_UPDATE_ELEM, &attributes) }?;
        Ok(())
    }

    /// Removes an entry.
    pub fn remove(&self, key: &[u8; K]) -> io::Result<()> {
        let attributes = self.attributes(key, ptr::null(), Write::Any);
        // SAFETY: the kernel reads the map's `K` bytes of `key`, which outlives the call, and no value.
        unsafe { bpf(BPF_MAP_DELETE_ELEM, &attributes) }?;
        Ok(())
    }
}

/// `struct bpf_attr`'s part for `BPF_PROG_LOAD`, up to what is needed.
#[repr(C)]
struct LoadAttributes {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_len: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
    btf_fd: u32,
    function_info_record_len: u32,
    function_info: u64,
    function_info_count: u32,
    line_info_record_len: u32,
    line_info: u64,
    line_info_count: u32,
    attach_btf_id: u32,
    attach_program_fd: u32,
    relocation_count: u32,
    map_fds: u64,
}

/// Loads a program. `maps` are the descriptors of its object's maps, in order; those that it does not refer to may be
/// anything.
///
/// # Errors
/// The call's, and what the verifier says.
pub fn load_program(
    definition: &ProgramDefinition,
    license: &CStr,
    maps: &[RawFd],
) -> Result<OwnedFd, String> {
    // The kernel trusts the indices: it has no count of the descriptors.
    if definition.maps.iter().any(|index| *index >= maps.len()) {
        return Err("it refers to a map that its object does not have".into());
    }
    let mut attributes = LoadAttributes {
        kind: definition.kind,
        instruction_count: definition.instructions.len() as u32,
        instructions: address(definition.instructions.as_ptr()),
        license: address(license.as_ptr()),
        log_level: 0,
        log_len: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
        name: object_name(definition.name),
        interface: 0,
        attach_type: definition.attach_type,
        btf_fd: 0,
        function_info_record_len: 0,
        function_info: 0,
        function_info_count: 0,
        line_info_record_len: 0,
        line_info: 0,
        line_info_count: 0,
        attach_btf_id: 0,
        attach_program_fd: 0,
        relocation_count: 0,
        map_fds: address(maps.as_ptr()),
    };
    // SAFETY: the layout is the command's. The kernel reads `instruction_count` instructions, the licence up to its
    // NUL, and the descriptors that the instructions name, which are among `maps`; all outlive the call.
    let error = match unsafe { bpf(BPF_PROG_LOAD, &attributes) } {
        Ok(fd) => return Ok(owned(fd)),
        Err(error) => error,
    };
    // Once more, for the reason: to write the log costs more than to verify.
    let mut log = vec![0_u8; LOG_LEN];
    attributes.log_level = 1;
    attributes.log_len = LOG_LEN as u32;
    attributes.log = log.as_mut_ptr().expose_provenance() as u64;
    // SAFETY: as above; and the kernel writes at most `log_len` bytes to `log`, which has as many.
    let again = unsafe { bpf(BPF_PROG_LOAD, &attributes) };
    if let Ok(fd) = again {
        return Ok(owned(fd));
    }
    let len = log.iter().position(|byte| *byte == 0).unwrap_or(LOG_LEN);
    let told = String::from_utf8_lossy(&log[len.saturating_sub(LOG_TOLD_LEN)..len]);
    Err(format!("{error}: {}", told.trim()))
}

/// Attaches a program to a cgroup, beside whatever is attached there already, while the result is open.
pub fn attach_to_cgroup(
    program: BorrowedFd<'_>,
    cgroup: BorrowedFd<'_>,
    attach_type: u32,
) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attributes {
        program_fd: u32,
        target_fd: u32,
        attach_type: u32,
        flags: u32,
    }
    let attributes = Attributes {
        program_fd: program.as_raw_fd() as u32,
        target_fd: cgroup.as_raw_fd() as u32,
        attach_type,
        flags: 0,
    };
    // SAFETY: the layout is the command's; there are no addresses.
    Ok(owned(unsafe { bpf(BPF_LINK_CREATE, &attributes) }?))
}
