//! Build script: compiles the agent's BPF programs with clang, which `make tools` installs, and writes what the kernel
//! is given of them as Rust (`ObjectDefinition` in src/sys/bpf.rs): nothing is parsed or patched at a start.

use std::error::Error;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs, io};

use object::read::elf::ElfFile64;
use object::{Object, ObjectSection, ObjectSymbol, RelocationFlags, RelocationTarget, SectionKind};

const SOURCE: &str = "bpf/tsi.bpf.c";

// Of include/uapi/linux/bpf.h.
const BPF_PROG_TYPE_CGROUP_SKB: u32 = 8;
const BPF_PROG_TYPE_CGROUP_SOCK: u32 = 9;
const BPF_PROG_TYPE_SOCK_OPS: u32 = 13;
const BPF_PROG_TYPE_CGROUP_SOCK_ADDR: u32 = 18;
const BPF_LD_IMM64: u8 = 0x18;
const BPF_PSEUDO_MAP_IDX: u8 = 5;
const BPF_PSEUDO_MAP_IDX_VALUE: u8 = 6;
const BPF_MAP_TYPE_ARRAY: u32 = 2;
/// Of Documentation/bpf/llvm_reloc.rst: an instruction that loads an address.
const R_BPF_64_64: u32 = 1;

/// Section, type and attachment (`BPF_CGROUP_…`) of programs.
const PROGRAMS: [(&str, u32, u32); 13] = [
    ("sockops", BPF_PROG_TYPE_SOCK_OPS, 3),
    ("cgroup_skb/egress", BPF_PROG_TYPE_CGROUP_SKB, 1),
    ("cgroup/bind4", BPF_PROG_TYPE_CGROUP_SOCK_ADDR, 8),
    ("cgroup/bind6", BPF_PROG_TYPE_CGROUP_SOCK_ADDR, 9),
    ("cgroup/connect4", BPF_PROG_TYPE_CGROUP_SOCK_ADDR, 10),
    ("cgroup/connect6", BPF_PROG_TYPE_CGROUP_SOCK_ADDR, 11),
    ("cgroup/sendmsg4", BPF_PROG_TYPE_CGROUP_SOCK_ADDR, 14),
    ("cgroup/sendmsg6", BPF_PROG_TYPE_CGROUP_SOCK_ADDR, 15),
    ("cgroup/recvmsg4", BPF_PROG_TYPE_CGROUP_SOCK_ADDR, 19),
    ("cgroup/recvmsg6", BPF_PROG_TYPE_CGROUP_SOCK_ADDR, 20),
    ("cgroup/getpeername4", BPF_PROG_TYPE_CGROUP_SOCK_ADDR, 29),
    ("cgroup/getpeername6", BPF_PROG_TYPE_CGROUP_SOCK_ADDR, 30),
    ("cgroup/sock_release", BPF_PROG_TYPE_CGROUP_SOCK, 34),
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={SOURCE}");
    println!("cargo::rerun-if-changed=build.rs");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let mut rust = String::new();
    for (name, options) in [
        ("TSI", &[][..]),
        ("TSI_RESOLVERS", &["-DWITH_RESOLVERS"]),
        ("TSI_LISTENERS", &["-DWITH_RESOLVERS", "-DWITH_LISTENERS"]),
        ("TSI_ALL", &["-DWITH_RESOLVERS", "-DWITH_CLIENTS"]),
        ("TSI_CLIENTS", &["-DWITH_CLIENTS", "-DHAS_OWN_NETWORK=true"]),
    ] {
        let object = out.join(format!("{name}.o"));
        compile(&object, options)?;
        write_definition(&mut rust, name, &fs::read(object)?)
            .map_err(|error| format!("{SOURCE} as {name}: {error}"))?;
    }
    fs::write(out.join("tsi.rs"), rust)?;
    Ok(())
}

fn compile(object: &Path, options: &[&str]) -> Result<(), Box<dyn Error>> {
    // Debian's headers of the kernel's own types are below the architecture's directory. No debug
    // information: the kernel has no BTF to match.
    let status = Command::new("clang")
        .args(["-target", "bpf", "-mcpu=v3", "-O2", "-Wall", "-Wextra", "-Werror"])
        .args(options)
        .args(["-I", "/usr/include/x86_64-linux-gnu", "-c", SOURCE, "-o"])
        .arg(object)
        .status()
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => "clang is missing; run 'make tools'".into(),
            _ => format!("run clang: {error}"),
        })?;
    if !status.success() {
        return Err(format!(
            "clang could not compile {SOURCE}; its message is above (headers missing? run 'make tools')"
        )
        .into());
    }
    Ok(())
}

/// Writes a static of the object's maps and programs.
fn write_definition(rust: &mut String, name: &str, elf: &[u8]) -> Result<(), Box<dyn Error>> {
    let elf = ElfFile64::<object::Endianness>::parse(elf)?;
    let section = |name| elf.section_by_name(name).ok_or(format!("there is no section {name}"));
    let license = str::from_utf8(section("license")?.data()?)?.trim_end_matches('\0').to_owned();

    writeln!(rust, "static {name}: ObjectDefinition = ObjectDefinition {{ license: c{license:?},")?;
    // `struct map_def`, each at the address of its symbol.
    let definitions = section("maps")?;
    let mut maps: Vec<_> = elf
        .symbols()
        .filter(|symbol| symbol.section_index() == Some(definitions.index()) && symbol.size() != 0)
        .collect();
    maps.sort_by_key(ObjectSymbol::address);
    writeln!(rust, "maps: &[")?;
    for map in &maps {
        let bytes = definitions.data_range(map.address(), map.size())?.unwrap_or_default();
        let words: Vec<u32> =
            bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect();
        let &[kind, key_len, value_len, max_entries, flags] = &words[..] else {
            return Err(format!("the map {:?} is no struct map_def", map.name()).into());
        };
        let name = map.name()?;
        writeln!(
            rust,
            "MapDefinition {{ name: {name:?}, kind: {kind}, key_len: {key_len}, value_len: {value_len}, \
             max_entries: {max_entries}, flags: {flags} }},"
        )?;
    }
    // Variables, all in the one value of a map of their own, behind the others.
    let variables = elf.section_by_name(".bss").filter(|section| section.size() != 0);
    if let Some(variables) = &variables {
        writeln!(
            rust,
            "MapDefinition {{ name: \"variables\", kind: {BPF_MAP_TYPE_ARRAY}, key_len: 4, value_len: {}, \
             max_entries: 1, flags: 0 }},",
            variables.size()
        )?;
    }
    writeln!(rust, "], programs: &[")?;
    for section in elf.sections().filter(|section| section.kind() == SectionKind::Text) {
        if section.size() == 0 {
            continue;
        }
        let section_name = section.name()?;
        let (_, kind, attach_type) = PROGRAMS
            .into_iter()
            .find(|(name, ..)| *name == section_name)
            .ok_or(format!("a program's section has the unknown name {section_name}"))?;
        let program = elf
            .symbols()
            .find(|symbol| symbol.is_global() && symbol.section_index() == Some(section.index()))
            .ok_or(format!("there is no program in the section {section_name}"))?;
        if (program.address(), program.size()) != (0, section.size()) {
            return Err(format!("the section {section_name} has more than one program").into());
        }
        let mut code = section.data()?.to_vec();
        let mut used = Vec::new();
        for (offset, relocation) in section.relocations() {
            let RelocationTarget::Symbol(symbol) = relocation.target() else {
                return Err(format!("{section_name}: a relocation without a symbol").into());
            };
            let symbol = elf.symbol_by_index(symbol)?;
            let section_of_variables = variables.as_ref().map(ObjectSection::index);
            let (index, pseudo) = match maps.iter().position(|map| map.index() == symbol.index()) {
                Some(index) => (index, BPF_PSEUDO_MAP_IDX),
                None if section_of_variables
                    .is_some_and(|its| symbol.section_index() == Some(its)) =>
                {
                    (maps.len(), BPF_PSEUDO_MAP_IDX_VALUE)
                }
                None => return Err(format!("{section_name}: neither a map nor a variable").into()),
            };
            // Two of struct bpf_insn: the code; the two registers; a 16-bit offset; a 32-bit immediate, which is to
            // be the map, and in the second the place in its value.
            let first = usize::try_from(offset)?;
            let (first, second) = code[first..first + 16].split_at_mut(8);
            if first[0] != BPF_LD_IMM64
                || first[4..] != [0; 4]
                || relocation.flags() != (RelocationFlags::Elf { r_type: R_BPF_64_64 })
            {
                return Err(
                    format!("{section_name}: no plain address of {:?}", symbol.name()).into()
                );
            }
            first[1] |= pseudo << 4;
            first[4..].copy_from_slice(&u32::try_from(index)?.to_le_bytes());
            if pseudo == BPF_PSEUDO_MAP_IDX_VALUE {
                second[4..].copy_from_slice(&u32::try_from(symbol.address())?.to_le_bytes());
            }
            used.push(index);
        }
        used.sort_unstable();
        used.dedup();
        write!(
            rust,
            "ProgramDefinition {{ name: {:?}, kind: {kind}, attach_type: {attach_type}, maps: &{used:?}, instructions: &[",
            program.name()?
        )?;
        for instruction in code.as_chunks().0 {
            write!(rust, "{:#x},", u64::from_le_bytes(*instruction))?;
        }
        writeln!(rust, "] }},")?;
    }
    writeln!(rust, "] }};")?;
    Ok(())
}
