//! What the agent is told ([`Instance`]), some of which is read from the host.

use std::fs;
use std::net::IpAddr;

use mote_agent::attestation;
use mote_agent::instance::{self, Entrypoint, Instance, PublishedPorts, ResolvConf, Security};

use super::guest_init::{GuestInit, MainProcess};
use super::hosts;
use super::init_files::Host;
use super::limits;
use super::name_servers;
use super::networking::Networking;
use super::ports::{PublishedPort, has_udp};
use super::process;
use crate::policy::rules::Cidr;
use crate::spec::json::Report;
use crate::spec::{self, Spec};
use crate::sys::routes::Routes;

/// Longest host name in bytes (`HOST_NAME_MAX`, gethostname(2)).
const MAX_HOSTNAME: usize = 64;

/// Checks the entrypoint and everything else that the guest carries out. `host` is the host's resolv.conf.
pub(super) fn plan(
    spec: &Spec,
    init: GuestInit,
    networking: &Networking,
    ports: &[PublishedPort],
    host: &str,
    attestation: Option<attestation::Options>,
    report: &mut Report,
) -> Instance {
    let spec::Entrypoint { executable, args, env, .. } = &spec.entrypoint;
    if executable.is_empty() {
        report.error("entrypoint.executable", "is empty; name a program");
    }
    if !spec.workdir.starts_with('/') {
        report.error(
            "workdir",
            format!("is \"{}\", must be an absolute path like \"/\"", spec.workdir),
        );
    }
    for (index, (name, _)) in env.iter().enumerate() {
        if name.is_empty() || name.contains('=') {
            report.error(
                format!("entrypoint.env[{index}]"),
                format!("has the name \"{name}\", which must not be empty or contain ="),
            );
        }
    }
    let strings =
        [("entrypoint.executable".to_owned(), executable), ("workdir".to_owned(), &spec.workdir)];
    let args_named = args.iter().enumerate().map(|(i, arg)| (format!("entrypoint.args[{i}]"), arg));
    let env_named = env.iter().enumerate().flat_map(|(i, (name, value))| {
        [name, value].map(|text| (format!("entrypoint.env[{i}]"), text))
    });
    for (path, text) in strings.into_iter().chain(args_named).chain(env_named) {
        if text.contains('\0') {
            report.error(path, "contains a NUL character, which no program can receive");
        }
    }

    let GuestInit {
        mut mounts,
        read_only_root,
        main,
        image_init,
        container_env,
        host: given,
        mut sysctls,
        ..
    } = init;
    let Host { hostname: given_name, resolv_conf, hosts } = given;
    let variable = spec.entrypoint.variable("HOSTNAME").map(|index| &env[index].1);
    let named =
        spec.hostname.as_ref().or(given_name.as_ref()).or(variable).filter(|name| !name.is_empty());
    let hostname = named.map_or("localhost", String::as_str);
    if hostname.len() > MAX_HOSTNAME || hostname.contains('\0') {
        let len = hostname.len();
        report.error(
            if spec.hostname.is_some() { "hostname" } else { "entrypoint.env" },
            format!(
                "the host name has {len} bytes, and must have at most {MAX_HOSTNAME} without NUL"
            ),
        );
    }
    if spec.resource_limits.pids_limit == Some(0) {
        report.error("resource_limits.pids_limit", "is 0, must be at least 1");
    }
    let make_workdir = main.is_some() || spec.process.is_some();
    let MainProcess { entrypoint, workdir, user, security } = main.unwrap_or_else(|| MainProcess {
        entrypoint: Entrypoint {
            executable: executable.clone(),
            args: args.clone(),
            env: env.clone(),
        },
        // An init of the image's own makes its main process's directory, where that is missing, and goes there.
        workdir: if image_init { "/".into() } else { spec.workdir.clone() },
        user: None,
        security: Security::default(),
    });
    let user = [spec.user.clone(), user].into_iter().flatten().find(|user| !user.is_empty());
    if let Some(user) = user.as_ref().filter(|_| image_init) {
        report.warn(
            "user",
            format!("is \"{user}\", but the image's own init runs as root; it takes BOX_EXEC_USER for its main process"),
        );
    }
    let own = spec.network.as_ref().map(|network| network.ip_address);
    process::check(spec, report);
    // Who says so exactly who runs has written the image's files for that.
    let has_own_etc = spec.process.is_some();
    mounts.extend(process::mounts(spec, report));
    sysctls.extend(spec.sysctls.iter().cloned());
    Instance {
        domainname: spec.domainname.clone(),
        start: process::start(spec),
        process: process::plan(spec, report),
        masked_paths: spec.masked_paths.clone(),
        read_only_paths: spec.readonly_paths.clone(),
        hostname: hostname.into(),
        mounts,
        read_only_root: read_only_root || spec.read_only_root,
        devices: spec.devices.clone(),
        pids_limit: spec.resource_limits.pids_limit,
        rlimits: limits::plan_rlimits(&spec.resource_limits, report),
        entrypoint,
        workdir,
        make_workdir,
        user: user.filter(|_| !image_init),
        exec_env: container_env,
        exec_workdir: spec.workdir.clone(),
        networking: match networking {
            Networking::Own(network) => instance::Networking::Own(network.interface),
            Networking::Hosts(policy) => instance::Networking::Hosts {
                ip6: host_has_global_ip6(),
                shared: policy.shares_loopback().then(shared_addresses),
            },
            Networking::None => instance::Networking::None,
        },
        datagrams: match networking {
            Networking::Own(_) | Networking::None => Vec::new(),
            Networking::Hosts(policy) => policy.datagrams(&addresses_of_host()),
        },
        syn_retries: unusual_syn_retries(),
        published: PublishedPorts {
            any: !ports.is_empty() || spec.publish_listeners,
            udp: has_udp(ports),
            listeners: spec.publish_listeners,
        },
        security,
        resolv_conf: match resolv_conf {
            Some(text) => ResolvConf::Always(text),
            None if has_own_etc => ResolvConf::OfImage,
            None => name_servers::plan(spec, host),
        },
        etc: [
            ("hostname", given_name.as_ref().map(|name| format!("{name}\n"))),
            ("hosts", hosts::plan(hosts, &spec.rootfs_path, hostname, own)),
        ]
        .into_iter()
        .filter(|_| !has_own_etc)
        .filter_map(|(name, text)| Some((name.to_owned(), text?)))
        .collect(),
        sysctls,
        attestation: attestation.map(|options| options.arguments()),
    }
}

/// Whether an interface of this host has an IPv6 address of global scope (proc(5), `if_inet6`).
fn host_has_global_ip6() -> bool {
    const SCOPE_COLUMN: usize = 3;
    const GLOBAL: &str = "00";
    let addresses = fs::read_to_string("/proc/net/if_inet6").unwrap_or_default();
    addresses.lines().any(|line| line.split_whitespace().nth(SCOPE_COLUMN) == Some(GLOBAL))
}

/// Most addresses that a box has in common with others of its network.
const MAX_SHARED: usize = 64;

/// The addresses of the network namespace, but for loopback's and those of a link.
fn shared_addresses() -> Vec<IpAddr> {
    let own = Routes::open().and_then(|routes| routes.own()).unwrap_or_default();
    let is_shared = |ip: &IpAddr| {
        !ip.is_loopback()
            && match ip {
                IpAddr::V4(ip) => !ip.is_link_local(),
                IpAddr::V6(ip) => !ip.is_unicast_link_local(),
            }
    };
    own.into_iter().filter(is_shared).take(MAX_SHARED).collect()
}

/// Its addresses, as far as it can be asked: the policy asks again at each connection.
fn addresses_of_host() -> Vec<Cidr> {
    let local = Routes::open().and_then(|routes| routes.local());
    local.unwrap_or_default().into_iter().map(|(first, len)| Cidr::new(first, len)).collect()
}

/// How often this host repeats a SYN, if that is not Linux's default.
fn unusual_syn_retries() -> Option<u8> {
    const USUAL: u8 = 6;
    let text = fs::read_to_string("/proc/sys/net/ipv4/tcp_syn_retries").ok()?;
    text.trim().parse().ok().filter(|retries| *retries != USUAL)
}

#[cfg(test)]
mod tests {
    use crate::plan::testing::plan;

    #[test]
    fn user_and_workdir_are_not_the_images_own_inits() {
        let asked = |env: &str| {
            let plan = plan(|s| {
                s.entrypoint.executable = "/bin/sh".into();
                s.entrypoint.env = vec![(env.into(), "sleep".into())];
                s.user = Some("app".into());
                s.workdir = "/srv".into();
            });
            let instance = plan.expect("a plan").instance;
            (instance.user, instance.workdir)
        };
        assert_eq!(asked("BOX_EXEC_EXEC"), (None, "/".into()));
        assert_eq!(asked("OTHER"), (Some("app".into()), "/srv".into()));
    }
}
