//! Cgroups that systemd makes: scopes (systemd.scope(5)), by calls over D-Bus (org.freedesktop.systemd1(5)). systemd's
//! own client makes the calls, busctl(1), which is wherever systemd is.

use std::io::{PipeReader, PipeWriter, Read, pipe};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::sys::{container, process};

/// How long systemd may take to make a scope.
const START_LIMIT: Duration = Duration::from_secs(10);
/// Time between two looks at that.
const STEP: Duration = Duration::from_millis(1);
/// What systemd takes for no limit.
const NONE: u64 = u64::MAX;
/// The longest name of a unit (systemd's `UNIT_NAME_MAX`).
const MAX_UNIT: usize = 255;
/// Annotations whose rest is the name of a unit's property, as runc and crun have them.
pub const PROPERTY_ANNOTATION: &str = "org.systemd.property.";

/// A scope, as an engine names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scope {
    slice: String,
    unit: String,
}

/// A property of a unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Property {
    name: String,
    /// Its type and its value, as busctl(1) takes them.
    value: Vec<String>,
}

impl Property {
    fn new(name: &str, kind: &str, value: impl ToString) -> Property {
        Property { name: name.into(), value: vec![kind.into(), value.to_string()] }
    }

    /// A property by an annotation: its name, and its value as GLib writes variants, of which plain ones are known.
    ///
    /// # Errors
    /// It is none; the message goes on behind the annotation's name.
    pub fn of_annotation(name: &str, value: &str) -> Result<Property, String> {
        if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            return Err("names no property of a unit".into());
        }
        let quoted = |quote| value.strip_prefix(quote)?.strip_suffix(quote);
        if let Some(text) = quoted('\'').or(quoted('"')) {
            return Ok(Property::new(name, "s", text));
        }
        let (kind, number) = match value.split_once(' ') {
            None if ["true", "false"].contains(&value) => {
                return Ok(Property::new(name, "b", value));
            }
            None => ("i", value),
            Some(("byte", number)) => ("y", number),
            Some(("int32", number)) => ("i", number),
            Some(("uint32", number)) => ("u", number),
            Some(("int64", number)) => ("x", number),
            Some(("uint64", number)) => ("t", number),
            Some(_) => ("", ""),
        };
        match number.trim().parse::<i128>() {
            Ok(number) => Ok(Property::new(name, kind, number)),
            Err(_) => Err(format!(
                "is \"{value}\", must be true, false, a number such as 5 or uint64 5, or a text in quotes"
            )),
        }
    }
}

impl Scope {
    /// The scope that `SLICE:PREFIX:NAME` stands for; nothing, if the text has another form.
    ///
    /// # Errors
    /// It is of that form, and cannot be a scope; the message goes on behind the text.
    pub fn parse(text: &str) -> Option<Result<Scope, String>> {
        let mut parts = text.split(':');
        let (Some(slice), Some(prefix), Some(name), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return None;
        };
        if text.contains('/') {
            return None;
        }
        let default = if container::is_hosts_root() { "system.slice" } else { "user.slice" };
        let slice = if slice.is_empty() { default } else { slice };
        let hyphen = if prefix.is_empty() { "" } else { "-" };
        let unit = format!("{prefix}{hyphen}{name}.scope");
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b":-_.\\@".contains(&byte);
        let is_unit = |unit: &str| unit.len() <= MAX_UNIT && unit.bytes().all(is_plain);
        Some(if !slice.ends_with(".slice") || !is_unit(slice) {
            Err(format!("whose \"{slice}\" is no slice of systemd's, such as machine.slice"))
        } else if name.is_empty() || name.ends_with(".slice") || !is_unit(&unit) {
            Err(format!("whose \"{unit}\" is no name of a scope"))
        } else {
            Ok(Scope { slice: slice.into(), unit })
        })
    }

    /// The unit's name.
    pub fn unit(&self) -> &str {
        &self.unit
    }

    /// Has systemd make the scope, with these properties, and with what these files of a cgroup say.
    ///
    /// # Errors
    /// There is no systemd, it refuses, or there is such a unit.
    pub fn start(
        &self,
        description: &str,
        further: &[Property],
        files: &[(String, String)],
    ) -> Result<Member> {
        let mut member = Member::start()?;
        let mut properties = vec![
            Property::new("Description", "s", description),
            Property::new("Slice", "s", &self.slice),
            // What is below is not systemd's, and nor are files that have no property.
            Property::new("Delegate", "b", true),
            // Containers end by their engine, before it ends.
            Property::new("DefaultDependencies", "b", false),
            // One that has failed (out of memory, say) leaves no unit either.
            Property::new("CollectMode", "s", "inactive-or-failed"),
            Property {
                name: "PIDs".into(),
                value: ["au", "1", &member.pid.to_string()].map(str::to_owned).into(),
            },
        ];
        for controller in ["CPU", "IO", "Memory", "Tasks"] {
            properties.push(Property::new(&format!("{controller}Accounting"), "b", true));
        }
        properties.extend(properties_of(files));
        properties.extend(further.iter().cloned());
        let doing = || format!("have systemd make the scope {} for the container", self.unit);
        let mut arguments = vec![self.unit.clone(), "fail".into()];
        arguments.extend(words_of(&properties));
        arguments.push("0".into());
        call("StartTransientUnit", "ssa(sv)a(sa(sv))", &arguments).with_context(doing)?;
        let deadline = Instant::now() + START_LIMIT;
        loop {
            let cgroup = process::cgroup(member.pid).with_context(doing)?;
            if cgroup.file_name().is_some_and(|name| name == self.unit.as_str()) {
                member.cgroup = cgroup;
                return Ok(member);
            }
            ensure!(
                Instant::now() < deadline,
                "systemd did not start the scope {} within {START_LIMIT:?}: see its log (journalctl -u {})",
                self.unit,
                self.unit
            );
            thread::sleep(STEP);
        }
    }
}

/// Tells systemd of new values of a cgroup's files, which it would otherwise write anew as they were.
///
/// # Errors
/// systemd refuses.
pub fn update(unit: &str, files: &[(String, String)]) -> Result<()> {
    let properties = properties_of(files);
    if properties.is_empty() {
        return Ok(());
    }
    let mut arguments = vec![unit.to_owned(), "true".into()];
    arguments.extend(words_of(&properties));
    call("SetUnitProperties", "sba(sv)", &arguments)
        .with_context(|| format!("change the limits of systemd's scope {unit}"))
}

/// Ends a scope in which nothing runs any more. One that is gone is no error, and nothing is lost by one that stays.
pub fn end(unit: &str) {
    let _ = call("StopUnit", "ss", &[unit.to_owned(), "replace".into()]);
}

/// A process that does nothing but be in a scope, which would be gone without one. It ends with this value, and with
/// the process that made it.
#[derive(Debug)]
pub struct Member {
    pid: u32,
    /// Where systemd has put it, from the root of cgroups on.
    pub cgroup: PathBuf,
    stays: Option<PipeWriter>,
}

impl Member {
    fn start() -> Result<Member> {
        let (end, stays) = pipe().context("make a pipe")?;
        let mut stays = Some(stays);
        let pid = container::fork(|| {
            drop(stays.take());
            wait_for(end)
        });
        let pid = pid.context("start a process for systemd's scope")?;
        Ok(Member { pid, cgroup: PathBuf::new(), stays })
    }
}

fn wait_for(mut end: PipeReader) -> u8 {
    let _ = end.read(&mut [0]);
    0
}

impl Drop for Member {
    fn drop(&mut self) {
        drop(self.stays.take());
        let _ = process::wait(self.pid);
    }
}

/// Calls a method of systemd's manager: the host's for its root, the user's own for others.
fn call(method: &str, signature: &str, arguments: &[String]) -> Result<()> {
    const MANAGER: [&str; 3] = [
        "org.freedesktop.systemd1",
        "/org/freedesktop/systemd1",
        "org.freedesktop.systemd1.Manager",
    ];
    let bus = if container::is_hosts_root() { "--system" } else { "--user" };
    let advice =
        "or set cgroup_manager = \"cgroupfs\" (podman), SystemdCgroup = false (containerd)";
    let done = Command::new("busctl")
        .args([bus, "--quiet", "--", "call"])
        .args(MANAGER)
        .args([method, signature])
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("run busctl, systemd's client: install systemd, {advice}"))?;
    if done.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&done.stderr);
    let said = said.trim().trim_start_matches("Call failed: ");
    bail!("busctl {bus} call … {method}: {said} (is systemd there, and its D-Bus? {advice})")
}

/// Properties as words of busctl's: how many, and for each its name, its type and its value.
fn words_of(properties: &[Property]) -> impl Iterator<Item = String> {
    let each = properties
        .iter()
        .flat_map(|property| [vec![property.name.clone()], property.value.clone()].concat());
    [properties.len().to_string()].into_iter().chain(each)
}

/// Properties that stand for files of a cgroup. Those that systemd knows none for are left to whoever writes the
/// files.
fn properties_of(files: &[(String, String)]) -> Vec<Property> {
    let number = |value: &str| value.parse().unwrap_or(NONE);
    let of_file = |(name, value): &(String, String)| match name.as_str() {
        "memory.max" => vec![Property::new("MemoryMax", "t", number(value))],
        "memory.high" => vec![Property::new("MemoryHigh", "t", number(value))],
        "memory.low" => vec![Property::new("MemoryLow", "t", number(value))],
        "memory.min" => vec![Property::new("MemoryMin", "t", number(value))],
        "memory.swap.max" => vec![Property::new("MemorySwapMax", "t", number(value))],
        "pids.max" => vec![Property::new("TasksMax", "t", number(value))],
        "cpu.weight" => vec![Property::new("CPUWeight", "t", number(value))],
        "cpu.max" => cpu_time(value),
        "io.weight" => {
            let weight = value.trim_start_matches("default ");
            vec![Property::new("IOWeight", "t", number(weight))]
        }
        "cpuset.cpus" => bits("AllowedCPUs", value),
        "cpuset.mems" => bits("AllowedMemoryNodes", value),
        _ => Vec::new(),
    };
    files.iter().flat_map(of_file).collect()
}

/// CPU time per second and the period in which it is counted, of a quota per period.
fn cpu_time(value: &str) -> Vec<Property> {
    const SECOND_US: u64 = 1_000_000;
    let (quota, period) = value.split_once(' ').unwrap_or((value, ""));
    let period: u64 = period.parse().unwrap_or(100_000).max(1);
    let per_second = quota.parse::<u64>().map(|quota| quota.saturating_mul(SECOND_US) / period);
    vec![
        Property::new("CPUQuotaPerSecUSec", "t", per_second.unwrap_or(NONE)),
        Property::new("CPUQuotaPeriodUSec", "t", period),
    ]
}

/// A list such as `0-2,7` as a property that has a bit for each, the lowest first. A list that the kernel would not
/// take either is left to it to refuse.
fn bits(name: &str, list: &str) -> Vec<Property> {
    const MOST: usize = 8192;
    let mut bytes = Vec::new();
    for range in list.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (Ok(first), Ok(last)) = (first.trim().parse::<usize>(), last.trim().parse::<usize>())
        else {
            return Vec::new();
        };
        if last >= MOST {
            return Vec::new();
        }
        for number in first..=last {
            let byte = number / 8;
            bytes.resize(bytes.len().max(byte + 1), 0u8);
            bytes[byte] |= 1 << (number % 8);
        }
    }
    let mut value = vec!["ay".to_owned(), bytes.len().to_string()];
    value.extend(bytes.iter().map(u8::to_string));
    vec![Property { name: name.into(), value }]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engines_name_scopes() {
        let scope =
            Scope::parse("machine.slice:libpod:0a1b").expect("a scope").expect("a good one");
        assert_eq!((scope.slice.as_str(), scope.unit()), ("machine.slice", "libpod-0a1b.scope"));
        let scope = Scope::parse("a-b.slice::x").expect("a scope").expect("a good one");
        assert_eq!(scope.unit(), "x.scope");
        assert_eq!(
            (Scope::parse("/a/b"), Scope::parse("a:b"), Scope::parse("/a:b:c")),
            (None, None, None)
        );
        for (text, problem) in [
            ("machine:libpod:x", "no slice"),
            ("m.slice:libpod:", "no name of a scope"),
            ("m.slice:libpod:a b", "no name of a scope"),
            ("m.slice:libpod:x.slice", "no name of a scope"),
        ] {
            let error = Scope::parse(text).expect("a scope").expect_err(text);
            assert!(error.contains(problem), "{text}: {error}");
        }
    }

    #[test]
    fn limits_are_properties() {
        let files = [
            ("memory.max", "202375168"),
            ("memory.swap.max", "max"),
            ("cpu.max", "150000 100000"),
            ("pids.max", "266"),
            ("io.weight", "default 50"),
            ("cpuset.cpus", "0-1,9"),
            ("cpu.idle", "1"),
        ];
        let files = files.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let words: Vec<String> = words_of(&properties_of(&files)).collect();
        assert_eq!(
            words.join(" "),
            "7 MemoryMax t 202375168 MemorySwapMax t 18446744073709551615 CPUQuotaPerSecUSec t 1500000 \
             CPUQuotaPeriodUSec t 100000 TasksMax t 266 IOWeight t 50 AllowedCPUs ay 2 3 2"
        );
        assert_eq!(bits("AllowedCPUs", "x"), []);
        assert_eq!(bits("AllowedCPUs", "0-9999999999"), []);
    }

    #[test]
    fn annotations_are_properties() {
        let words = |value| {
            Property::of_annotation("KillSignal", value).map(|property| property.value.join(" "))
        };
        assert_eq!(words("15"), Ok("i 15".into()));
        assert_eq!(words("uint64 10000000"), Ok("t 10000000".into()));
        assert_eq!(words("'a b'"), Ok("s a b".into()));
        assert_eq!(words("true"), Ok("b true".into()));
        for wrong in ["", "x", "uint64", "['a']", "uint128 1"] {
            assert!(words(wrong).is_err(), "{wrong}");
        }
        assert!(Property::of_annotation("A-b", "1").is_err());
    }
}
