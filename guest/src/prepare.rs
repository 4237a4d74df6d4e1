//! Everything between [`crate::template`] and the entrypoint, in order.

use std::fs::{self, File};
use std::path::Path;

use mote_agent::instance::{self, Instance, Networking};

use crate::attest::Attest;
use crate::cgroup::BoxCgroup;
use crate::etc::Staged;
use crate::resolv::NameServers;
use crate::server::Server;
use crate::sys::{self, net};
use crate::template::Ready;
use crate::tsi::{Needs, Tsi};
use crate::{mount, network};

/// A box that is ready for its entrypoint.
pub struct Prepared {
    /// What the host asks for.
    pub instance: Instance,
    /// When the root was mounted, on the guest's monotonic clock in nanoseconds.
    pub root_mounted_ns: u64,
    /// Readable while children have ended.
    pub children: File,
    /// Where everything that runs in the box is put.
    pub cgroup: BoxCgroup,
    /// The exec and terminal servers, which listen.
    pub server: Server,
    /// What carries connections, if the box needs it.
    pub tsi: Option<Tsi>,
    /// The attestation server, if the box has one.
    pub attest: Option<Attest>,
    /// When all servers were ready, on the same clock.
    pub servers_ready_ns: u64,
}

/// Prepares the box, with what is ready.
///
/// # Errors
/// A text that says what could not be done, to what, and why; the box cannot run then.
pub fn prepare(ready: Ready) -> Result<Prepared, String> {
    let json = fs::read(instance::PATH).map_err(|e| format!("read {}: {e}", instance::PATH))?;
    let instance: Instance =
        serde_json::from_slice(&json).map_err(|e| format!("parse {}: {e}", instance::PATH))?;
    let name_servers = NameServers::stage(&instance.resolv_conf)?;
    let etc = instance.etc.iter().map(|(name, text)| Ok((name, Staged::new(name, text)?)));
    let etc = etc.collect::<Result<Vec<_>, String>>()?;
    let attest = instance.attestation.as_deref().map(Attest::stage).transpose()?;
    let sources = mount::root(&instance.mounts)?;
    let root_mounted_ns = sys::monotonic_ns();
    let cgroup = BoxCgroup::set_up(instance.pids_limit)?;
    let resolv_conf = name_servers.provide()?;
    for (name, staged) in etc {
        if let Err(error) = staged.mount_over(&Path::new("/etc").join(name)) {
            // A box may well do without.
            eprintln!("mote-agent: /etc/{name} cannot be replaced: {error}");
        }
    }
    // The routes of what starts next go through it.
    net::interface_up("lo").map_err(|e| format!("bring up the loopback interface: {e}"))?;
    let Instance { syn_retries, published, .. } = instance;
    let (networking, datagrams) = (instance.networking.clone(), instance.datagrams.clone());
    let needs = Needs { networking, datagrams, syn_retries, published };
    let mut tsi = Tsi::set_up(needs, cgroup.directory(), &resolv_conf, ready.programs)?;
    mount::of_the_spec(&instance, sources)?;
    sys::set_hostname(&instance.hostname)
        .map_err(|e| format!("set the host name '{}': {e}", instance.hostname))?;
    if let Networking::Own(interface) = &instance.networking {
        network::set_up(interface)?;
    }
    if let Some(name) = &instance.domainname {
        sys::set_domainname(name).map_err(|e| format!("set the domain name '{name}': {e}"))?;
    }
    for (name, value) in &instance.sysctls {
        fs::write(Path::new("/proc/sys").join(name.replace('.', "/")), value).map_err(|e| {
            format!("set the sysctl {name} to '{value}' (sysctls, BOX_SYSCTL_n): {e}; leave it out")
        })?;
    }
    let children = sys::child_signal().map_err(|e| format!("watch for ended processes: {e}"))?;
    let server = Server::listen()?;
    if let Some(tsi) = &mut tsi {
        tsi.begin()?;
    }
    let servers_ready_ns = sys::monotonic_ns();
    Ok(Prepared {
        instance,
        root_mounted_ns,
        children,
        cgroup,
        server,
        tsi,
        attest,
        servers_ready_ns,
    })
}
