//! Build script: makes the guest's three files, which [`image`](../src/plan/image.rs) embeds, and the
//! filters of [`seccomp`](../src/confine/seccomp.rs). The kernel comes from `kernel.sh` (cached per machine)
//! and is stripped of pages that hold nothing; the initramfs holds the agent, and an archive of its own the
//! attestation server, each built here as its own static program; the filters are compiled from `seccomp/*.json`.
//! And it says how mote itself is linked: what starts use of its text together (`start-order`).

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{env, fs};

use seccompiler::{BpfProgram, TargetArch, sock_filter};
use serde_json::Value;

#[path = "../src/cpio.rs"]
mod cpio;
#[allow(dead_code, reason = "the program uses what this does not")]
#[path = "../src/layout.rs"]
mod layout;

const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() -> Result<(), Box<dyn Error>> {
    for input in [
        "guest",
        "Cargo.lock",
        "src/cpio.rs",
        "src/layout.rs",
        "resources/build.rs",
        "resources/kernel.sh",
        "resources/kernel.config",
        "resources/kernel",
        "resources/seccomp",
        "resources/start-order",
    ] {
        println!("cargo::rerun-if-changed={input}");
    }
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(env::var("OUT_DIR")?);

    let kernel = out.join("vmlinux");
    let cold_text = out.join("cold-text");
    let packed = packed_kernel(&fs::read(path_from(&root, "kernel.sh")?)?)?;
    fs::write(&kernel, packed.elf)?;
    fs::write(&cold_text, packed.cold_text)?;
    println!("cargo::rustc-env=MOTE_BUILT_KERNEL={}", kernel.display());
    println!("cargo::rustc-env=MOTE_BUILT_COLD_TEXT={}", cold_text.display());

    let initramfs = out.join("initramfs.cpio");
    fs::write(&initramfs, initramfs_of(&build_guest(&root, &out, "mote-agent")?))?;
    println!("cargo::rustc-env=MOTE_BUILT_INITRAMFS={}", initramfs.display());

    let attest = out.join("attest.cpio");
    fs::write(&attest, attest_archive_of(&build_guest(&root, &out, "mote-attest")?))?;
    println!("cargo::rustc-env=MOTE_BUILT_ATTEST={}", attest.display());

    compile_filters(&root.join("resources/seccomp"), &out)?;
    println!("cargo::rustc-env=MOTE_BUILT_FILTERS={}", out.display());

    let script = out.join("start-order.ld");
    fs::write(&script, in_order(&fs::read_to_string(root.join("resources/start-order"))?))?;
    println!("cargo::rustc-link-arg-bin=mote=-Wl,-T,{}", script.display());
    Ok(())
}

/// A linker script that puts these sections of the text next to each other, in front of all others: the kernel maps 64 KiB of
/// a file at a page fault, and what starts use is a quarter of mote's text.
fn in_order(sections: &str) -> String {
    let sections: Vec<_> = sections.lines().filter(|line| !line.starts_with('#')).collect();
    format!("SECTIONS {{ .text.start : {{\n{}\n}} }}\nINSERT BEFORE .text;\n", sections.join("\n"))
}

/// Compiles the system call filters, each to a file of `struct sock_filter`. A rule without a reason
/// does not build.
fn compile_filters(sources: &Path, out: &Path) -> Result<(), Box<dyn Error>> {
    let mut filters = serde_json::Map::new();
    for name in [
        "main.json",
        "vcpu.json",
        "output.json",
        "input.json",
        "logs.json",
        "switch.json",
        "virtiofsd.json",
        "maker.json",
    ] {
        let parsed: Value = serde_json::from_slice(&fs::read(sources.join(name))?)
            .map_err(|error| format!("{name}: {error}"))?;
        filters.extend(parsed.as_object().ok_or("a filter file holds an object")?.clone());
    }
    for (name, filter) in &filters {
        let rules = filter["filter"].as_array().ok_or("a filter has rules")?;
        for rule in rules {
            let reason = rule["comment"].as_str().unwrap_or_default();
            if reason.is_empty() {
                return Err(
                    format!("seccomp filter {name}: {} has no reason", rule["syscall"]).into()
                );
            }
        }
    }
    // What a main thread may do beside its usual calls, in boxes that need it (`NetworkAccess`).
    let (Some(outgoing), Some(answers)) = (filters.remove("outgoing"), filters.remove("answers"))
    else {
        return Err("main.json has no filters 'outgoing' and 'answers'".into());
    };
    // What several virtiofsd may do beside, until each is confined.
    let starter = filters.remove("starter").ok_or("virtiofsd.json has no filter 'starter'")?;
    let virtiofsd = filters.get("virtiofsd").ok_or("virtiofsd.json has no filter 'virtiofsd'")?;
    let started = later_program(virtiofsd, &starter)?;
    let mut add = |to: &str, more: &Value, name: &str| -> Result<(), Box<dyn Error>> {
        let mut both = filters.get(to).ok_or("there is no filter to add to")?.clone();
        let more = more["filter"].as_array().cloned().unwrap_or_default();
        both["filter"].as_array_mut().ok_or("a filter has rules")?.extend(more);
        filters.insert(name.into(), both);
        Ok(())
    };
    add("main", &outgoing, "main-outgoing")?;
    add("main", &answers, "main-answers")?;
    add("main-outgoing", &answers, "main-outgoing-answers")?;
    add("virtiofsd", &starter, "virtiofsd-starter")?;

    let programs = filters.iter().map(|(name, filter)| Ok((&**name, searching_program(filter)?)));
    let programs: Result<Vec<_>, Box<dyn Error>> = programs.collect();
    for (name, program) in programs?.into_iter().chain([("virtiofsd-started", started)]) {
        let bytes: Vec<u8> = shortened(&program)
            .map_err(|error| format!("seccomp filter {name}: {error}"))?
            .iter()
            .flat_map(|i| {
                let [c0, c1] = i.code.to_le_bytes();
                let [k0, k1, k2, k3] = i.k.to_le_bytes();
                [c0, c1, i.jt, i.jf, k0, k1, k2, k3]
            })
            .collect();
        fs::write(out.join(format!("{name}.bpf")), bytes)?;
    }
    Ok(())
}

/// What a filter does when a call has this number.
struct Leaf {
    number: u32,
    /// Seccompiler's instructions for the call's arguments, of which the last is for what is not allowed; empty if it
    /// is allowed whatever they are.
    body: BpfProgram,
}

/// A filter that looks the call's number up in a search tree. What seccompiler makes compares it with one after the
/// other, and the kernel walks that for each number there is when the filter is put in place. It also translates all
/// of it then, so it is short.
fn searching_program(filter: &Value) -> Result<BpfProgram, Box<dyn Error>> {
    let Compiled { head, leaves, verdicts } = compiled(filter)?;
    Ok([head, search(&leaves, 0..CALLS, &verdicts)?].concat())
}

/// A filter for a thread that has the one of `for_all` and `before` together. It permits everything but the calls of
/// `before`, and of these what `for_all` permits, so that both filters permit what `for_all` does.
fn later_program(for_all: &Value, before: &Value) -> Result<BpfProgram, Box<dyn Error>> {
    let Compiled { head, leaves, verdicts } = compiled(before)?;
    let [allowed, refused] = &verdicts[..] else { return Err("there are two verdicts".into()) };
    let mut permitted = compiled(for_all)?.leaves;
    let mut exceptions = Vec::new();
    for Leaf { number, .. } in leaves {
        let known = permitted.iter().position(|leaf| leaf.number == number);
        let body = known.map_or_else(|| vec![refused.clone()], |at| permitted.swap_remove(at).body);
        if !body.is_empty() {
            exceptions.push(Leaf { number, body });
        }
    }
    Ok([head, except(&exceptions, allowed)?].concat())
}

/// The tree for these calls, of which there is at least one; others are allowed.
fn except(leaves: &[Leaf], allowed: &sock_filter) -> Result<BpfProgram, Box<dyn Error>> {
    if let [Leaf { number, body }] = leaves {
        let mut leaf = vec![jump(JUMP_IF_EQUAL, *number, 0, u8::try_from(body.len())?)];
        leaf.extend_from_slice(body);
        leaf.push(allowed.clone());
        return Ok(leaf);
    }
    let (low, high) = leaves.split_at(leaves.len() / 2);
    halves(except(low, allowed)?, high[0].number, except(high, allowed)?)
}

/// A filter's parts.
struct Compiled {
    /// Checks the architecture and loads the call's number.
    head: BpfProgram,
    /// In the order of their numbers.
    leaves: Vec<Leaf>,
    /// What is done with a call that is allowed, and with others.
    verdicts: BpfProgram,
}

fn compiled(filter: &Value) -> Result<Compiled, Box<dyn Error>> {
    let rules = filter["filter"].as_array().ok_or("a filter has rules")?;
    let mut calls = BTreeMap::<&str, Vec<&Value>>::new();
    for rule in rules {
        let call = rule["syscall"].as_str().ok_or("a rule names a system call")?;
        calls.entry(call).or_default().push(rule);
    }
    // Each call alone: its number, and the instructions for when it is that. Those before check the architecture and
    // load the number, and are the same for all.
    let mut head = BpfProgram::new();
    let mut leaves = Vec::new();
    let mut verdicts = BpfProgram::new();
    for rules in calls.into_values() {
        let mut alone = filter.clone();
        alone["filter"] = rules.iter().copied().cloned().collect();
        let json = serde_json::to_vec(&serde_json::json!({ "alone": alone }))?;
        let mut program = seccompiler::compile_from_json(&json[..], TargetArch::x86_64)?;
        let mut program = program.remove("alone").ok_or("seccompiler compiles the filter")?;
        let compares = |i: &sock_filter| i.code == JUMP_IF_EQUAL && i.k != AUDIT_ARCH_X86_64;
        let at = program.iter().position(compares).ok_or("a filter compares the call's number")?;
        let mut body = program.split_off(at + 1);
        let number = program.pop().ok_or("the comparison")?.k;
        let mut returns = body.iter().filter(|i| i.code == RETURN);
        let allowed = returns.next().ok_or("a filter allows the call")?.clone();
        let refused = returns.next_back().ok_or("a filter refuses what it does not allow")?.clone();
        verdicts = vec![allowed, refused];
        head = program;
        if rules.iter().any(|rule| rule.get("args").is_none()) {
            body.clear();
        }
        leaves.push(Leaf { number, body });
    }
    leaves.sort_unstable_by_key(|leaf| leaf.number);
    Ok(Compiled { head, leaves, verdicts })
}

/// The tree for these calls, of which there is at least one, among all these `numbers`, which it halves: most are those of
/// calls that are refused.
fn search(
    leaves: &[Leaf],
    numbers: Range<u32>,
    verdicts: &[sock_filter],
) -> Result<BpfProgram, Box<dyn Error>> {
    if let [Leaf { number, body }] = leaves {
        let body = if body.is_empty() { verdicts } else { body };
        let last = u8::try_from(body.len() - 1)?;
        let mut leaf = vec![jump(JUMP_IF_EQUAL, *number, 0, last)];
        leaf.extend_from_slice(body);
        return Ok(leaf);
    }
    let middle = numbers.start.midpoint(numbers.end);
    let in_low = leaves.partition_point(|leaf| leaf.number < middle);
    let (low, high) = leaves.split_at(in_low.clamp(1, leaves.len() - 1));
    let from = high[0].number;
    let low_code = search(low, numbers.start..from, verdicts)?;
    halves(low_code, from, search(high, from..numbers.end, verdicts)?)
}

/// One program for numbers below a number, and one for those from it on.
fn halves(
    low_code: BpfProgram,
    from: u32,
    high_code: BpfProgram,
) -> Result<BpfProgram, Box<dyn Error>> {
    let mut code = match u8::try_from(low_code.len()) {
        Ok(skipped) => vec![jump(JUMP_IF_AT_LEAST, from, skipped, 0)],
        Err(_) => vec![
            jump(JUMP_IF_AT_LEAST, from, 0, 1),
            jump(JUMP, u32::try_from(low_code.len())?, 0, 0),
        ],
    };
    code.extend(low_code);
    code.extend(high_code);
    Ok(code)
}

/// The same program with each instruction that ends in the same way, verdicts above all, only once: the kernel translates
/// each at every start, and walks them for each number that there is.
fn shortened(program: &[sock_filter]) -> Result<BpfProgram, Box<dyn Error>> {
    // What differs, last ones first: an instruction, and where it goes on, if it holds and if it does not.
    type Step = (u16, u32, Option<usize>, Option<usize>);
    let mut steps = Vec::<Step>::new();
    let mut step_of = vec![0; program.len()];
    for (at, i) in program.iter().enumerate().rev() {
        let to = |skipped: u32| step_of.get(at + 1 + skipped as usize).copied();
        let step = match i.code {
            RETURN => (i.code, i.k, None, None),
            JUMP => {
                step_of[at] = to(i.k).ok_or("it jumps out of itself")?;
                continue;
            }
            code if code & CLASS == JUMP => {
                let (holds, else_) = (to(i.jt.into()), to(i.jf.into()));
                if holds == else_ {
                    step_of[at] = holds.ok_or("it jumps out of itself")?;
                    continue;
                }
                (code, i.k, holds, else_)
            }
            code => (code, i.k, to(0), None),
        };
        step_of[at] = steps.iter().position(|known| *known == step).unwrap_or(steps.len());
        if step_of[at] == steps.len() {
            steps.push(step);
        }
    }

    // Those that are reached, from the last to the first: each can go on with what is behind it.
    let mut reached = BTreeSet::new();
    let mut found = vec![step_of[0]];
    while let Some(step) = found.pop() {
        if reached.insert(step) {
            found.extend([steps[step].2, steps[step].3].into_iter().flatten());
        }
    }
    let mut reversed = BpfProgram::new();
    let mut places = vec![0; steps.len()];
    for index in reached {
        let (code, k, holds, else_) = steps[index];
        // How far it can go by itself: conditional jumps are short, and one more jump may be put in between.
        let far = if else_.is_some() { usize::from(u8::MAX) - 1 } else { 0 };
        let mut next = Vec::new();
        for step in [holds, else_].into_iter().flatten() {
            let distance = reversed.len() - 1 - places[step];
            if distance > far {
                reversed.push(jump(JUMP, u32::try_from(distance)?, 0, 0));
                next.push(reversed.len() - 1);
            } else {
                next.push(places[step]);
            }
        }
        let skipped = |place: &usize| u8::try_from(reversed.len() - 1 - place);
        let (jt, jf) = match &next[..] {
            [holds, else_] => (skipped(holds)?, skipped(else_)?),
            _ => (0, 0),
        };
        reversed.push(jump(code, k, jt, jf));
        places[index] = reversed.len() - 1;
    }
    reversed.reverse();
    if let Some(number) = decided_otherwise(program, &reversed) {
        return Err(format!("call {number} is not decided as it was").into());
    }
    Ok(reversed)
}

/// How many system calls x86_64 has, about (arch/x86/entry/syscalls/syscall_64.tbl).
const CALLS: u32 = 470;

/// A call about which two filters decide differently, of all calls with arguments that come from the first one's constants,
/// by turns and next to them.
fn decided_otherwise(one: &[sock_filter], other: &[sock_filter]) -> Option<u32> {
    let near = |k: u32| [k.wrapping_sub(1), k, k.wrapping_add(1)].map(u64::from);
    let words = one.iter().flat_map(|i| near(i.k));
    let values: Vec<_> = words.flat_map(|word| [word, word, word << 32 | word]).collect();
    // Knuth's linear congruential generator: the same numbers in each build.
    let mut state = 1u64;
    let mut value = || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        values[(state >> 33) as usize % values.len()]
    };
    (0..2 * CALLS).find(|number| {
        (0..64).any(|turn| {
            let architecture = AUDIT_ARCH_X86_64 ^ u32::from(turn == 0);
            let arguments = std::array::from_fn(|_| value());
            let decide = |filter| verdict(filter, [architecture, *number], arguments);
            decide(one) != decide(other)
        })
    })
}

/// What a filter decides about a call (linux/seccomp.h, `struct seccomp_data`).
fn verdict(
    program: &[sock_filter],
    [architecture, number]: [u32; 2],
    arguments: [u64; 6],
) -> Option<u32> {
    let (mut at, mut accumulator) = (0, 0);
    loop {
        let i = program.get(at)?;
        let skipped = |holds: bool| usize::from(if holds { i.jt } else { i.jf });
        at += 1;
        match i.code {
            LOAD => {
                accumulator = match i.k {
                    0 => number,
                    4 => architecture,
                    offset => {
                        let argument = *arguments.get((offset as usize).checked_sub(16)? / 8)?;
                        (if offset % 8 == 0 { argument } else { argument >> 32 }) as u32
                    }
                }
            }
            AND => accumulator &= i.k,
            JUMP => at += i.k as usize,
            JUMP_IF_EQUAL => at += skipped(accumulator == i.k),
            JUMP_IF_ABOVE => at += skipped(accumulator > i.k),
            JUMP_IF_AT_LEAST => at += skipped(accumulator >= i.k),
            RETURN => return Some(i.k),
            _ => return None,
        }
    }
}

/// Of linux/bpf_common.h and linux/audit.h.
const CLASS: u16 = 0x07;
const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
const JUMP_IF_ABOVE: u16 = 0x25;
const JUMP: u16 = 0x05;
const RETURN: u16 = 0x06;
const JUMP_IF_EQUAL: u16 = 0x15;
const JUMP_IF_AT_LEAST: u16 = 0x35;
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;

fn jump(code: u16, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

/// The path that a script in `resources` prints, of what it has made.
fn path_from(root: &Path, script: &str) -> Result<String, Box<dyn Error>> {
    let output = Command::new("bash")
        .arg(root.join("resources").join(script))
        .stderr(Stdio::inherit())
        .output()?;
    if !output.status.success() {
        return Err(format!("resources/{script} failed; its message is above").into());
    }
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

/// A kernel in two parts.
struct PackedKernel {
    /// A vmlinux without the other part.
    elf: Vec<u8>,
    /// What is in [`layout::COLD_TEXT`].
    cold_text: Vec<u8>,
}

/// A kernel without the pages that hold nothing: zeros, which guest memory has already, and the filling behind code
/// (`int3`, the end of .text in arch/x86/kernel/vmlinux.lds.S), where nothing jumps to. Each run of other pages becomes a
/// segment of its own.
fn packed_kernel(elf: &[u8]) -> Result<PackedKernel, Box<dyn Error>> {
    // Elf64_Ehdr and Elf64_Phdr (elf(5)): offsets of the fields used here.
    const HEADER_LEN: usize = 64;
    const E_PHOFF: usize = 32;
    const E_SHOFF: usize = 40;
    const E_PHNUM: usize = 56;
    const E_SHNUM: usize = 60;
    const PHDR_LEN: usize = 56;
    const P_OFFSET: usize = 8;
    const P_PADDR: usize = 24;
    const P_FILESZ: usize = 32;
    const P_MEMSZ: usize = 40;
    const PT_LOAD: u32 = 1;
    const PAGE: usize = 4096;
    const INT3: u8 = 0xcc;
    let u64_at = |at: usize| -> Result<usize, Box<dyn Error>> {
        let bytes = elf.get(at..at + 8).ok_or("the kernel image is cut short")?;
        Ok(u64::from_le_bytes(bytes.try_into()?) as usize)
    };

    let cold = layout::COLD_TEXT.start as usize..layout::COLD_TEXT.end as usize;
    let mut cold_text = vec![INT3; cold.len()];
    // (physical address, file range, size in memory) of each piece.
    let mut pieces = Vec::new();
    let count = usize::from(u16::from_le_bytes([elf[E_PHNUM], elf[E_PHNUM + 1]]));
    for index in 0..count {
        let phdr = u64_at(E_PHOFF)? + index * PHDR_LEN;
        if elf[phdr..phdr + 4] != PT_LOAD.to_le_bytes() {
            continue;
        }
        let (offset, paddr) = (u64_at(phdr + P_OFFSET)?, u64_at(phdr + P_PADDR)?);
        let (file_len, memory_len) = (u64_at(phdr + P_FILESZ)?, u64_at(phdr + P_MEMSZ)?);
        let data = elf.get(offset..offset + file_len).ok_or("the kernel image is cut short")?;
        let mut runs: Vec<std::ops::Range<usize>> = Vec::new();
        for (page, bytes) in data.chunks(PAGE).enumerate() {
            let start = page * PAGE;
            if let Some(at) = (paddr + start).checked_sub(cold.start)
                && let Some(place) = cold_text.get_mut(at..at + bytes.len())
            {
                place.copy_from_slice(bytes);
                continue;
            }
            if [0, INT3].iter().any(|filling| bytes.iter().all(|byte| byte == filling)) {
                continue;
            }
            match runs.last_mut() {
                Some(run) if run.end == start => run.end = start + bytes.len(),
                _ => runs.push(start..start + bytes.len()),
            }
        }
        let last = runs.len().saturating_sub(1);
        for (index, run) in runs.into_iter().enumerate() {
            // The last piece keeps the segment's end, and with it the kernel's end in memory.
            let memory = if index == last { memory_len - run.start } else { run.len() };
            pieces.push((paddr + run.start, offset + run.start..offset + run.end, memory));
        }
    }

    let mut packed = elf[..HEADER_LEN].to_vec();
    packed[E_PHOFF..E_PHOFF + 8].copy_from_slice(&(HEADER_LEN as u64).to_le_bytes());
    packed[E_SHOFF..E_SHOFF + 8].fill(0);
    packed[E_SHNUM..E_SHNUM + 4].fill(0);
    packed[E_PHNUM..E_PHNUM + 2].copy_from_slice(&u16::try_from(pieces.len())?.to_le_bytes());
    let mut offset = (HEADER_LEN + pieces.len() * PHDR_LEN).next_multiple_of(PAGE);
    for (paddr, range, memory) in &pieces {
        let mut phdr = [0; PHDR_LEN];
        phdr[..4].copy_from_slice(&PT_LOAD.to_le_bytes());
        for (at, value) in
            [(P_OFFSET, offset), (P_PADDR, *paddr), (P_FILESZ, range.len()), (P_MEMSZ, *memory)]
        {
            phdr[at..at + 8].copy_from_slice(&(value as u64).to_le_bytes());
        }
        packed.extend(phdr);
        offset += range.len().next_multiple_of(PAGE);
    }
    for (_, range, _) in pieces {
        packed.resize(packed.len().next_multiple_of(PAGE), 0);
        packed.extend(&elf[range]);
    }
    Ok(PackedKernel { elf: packed, cold_text })
}

/// Builds a program of the guest's, and returns it. Each by a call of its own: what one needs of a crate would
/// otherwise be in the other, too.
fn build_guest(root: &Path, out: &Path, package: &str) -> Result<Vec<u8>, Box<dyn Error>> {
    // A directory of its own: the outer cargo holds the lock of the usual one. All profiles share it.
    let target_dir = out
        .ancestors()
        .find(|dir| dir.file_name().is_some_and(|name| name == TARGET))
        .and_then(Path::parent)
        .unwrap_or(out)
        .join("agent");
    let cargo_home = env::var("CARGO_HOME").unwrap_or_default();
    // Not position-independent: PID 1 of a private machine gains nothing from relocating itself. Without the index for
    // unwinding: a panic ends the program.
    // The remapped paths make the bytes the same in every checkout.
    let mut flags = vec![
        "-Ctarget-feature=+crt-static".to_owned(),
        "-Crelocation-model=static".to_owned(),
        "-Clink-arg=-Wl,--no-eh-frame-hdr".to_owned(),
        format!("--remap-path-prefix={}=/mote", root.display()),
    ];
    if !cargo_home.is_empty() {
        flags.push(format!("--remap-path-prefix={cargo_home}=/cargo"));
    }
    let status = Command::new(env::var("CARGO")?)
        .current_dir(root)
        .args(["build", "--quiet", "--locked", "--package", package, "--profile", "release"])
        .args(["--config", "profile.release.opt-level=\"z\"", "--target", TARGET])
        .arg("--target-dir")
        .arg(&target_dir)
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .status()?;
    if !status.success() {
        return Err(format!("building {package} failed; cargo's message is above").into());
    }
    Ok(fs::read(target_dir.join(TARGET).join("release").join(package))?)
}

/// Unpacked behind the agent's, in boxes that have the server.
fn attest_archive_of(program: &[u8]) -> Vec<u8> {
    let mut archive = cpio::Archive::new();
    archive.directory("mote", 0o700);
    archive.file("mote/attest", 0o500, program);
    archive.finish()
}

fn initramfs_of(agent: &[u8]) -> Vec<u8> {
    let mut archive = cpio::Archive::of_file("init", 0o755, agent);
    archive.directory("dev", 0o755);
    // The kernel opens it as the agent's standard streams, before anything is mounted.
    archive.character_device("dev/console", 0o600, (5, 1));
    archive.finish()
}
