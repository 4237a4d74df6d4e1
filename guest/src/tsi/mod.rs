//! TSI (contract §8): sockets of the box that reach the outside without a network interface, and
//! published ports (contract §1.6).
//!
//! ```text
//!   application ── connect() ──▶ program (BPF) ──▶ relay ── vsock, one stream per flow ──▶ mote
//!                                                     ▲
//!   server of the box ◀── connect() ──────────────────┴── vsock ◀── client of a published port
//! ```
//!
//! This file sets all that up and looks after the process that serves the flows, and which is started when somebody wants
//! the first of them: most of it is the programs' way into the kernel, and not every box has a use for it. Each module uses
//! only those above it:
//!
//! - [`demand`]: whether a program of the box wants a socket
//! - [`destinations`]: what is carried, by addresses
//! - [`program`]: what redirects applications, and knows where they want to go
//! - [`loaded`]: how that comes into the kernel
//! - [`packet`]: what applications' sockets are told
//! - [`stream`], [`datagrams`]: what one flow does
//! - [`relay`]: serves all flows

mod datagrams;
mod demand;
mod destinations;
mod loaded;
mod packet;
mod program;
mod relay;
mod stream;

use std::ffi::CStr;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use mote_agent::flow::{LISTENS_LEN, Listens, mapped};
use mote_agent::instance::{Networking, Prefix, PublishedPorts};

use self::demand::Demand;
use self::destinations::{FLOW_NET6, FLOW_NET6_LEN, OWN_IP4};
use self::loaded::Extent;
pub use self::loaded::Loaded;
use self::program::{CLIENT_NET6, CLIENT_NET6_LEN, Programs};
use self::relay::{Relay, Sockets};
use crate::sys::{self, ExitStatus, Interest, Reaped, net};

/// What the box needs of TSI.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Needs {
    /// How it is on the network.
    pub networking: Networking,
    /// Where the host carries no datagrams to.
    pub datagrams: Vec<Prefix>,
    /// How often the host repeats a SYN, if not as often as usual.
    pub syn_retries: Option<u8>,
    /// Ports of the box that the host takes clients for.
    pub published: PublishedPorts,
}

impl Needs {
    /// Whether its sockets reach the outside.
    fn is_outgoing(&self) -> bool {
        matches!(self.networking, Networking::Hosts { .. })
    }
}

/// The guest's own address for IPv6, beside the flows'.
const OWN_IP6: Ipv6Addr = Ipv6Addr::new(0xfd54, 0x5349, 0, 0, 0x8000, 0, 0, 1);

/// What the process says when it is ready.
const READY: &[u8] = b"ready";

/// What carries the box's connections: a process, once it is there.
pub struct Tsi {
    needs: Needs,
    cgroup: OwnedFd,
    resolvers: Vec<Ipv6Addr>,
    sockets: Sockets,
    /// What has been loaded for the process, until that is there.
    loaded: Option<Loaded>,
    /// Has sockets wait while the process is not ready; `None` in a kernel that cannot, and once the process is given up.
    demand: Option<Demand>,
    process: Option<Process>,
}

#[derive(Debug)]
struct Process {
    pid: i32,
    /// Closing it asks the process to finish; `None` once that was done.
    lifeline: Option<OwnedFd>,
    /// Where it tells how its set-up went: [`READY`], or the reason why it failed. Behind that, which sockets listen. It does
    /// not wait.
    outcome: File,
    /// Whether that has been read.
    has_told: bool,
}

impl Process {
    /// Reads how its set-up went: whether it is ready, which it may not have said yet.
    fn read_outcome(&mut self) -> Result<bool, String> {
        let mut said = [0; READY.len()];
        let read = match self.outcome.read(&mut said) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            read => read,
        };
        self.has_told = true;
        match read {
            Ok(len) if said[..len] == *READY => Ok(true),
            Ok(0) => Err("the process that carries the box's connections was killed".into()),
            Ok(len) => {
                let mut text = said[..len].to_vec();
                // What is missing of it is not worth another error.
                let _ = self.outcome.read_to_end(&mut text);
                Err(String::from_utf8_lossy(&text).into_owned())
            }
            Err(e) => Err(format!("wait for the process that carries connections: {e}")),
        }
    }
}

impl Tsi {
    /// Has everything but the process ready, if the box needs it. `cgroup` is the box's, `resolv_conf` what its resolver
    /// reads, `loaded` what has been loaded for it.
    ///
    /// # Errors
    /// A text that says what could not be done, and why.
    pub fn set_up(
        needs: Needs,
        cgroup: BorrowedFd<'_>,
        resolv_conf: &str,
        loaded: Option<Loaded>,
    ) -> Result<Option<Self>, String> {
        if !needs.is_outgoing() && !needs.published.any {
            return Ok(None);
        }
        set_up_network(&needs)?;
        let cgroup = cgroup.try_clone_to_owned().map_err(failed("copy a descriptor"))?;
        let resolvers = loopback_resolvers(resolv_conf);
        let sockets = Sockets::open(needs.is_outgoing(), needs.published.any)
            .map_err(failed("open the listeners"))?;
        let (demand, process) = (None, None);
        Ok(Some(Tsi { needs, cgroup, resolvers, sockets, loaded, demand, process }))
    }

    /// From here on what the box sends is carried: its first socket waits for the process, or, in a kernel that cannot have
    /// it wait, this does.
    ///
    /// # Errors
    /// A text that says what could not be done, and why.
    pub fn begin(&mut self) -> Result<(), String> {
        self.demand =
            Demand::open().map_err(|e| format!("watch for the box's first socket: {e}"))?;
        self.hold_sockets()?;
        if self.demand.is_none() {
            self.start_process()?;
            self.wait_until_ready()?;
        }
        Ok(())
    }

    fn hold_sockets(&self) -> Result<(), String> {
        self.demand
            .as_ref()
            .map_or(Ok(()), Demand::hold)
            .map_err(|e| format!("have the box's sockets wait for what carries them: {e}"))
    }

    fn start_process(&mut self) -> Result<(), String> {
        self.fork().map_err(|e| format!("start the process that carries connections: {e}"))
    }

    fn fork(&mut self) -> io::Result<()> {
        const NAME: &CStr = c"mote-network";
        let loaded = self.loaded.take();
        let Tsi { needs, cgroup, resolvers, sockets, .. } = &*self;
        let (end, lifeline) = sys::pipe()?;
        let (outcome, outcome_end) = sys::input_pipe()?;
        sys::set_nonblocking(&outcome)?;
        let keep: Vec<BorrowedFd<'_>> = [end.as_fd(), outcome_end.as_fd(), cgroup.as_fd()]
            .into_iter()
            .chain(sockets.descriptors())
            .chain(loaded.iter().flat_map(Loaded::descriptors))
            .collect();
        let pid = sys::fork(&keep, NAME, || {
            serve(needs, cgroup.as_fd(), resolvers, sockets, &loaded, &end, &outcome_end);
        })?;
        let (lifeline, outcome) = (Some(lifeline), File::from(outcome));
        self.process = Some(Process { pid, lifeline, outcome, has_told: false });
        Ok(())
    }

    /// Waits until connections are carried.
    fn wait_until_ready(&mut self) -> Result<(), String> {
        let Some(process) = &mut self.process else { return Ok(()) };
        let waited = sys::poll(&[Interest::read(process.outcome.as_fd())], None);
        waited.map_err(|e| format!("wait for the process that carries connections: {e}"))?;
        process.read_outcome().map(drop)
    }

    /// [`Tsi::serve`] is to be called when one of these is ready: as long as there is no process, the host or a program that
    /// wants one; then its outcome.
    pub fn interests(&self) -> impl Iterator<Item = Interest<'_>> {
        let demand = self.demand.iter().filter(|_| self.process.is_none());
        let wanted = demand.flat_map(|demand| {
            let clients = self.sockets.clients().map(Interest::read);
            std::iter::once(demand.interest()).chain(clients)
        });
        let starting = self.process.iter().filter(|process| !process.has_told);
        wanted.chain(starting.map(|process| Interest::read(process.outcome.as_fd())))
    }

    /// Starts the process, or takes note of how its set-up went.
    pub fn serve(&mut self) {
        let told = match &mut self.process {
            Some(process) => process.read_outcome(),
            None => self.start_process().map(|()| false),
        };
        match told {
            Ok(true) => self.let_sockets_be(),
            Ok(false) => {}
            Err(reason) => self.give_up(&reason),
        }
    }

    /// Whoever waits for a socket gets it. Without a process it leads nowhere, which the console says.
    fn let_sockets_be(&self) {
        if let Some(Err(error)) = self.demand.as_ref().map(Demand::release) {
            eprintln!("mote-agent: let the box have sockets: {error}");
        }
    }

    /// There is no process, and will be none.
    fn do_without(&mut self) {
        self.let_sockets_be();
        self.demand = None;
    }

    /// There is no process, or will be none, unless the one that there was has been killed.
    fn give_up(&mut self, reason: &str) {
        eprintln!("mote-agent: {reason}");
        if self.process.is_none() {
            self.do_without();
        }
    }

    /// Ready when [`Tsi::next_listens`] has something to say.
    pub fn listens_interest(&self) -> Option<Interest<'_>> {
        self.told_of_listens().map(|process| Interest::read(process.outcome.as_fd()))
    }

    fn told_of_listens(&self) -> Option<&Process> {
        self.process.as_ref().filter(|process| process.has_told && self.needs.published.listeners)
    }

    /// Which socket listens, or does not any more, if there is news.
    pub fn next_listens(&self) -> Option<Listens> {
        let mut outcome = &self.told_of_listens()?.outcome;
        let mut bytes = [0; LISTENS_LEN];
        // Each is written as a whole.
        match outcome.read(&mut bytes) {
            Ok(LISTENS_LEN) => Listens::decode(&bytes),
            _ => None,
        }
    }

    /// Takes note of a child's end, which may be the process's. If it was killed, which the box's root
    /// may do, another is started; its connections are lost.
    pub fn child_ended(&mut self, child: Reaped) {
        let ended = self.process.take_if(|process| process.pid == child.pid);
        if ended.is_none_or(|process| process.lifeline.is_none()) {
            return;
        }
        if !matches!(child.status, ExitStatus::Signaled(_)) {
            self.do_without();
            return;
        }
        // The next ones wait for the new process as the first one did.
        if let Err(reason) = self.hold_sockets().and_then(|()| self.start_process()) {
            self.give_up(&reason);
        }
    }

    /// Has the process end once everything that the box has sent is with the host, or the host takes
    /// no more of it.
    pub fn finish(&mut self) {
        if let Some(process) = &mut self.process {
            process.lifeline = None;
        }
    }

    /// Whether there is a process.
    pub fn is_running(&self) -> bool {
        self.process.is_some()
    }
}

/// The process: sets everything up, says so, and carries connections until the lifeline ends.
fn serve(
    needs: &Needs,
    cgroup: BorrowedFd<'_>,
    resolvers: &[Ipv6Addr],
    sockets: &Sockets,
    loaded: &Option<Loaded>,
    lifeline: &File,
    mut outcome: &File,
) {
    let (programs, sockets) = match set_up(needs, cgroup, resolvers, sockets, loaded) {
        Ok(made) => made,
        Err(reason) => {
            let reason = format!("set up the box's connections: {reason}");
            // If nobody reads this, the box is over already.
            let _ = outcome.write(reason.as_bytes());
            return;
        }
    };
    let relay = Relay::new(programs, sockets, lifeline, outcome);
    let _ = outcome.write(READY);
    if let Err(error) = relay.and_then(|mut relay| relay.run()) {
        eprintln!("mote-agent: carry the box's connections: {error}");
    }
}

/// The box's addresses beside loopback's, and those among them that it shares with others.
fn addresses(networking: &Networking) -> (Vec<IpAddr>, Option<&[IpAddr]>) {
    match networking {
        Networking::Own(interface) => (vec![interface.address.into()], None),
        Networking::Hosts { shared, .. } => {
            let own = [OWN_IP4.into(), OWN_IP6.into()].into_iter();
            (own.chain(shared.iter().flatten().copied()).collect(), shared.as_deref())
        }
        Networking::None => (Vec::new(), None),
    }
}

/// What could not be set up, and why.
fn failed(what: &'static str) -> impl Fn(io::Error) -> String {
    move |e| format!("set up the box's connections: {what}: {e}")
}

/// Gives the guest the addresses and routes of what is carried.
fn set_up_network(needs: &Needs) -> Result<(), String> {
    let add_route = |net, len, source| {
        net::add_local_route(net, len, "lo", source).map_err(failed("add a route"))
    };
    add_route(FLOW_NET6, FLOW_NET6_LEN, None)?;
    if needs.published.udp {
        // Where a server answers from that listens on all addresses: where it was sent to.
        add_route(CLIENT_NET6, CLIENT_NET6_LEN, Some(Ipv6Addr::LOCALHOST))?;
    }
    for ip in addresses(&needs.networking).1.into_iter().flatten() {
        // So that servers can be bound to them.
        net::add_address(*ip, "lo").map_err(failed("add an address of the shared network"))?;
    }
    if let Networking::Hosts { ip6, .. } = needs.networking {
        // getaddrinfo() finds addresses only of families of which the guest has one itself, other than
        // loopback's (`AI_ADDRCONFIG`).
        net::add_address(OWN_IP4.into(), "lo").map_err(failed("add an IPv4 address"))?;
        if ip6 {
            net::add_address(OWN_IP6.into(), "lo").map_err(failed("add an IPv6 address"))?;
        }
    }
    if let Some(retries) = needs.syn_retries {
        set_syn_retries(retries).map_err(failed("set tcp_syn_retries"))?;
    }
    Ok(())
}

/// Sets everything up, and returns what the process works with.
fn set_up(
    needs: &Needs,
    cgroup: BorrowedFd<'_>,
    resolvers: &[Ipv6Addr],
    sockets: &Sockets,
    loaded: &Option<Loaded>,
) -> Result<(Programs, Sockets), String> {
    let failed = |what: &'static str| move |e: io::Error| format!("{what}: {e}");
    let sockets = sockets.try_clone().map_err(failed("copy the listeners"))?;
    let (own, shared) = addresses(&needs.networking);
    let extent = Extent {
        outgoing: needs.is_outgoing(),
        answers: needs.published.udp,
        listeners: needs.published.listeners || shared.is_some(),
    };
    // Last, so that whatever is redirected finds its listener.
    let has_resolvers = !resolvers.is_empty();
    let loaded = match loaded {
        Some(loaded) if loaded.is_for(extent, has_resolvers) => {
            loaded.try_clone().map_err(failed("copy the BPF programs"))?
        }
        _ => Loaded::load(extent, has_resolvers)?,
    };
    let programs = loaded.attach(cgroup, resolvers, shared, &needs.datagrams, own)?;
    Ok((programs, sockets))
}

/// Sets how often SYNs are repeated, at intervals that double from the first on: once more than the
/// host does, so that the host's answer comes before the guest's own time-out.
fn set_syn_retries(hosts: u8) -> io::Result<()> {
    fs::write("/proc/sys/net/ipv4/tcp_syn_linear_timeouts", "0")?;
    fs::write("/proc/sys/net/ipv4/tcp_syn_retries", hosts.saturating_add(1).min(127).to_string())
}

/// The loopback addresses among the name servers of resolv.conf(5), IPv4 as IPv4-mapped.
fn loopback_resolvers(resolv_conf: &str) -> Vec<Ipv6Addr> {
    resolv_conf
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let address = words.next().filter(|word| *word == "nameserver").and(words.next())?;
            address.parse::<IpAddr>().ok()
        })
        .filter(IpAddr::is_loopback)
        .map(mapped)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_resolvers_are_found() {
        let text = "# nameserver 127.0.0.9\nsearch a\nnameserver 127.0.0.53\nnameserver 192.0.2.1\n \
            nameserver ::1\nnameserver\nnameserver x\n";
        let expected: [Ipv6Addr; 2] =
            ["::ffff:127.0.0.53", "::1"].map(|text| text.parse().expect("an address"));
        assert_eq!(loopback_resolvers(text), expected);
    }
}
