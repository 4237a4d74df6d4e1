//! `linux.resources`: a container's limits, of `config.json` and of `update`, and the files of its cgroup (v2) that
//! they become. The cgroup holds mote, its vCPUs and its back-ends; what runs in the box is not in it one by one.

use std::cell::RefCell;

use crate::spec::json::{Json, Node, Object, Report};

/// Limits; what is not given stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resources {
    /// Bytes of the container's memory.
    pub memory: Option<u64>,
    /// Bytes of memory to protect from reclaim.
    pub reservation: Option<u64>,
    /// Bytes of memory and swap together; `None` inside is unlimited.
    pub swap: Option<Option<u64>>,
    /// Relative CPU weight, on the scale of cgroup v1.
    pub shares: Option<u64>,
    /// Microseconds of CPU time per period; `None` inside is unlimited.
    pub quota: Option<Option<u64>>,
    /// Microseconds of a period.
    pub period: Option<u64>,
    /// Most processes; `None` inside is unlimited.
    pub pids: Option<Option<u64>>,
    /// Further files, each with a value.
    pub files: Vec<(String, String)>,
}

/// What the kernel takes for a period that is not given.
const DEFAULT_PERIOD_US: u64 = 100_000;

/// What mote needs beside the guest's RAM: its own heap and its back-ends', their threads' stacks, and the host's page
/// tables for the guest.
const OVERHEAD_BYTES: u64 = 64 << 20;

/// How many processes and threads mote and its helpers are, for each vCPU one more. What a container may have of its
/// own counts in the guest.
const OVERHEAD_PIDS: u64 = 256;

/// Bytes that a box with this RAM may take on the host.
pub fn with_overhead(ram: u64) -> u64 {
    // virtiofsd keeps each file open that the guest knows, which takes 2.1 KiB of the host's kernel and its own where the
    // guest's kernel takes at least 1 KiB of its memory, and none of it can be reclaimed but by the guest.
    let files = ram;
    // An entry of 8 bytes for each page of 4 KiB, in the host's tables of mote and of those that map its memory.
    ram.saturating_add(OVERHEAD_BYTES).saturating_add(files).saturating_add(ram / 128)
}

impl Resources {
    /// Parses the file that `update` is given.
    ///
    /// # Errors
    /// It is not JSON, or not an object; `report` has what is wrong with its members.
    pub fn parse(text: &str, report: &mut Report) -> Result<Resources, String> {
        let json = Json::parse(text).map_err(|error| format!("is not JSON: {error}"))?;
        let cell = RefCell::new(std::mem::take(report));
        let resources = Object::root(&json, &cell).map(read_members);
        *report = cell.into_inner();
        resources
    }

    /// Reads the object.
    pub fn read(node: &Node<'_>) -> Option<Resources> {
        Some(read_members(node.object()?))
    }

    /// How many CPUs the CPU time is worth, if it is limited.
    pub fn cpus(&self) -> Option<u64> {
        let period = self.period.filter(|period| *period > 0).unwrap_or(DEFAULT_PERIOD_US);
        self.quota?.map(|quota| quota.div_ceil(period).max(1))
    }

    /// Which of these limits take a cgroup, by the names of its files. A box with so many virtual CPUs keeps the others by
    /// itself: its memory is its RAM, its kernel counts its processes, and it has no more CPU time than its CPUs.
    pub fn beyond_a_box(&self, vcpus: u8) -> Vec<String> {
        let period = self.period.unwrap_or(DEFAULT_PERIOD_US);
        let most = u64::from(vcpus).saturating_mul(period);
        let is_whole = self.quota.flatten().is_none_or(|quota| quota >= most);
        let names = self.files(None).into_iter().map(|(name, _)| name);
        let is_beyond = |name: &String| match name.as_str() {
            // Without a file for its memory, which its RAM is in place of.
            "memory.swap.max" | "pids.max" => false,
            "cpu.max" => !is_whole,
            _ => true,
        };
        names.filter(is_beyond).collect()
    }

    /// The files of a cgroup and their values; `ram` is the box's, if its memory is limited.
    pub fn files(&self, ram: Option<u64>) -> Vec<(String, String)> {
        let or_max = |limit: Option<u64>| limit.map_or("max".into(), |limit| limit.to_string());
        let mut files = Vec::new();
        let mut file = |name: &str, value: String| files.push((name.to_owned(), value));
        if let Some(ram) = ram {
            file("memory.max", with_overhead(ram).to_string());
        }
        if let Some(bytes) = self.reservation {
            file("memory.low", bytes.to_string());
        }
        if let Some(swap) = self.swap {
            let of_memory = self.memory.unwrap_or_default();
            file("memory.swap.max", or_max(swap.map(|sum| sum.saturating_sub(of_memory))));
        }
        if let Some(shares) = self.shares {
            // As runc and crun have it.
            let weight = 1 + (shares.clamp(2, 262_144) - 2) * 9_999 / 262_142;
            file("cpu.weight", weight.to_string());
        }
        match (self.quota, self.period) {
            (None, None) => {}
            (quota, period) => {
                let period = period.unwrap_or(DEFAULT_PERIOD_US);
                file("cpu.max", format!("{} {period}", or_max(quota.flatten())));
            }
        }
        if let Some(pids) = self.pids {
            let most = pids.map(|pids| pids.saturating_add(OVERHEAD_PIDS));
            file("pids.max", or_max(most));
        }
        files.extend(self.files.iter().cloned());
        files
    }
}

/// Reads what one member limits.
type Part = fn(&Node<'_>) -> Option<Resources>;

fn read_members(mut o: Object<'_>) -> Resources {
    let mut limits = Resources::default();
    let parts: [(&'static str, Part); 7] = [
        ("memory", read_memory),
        ("cpu", read_cpu),
        ("pids", read_pids),
        ("blockIO", read_block_io),
        ("hugepageLimits", read_huge_pages),
        ("rdma", read_rdma),
        ("unified", read_unified),
    ];
    for (name, read) in parts {
        if let Some(part) = o.nullable(name, read) {
            limits.add(part);
        }
    }
    // A box has the devices of its own kernel, and none of the host's, whatever is allowed.
    o.member("devices");
    if let Some(network) = o.member("network").filter(|network| !network.is_vacant()) {
        network.error("is of cgroup v1, which mote does not use; leave it out");
    }
    o.finish();
    limits
}

impl Resources {
    fn add(&mut self, part: Resources) {
        self.memory = self.memory.or(part.memory);
        self.reservation = self.reservation.or(part.reservation);
        self.swap = self.swap.or(part.swap);
        self.shares = self.shares.or(part.shares);
        self.quota = self.quota.or(part.quota);
        self.period = self.period.or(part.period);
        self.pids = self.pids.or(part.pids);
        self.files.extend(part.files);
    }
}

/// A limit of which 0 means that none is given, and less that there is none.
fn limit(node: &Node<'_>) -> Option<Option<Option<u64>>> {
    let value = node.integer::<i64>()?;
    Some((value != 0).then(|| u64::try_from(value).ok()))
}

fn read_memory(node: &Node<'_>) -> Option<Resources> {
    let mut o = node.object()?;
    let mut bytes = |name| o.nullable(name, limit).flatten();
    let (memory, reservation, swap) = (bytes("limit"), bytes("reservation"), bytes("swap"));
    // Of the kernel's own memory, which cgroup v2 counts with the rest; runc ignores them there, too.
    for name in ["kernel", "kernelTCP", "swappiness"] {
        if o.nullable(name, limit).flatten().is_some_and(|limit| limit.is_some()) {
            node.warn(format!("{name} is of cgroup v1 and has no effect"));
        }
    }
    if o.nullable("disableOOMKiller", Node::boolean) == Some(true) {
        node.error("disableOOMKiller is of cgroup v1 and cannot be had; leave it out");
    }
    for name in ["useHierarchy", "checkBeforeUpdate"] {
        o.member(name);
    }
    o.finish();
    let memory = memory.flatten();
    match (swap.flatten(), memory) {
        (Some(_), None) => {
            node.error("swap, which is memory and swap together, needs limit as well")
        }
        (Some(sum), Some(memory)) if sum < memory => {
            node.error(format!(
                "swap is {sum}, memory and swap together, and must be at least limit, {memory}"
            ));
        }
        _ => {}
    }
    Some(Resources { memory, reservation: reservation.flatten(), swap, ..Resources::default() })
}

fn read_cpu(node: &Node<'_>) -> Option<Resources> {
    let mut o = node.object()?;
    let mut files = Vec::new();
    let shares = o.nullable("shares", Node::integer::<u64>).filter(|shares| *shares != 0);
    let quota = o.nullable("quota", limit).flatten();
    let period = o.nullable("period", Node::integer::<u64>).filter(|period| *period != 0);
    if let Some(burst) = o.nullable("burst", Node::integer::<u64>).filter(|burst| *burst != 0) {
        files.push(("cpu.max.burst".into(), burst.to_string()));
    }
    if let Some(idle) = o.nullable("idle", Node::integer::<i64>).filter(|idle| *idle != 0) {
        files.push(("cpu.idle".into(), idle.to_string()));
    }
    for name in ["realtimeRuntime", "realtimePeriod"] {
        if o.nullable(name, limit).flatten().is_some() {
            node.error(format!("{name} is of cgroup v1 and cannot be had; leave it out"));
        }
    }
    for (name, file) in [("cpus", "cpuset.cpus"), ("mems", "cpuset.mems")] {
        if let Some(list) = o.nullable(name, Node::string).filter(|list| !list.is_empty()) {
            files.push((file.into(), list));
        }
    }
    o.finish();
    Some(Resources { shares, quota, period, files, ..Resources::default() })
}

fn read_pids(node: &Node<'_>) -> Option<Resources> {
    let mut o = node.object()?;
    let pids = o.nullable("limit", limit).flatten();
    o.finish();
    Some(Resources { pids, ..Resources::default() })
}

fn read_block_io(node: &Node<'_>) -> Option<Resources> {
    let mut o = node.object()?;
    let mut files = Vec::new();
    if let Some(weight) = o.nullable("weight", Node::integer::<u32>).filter(|weight| *weight != 0) {
        // 10 to 1000 becomes 1 to 10000, as runc and crun have it.
        let weight = 1 + (u64::from(weight.clamp(10, 1000)) - 10) * 9_999 / 990;
        files.push(("io.weight".into(), format!("default {weight}")));
    }
    for name in ["leafWeight", "weightDevice"] {
        if let Some(node) = o.member(name).filter(|node| !node.is_vacant()) {
            node.error("is of cgroup v1 and cannot be had; leave it out");
        }
    }
    for (name, key) in [
        ("throttleReadBpsDevice", "rbps"),
        ("throttleWriteBpsDevice", "wbps"),
        ("throttleReadIOPSDevice", "riops"),
        ("throttleWriteIOPSDevice", "wiops"),
    ] {
        let lines =
            o.nullable(name, |node| node.array(|device| read_throttle(device, key), String::new));
        files.extend(lines.into_iter().flatten().map(|line| ("io.max".into(), line)));
    }
    o.finish();
    Some(Resources { files, ..Resources::default() })
}

fn read_throttle(node: &Node<'_>, key: &str) -> Option<String> {
    let mut o = node.object()?;
    let mut number = |name| o.required(name, "a number", Node::integer::<u64>);
    let (major, minor, rate) = (number("major"), number("minor"), number("rate"));
    o.finish();
    let rate = rate?;
    let rate = if rate == 0 { "max".into() } else { rate.to_string() };
    Some(format!("{}:{} {key}={rate}", major?, minor?))
}

fn read_huge_pages(node: &Node<'_>) -> Option<Resources> {
    let files = node.array(
        |page| {
            let mut o = page.object()?;
            let size = o.required("pageSize", "a size such as 2MB", Node::string);
            let bytes = o.required("limit", "bytes", Node::integer::<u64>);
            o.finish();
            Some((file_name(page, format!("hugetlb.{}.max", size?))?, bytes?.to_string()))
        },
        Default::default,
    );
    Some(Resources { files: files?, ..Resources::default() })
}

fn read_rdma(node: &Node<'_>) -> Option<Resources> {
    if !node.is_vacant() {
        node.error("is for devices that a box does not have; leave it out");
    }
    Some(Resources::default())
}

fn read_unified(node: &Node<'_>) -> Option<Resources> {
    let o = node.object()?;
    let files = o.members().into_iter().filter_map(|(name, node)| {
        let value = node.string()?;
        if name.starts_with("cgroup.") {
            node.error("is what mote-oci itself decides; leave it out");
            return None;
        }
        Some((file_name(&node, name)?, value))
    });
    Some(Resources { files: files.collect(), ..Resources::default() })
}

/// A name that can only be that of a controller's file.
fn file_name(node: &Node<'_>, name: String) -> Option<String> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let is_file = name.bytes().all(is_plain)
        && name.split_once('.').is_some_and(|(a, b)| !a.is_empty() && !b.is_empty());
    if !is_file {
        node.error(format!("\"{name}\" is not the name of a cgroup's file, such as memory.high"));
    }
    is_file.then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> (Resources, Report) {
        let mut report = Report::default();
        (Resources::parse(text, &mut report).expect("an object"), report)
    }

    fn files(text: &str) -> Vec<String> {
        let (resources, report) = parsed(text);
        assert_eq!(report.errors, []);
        let ram = resources.memory.map(|bytes| bytes.next_multiple_of(1 << 20));
        resources.files(ram).iter().map(|(name, value)| format!("{name}={value}")).collect()
    }

    #[test]
    fn a_box_keeps_some_limits_by_itself() {
        let beyond = |text, vcpus| parsed(text).0.beyond_a_box(vcpus);
        let own = r#"{"memory":{"limit":134217728,"swap":268435456},"cpu":{"quota":200000},"pids":{"limit":9}}"#;
        assert_eq!(beyond(own, 2), [""; 0]);
        // Of a host with fewer CPUs.
        assert_eq!(beyond(own, 1), [""; 0]);
        assert_eq!(beyond(r#"{"cpu":{"quota":-1,"period":100000}}"#, 1), [""; 0]);
        let others = r#"{"memory":{"limit":134217728,"reservation":9},"cpu":{"quota":150000,"shares":9,"cpus":"0"}}"#;
        assert_eq!(beyond(others, 2), ["memory.low", "cpu.weight", "cpu.max", "cpuset.cpus"]);
    }

    #[test]
    fn limits_become_files() {
        assert_eq!(
            files(
                r#"{"memory":{"limit":134217728,"reservation":67108864,"swap":268435456,"swappiness":null},
                "cpu":{"shares":1024,"quota":150000,"period":100000,"cpus":"0-1","mems":""},"pids":{"limit":10},
                "blockIO":{"weight":500,"throttleReadBpsDevice":[{"major":8,"minor":0,"rate":1000}]},
                "hugepageLimits":[{"pageSize":"2MB","limit":0}],"unified":{"memory.high":"max"},
                "devices":[{"allow":false,"access":"rwm"}]}"#
            ),
            [
                "memory.max=336592896",
                "memory.low=67108864",
                "memory.swap.max=134217728",
                "cpu.weight=39",
                "cpu.max=150000 100000",
                "pids.max=266",
                "cpuset.cpus=0-1",
                "io.weight=default 4950",
                "io.max=8:0 rbps=1000",
                "hugetlb.2MB.max=0",
                "memory.high=max"
            ]
        );
        assert_eq!(
            files(r#"{"memory":{"limit":-1,"swap":-1},"cpu":{"quota":-1},"pids":{"limit":-1}}"#),
            ["memory.swap.max=max", "cpu.max=max 100000", "pids.max=max"]
        );
        assert_eq!(
            files(r#"{"memory":{},"cpu":{"shares":0,"quota":0,"period":0},"pids":{"limit":0}}"#),
            [""; 0]
        );
    }

    #[test]
    fn what_cannot_be_is_named() {
        let (_, report) = parsed(
            r#"{"memory":{"swap":5},"cpu":{"realtimePeriod":1,"quota":"x"},"unified":{"cgroup.kill":"1","../x":"1"},
            "network":{"classID":1},"rdma":{"mlx5_1":{}},"hugepageLimits":[{"pageSize":"../","limit":1}]}"#,
        );
        let paths: Vec<&str> = report.errors.iter().map(|fault| &fault.path[..]).collect();
        assert_eq!(
            paths,
            [
                "memory",
                "cpu.quota",
                "cpu",
                "hugepageLimits[0]",
                "rdma",
                "unified.cgroup.kill",
                "unified.../x",
                "network"
            ]
        );
    }

    #[test]
    fn cpu_time_is_worth_cpus() {
        for (text, cpus) in [
            (r#"{"cpu":{"quota":150000,"period":100000}}"#, Some(2)),
            (r#"{"cpu":{"quota":1000}}"#, Some(1)),
            (r#"{"cpu":{"quota":-1}}"#, None),
            ("{}", None),
        ] {
            assert_eq!(parsed(text).0.cpus(), cpus, "{text}");
        }
    }
}
