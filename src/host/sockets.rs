//! The box's sockets on the host. They are bound before the guest runs, so that a client that comes early
//! can connect; it is served when the guest is ready.
//!
//! Unix sockets (contract §2.8) are private to the user; the [`crate::host::janitor`] makes their files, and
//! unlinks them at the end. Published ports (§1.6) are open to everybody who can reach the host.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use mote_agent::flow::Protocol;

use crate::host::passt;
use crate::plan::{HostSocket, MAX_SOCKET_PATH, Plan, PublishedPort};
use crate::virtio::vsock::listeners::Listener;
use crate::{log, sys};

/// Clients that may wait to be accepted: Linux's own limit (`somaxconn`).
pub(super) const BACKLOG: i32 = 4096;
/// Why a socket cannot be bound if somebody listens on its path.
const TAKEN: &str = "another process listens on it; is this box running already?";

/// How long to wait for the lock of a socket's directory, which is held for a few system calls.
const LOCK_LIMIT: Duration = Duration::from_secs(5);
/// How long a janitor that removes a socket waits for it: others wait for the janitor.
const REMOVAL_LOCK_LIMIT: Duration = Duration::from_millis(100);

/// A socket file that this process has made.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// The file itself (`O_PATH`): as long as this is open, no other file has its inode number.
    file: File,
}

impl SocketFile {
    /// The socket file at this path.
    fn at(path: &Path) -> io::Result<SocketFile> {
        let flags = libc::O_PATH | libc::O_NOFOLLOW;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
        Ok(SocketFile { path: path.into(), file })
    }

    fn is_there(&self) -> bool {
        let number =
            |file: io::Result<fs::Metadata>| file.map(|file| (file.dev(), file.ino())).ok();
        let ours = number(self.file.metadata());
        ours.is_some() && ours == number(fs::symlink_metadata(&self.path))
    }

    /// Removes the file, if nobody has replaced it.
    pub fn remove(self) {
        // Somebody who holds the lock for long only gets what a lock would prevent, a file that another
        // start makes at this moment: nothing may stay.
        let _locked = lock_directory(&self.path, REMOVAL_LOCK_LIMIT);
        if self.is_there() {
            // Fails if somebody has removed the directory, and with it the file.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Whether a dead process has left a socket file at this path.
///
/// # Errors
/// Another process listens there, or the file is no socket.
fn is_stale(path: &Path) -> Result<bool> {
    match sys::socket::connect_unix(path.as_os_str().as_bytes()) {
        Ok(_) => bail!(TAKEN),
        // Somebody listens, but the queue of clients is full.
        Err(error) if error.kind() == ErrorKind::WouldBlock => bail!(TAKEN),
        // Somebody takes datagrams.
        Err(error) if error.raw_os_error() == Some(libc::EPROTOTYPE) => bail!(TAKEN),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            // A file that is no socket gives the same error.
            ensure!(
                fs::symlink_metadata(path)?.file_type().is_socket(),
                "a file that is not a socket is in the way; remove it or choose another path"
            );
            Ok(true)
        }
        Err(_) => Ok(false),
    }
}

/// Removes a socket file that a dead process has left behind, unless another start has been faster.
///
/// # Errors
/// That other start's socket is there, or the file cannot be removed.
fn remove_stale(path: &Path) -> Result<()> {
    // Nothing takes a socket file's name away without the lock, so what is stale under it stays so.
    let _locked = lock_directory(path, LOCK_LIMIT)?;
    if is_stale(path)? {
        fs::remove_file(path)?;
    }
    Ok(())
}

/// Keeps other motes from removing socket files in the directory of this one, for as long as the result
/// is there (flock(2)). Making one needs no lock, if it appears with its listener.
///
/// # Errors
/// The directory cannot be read, or somebody else holds its lock.
fn lock_directory(path: &Path, limit: Duration) -> Result<File> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let directory = directory.unwrap_or(Path::new("."));
    let lock = || -> Result<File> {
        let file = File::open(directory)?;
        ensure!(
            sys::lock(&file, limit)?,
            "another process holds its lock (flock) for {} s already",
            limit.as_secs()
        );
        Ok(file)
    };
    lock().with_context(|| format!("lock the directory {}", directory.display()))
}

/// All listeners of the plan: its sockets, which are `bound` already, in the plan's order, and its ports,
/// which this opens.
///
/// # Errors
/// A port is in use, or may not be used by this user.
pub fn listeners(plan: &Plan, bound: Vec<UnixListener>) -> Result<Vec<Listener>> {
    for socket in &bound {
        // So that clients see mote as their peer, and not the janitor.
        sys::socket::listen(socket, BACKLOG).context("listen on the box's sockets")?;
    }
    let mut listeners: Vec<Listener> = plan
        .sockets
        .iter()
        .zip(bound)
        .map(|(&HostSocket { guest_port, fallback_port, .. }, socket)| Listener::Unix {
            socket,
            guest_port,
            fallback_port,
        })
        .collect();
    for (index, port) in plan.published_ports.iter().enumerate() {
        let published = publish(port);
        if let (Err(error), Some(socket)) = (&published, plan.networking.passt_socket())
            && is_in_use(error)
            && passt::publishes(socket, port)
        {
            log::warn(&format!(
                "port_map[{index}]: host port {} is published by the box's passt, and left to it",
                port.host
            ));
            continue;
        }
        listeners.extend(published.with_context(|| format!("port_map[{index}]"))?);
    }
    Ok(listeners)
}

/// Binds a socket, mode 0600. Replaces a socket file that a dead process has left behind.
///
/// # Errors
/// Another process listens there, or the file cannot be made.
pub fn listen(plan: &HostSocket) -> Result<(UnixListener, SocketFile)> {
    let path = &plan.path;
    let bind = || -> Result<(UnixListener, SocketFile)> {
        if is_stale(path)? {
            remove_stale(path)?;
        }
        // Bound under another name first, so that the path appears only when somebody listens on it.
        let mut random = [0; 4];
        sys::fill_random(&mut random)?;
        let hidden = path.with_file_name(format!(".{:08x}", u32::from_ne_bytes(random)));
        let bind_at = |path: &Path| {
            let socket = sys::socket::unix_stream_socket()?;
            sys::socket::set_socket_mode(&socket, 0o600)?;
            sys::socket::bind_and_listen(&socket, path.as_os_str().as_bytes(), BACKLOG)?;
            Ok::<_, io::Error>(socket)
        };
        let linked = if hidden.as_os_str().len() <= MAX_SOCKET_PATH {
            let socket = bind_at(&hidden)?;
            let linked = fs::hard_link(&hidden, path);
            fs::remove_file(&hidden)?;
            linked.map(|()| socket)
        } else {
            Err(ErrorKind::InvalidFilename.into())
        };
        let socket = match linked {
            Ok(socket) => socket,
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                // Another start has been faster, which is said if it listens.
                is_stale(path)?;
                return Err(error.into());
            }
            // The other name is too long, or the file system has no hard links. Then there is a
            // moment between bind and listen in which a client is refused, and another start would take
            // the file for a stale one.
            Err(_) => {
                let _locked = lock_directory(path, LOCK_LIMIT)?;
                is_stale(path)?;
                bind_at(path)?
            }
        };
        let file = SocketFile::at(path)?;
        let listener = UnixListener::from(socket);
        listener.set_nonblocking(true)?;
        Ok((listener, file))
    };
    bind().with_context(|| format!("listen on {}", path.display()))
}

/// Binds a socket for datagrams, mode 0600, in a directory that is made if it is not there. Replaces a socket file
/// that a dead process has left behind.
///
/// # Errors
/// Another process has the socket, or file or directory cannot be made.
pub fn bind_datagrams(path: &Path) -> Result<(UnixDatagram, SocketFile)> {
    let bind = || -> Result<(UnixDatagram, SocketFile)> {
        if let Some(directory) = path.parent() {
            DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        }
        remove_stale(path)?;
        let socket = UnixDatagram::unbound()?;
        sys::socket::set_socket_mode(&socket, 0o600)?;
        sys::socket::bind_unix(&socket, path.as_os_str().as_bytes())?;
        Ok((socket, SocketFile::at(path)?))
    };
    bind().with_context(|| format!("take datagrams at {}", path.display()))
}

/// Takes clients at a host port over IPv4 and, if the host has IPv6, over that too. Two boxes cannot share a port.
///
/// # Errors
/// The port is in use, or may not be used by this user.
pub fn publish(port: &PublishedPort) -> Result<Vec<Listener>> {
    let mut listeners = Vec::new();
    for ip in [IpAddr::from(Ipv4Addr::UNSPECIFIED), Ipv6Addr::UNSPECIFIED.into()] {
        let address = SocketAddr::new(ip, port.host);
        let guest_port = port.guest;
        let opened = match port.protocol {
            Protocol::Tcp => sys::socket::listen_tcp(address, BACKLOG)
                .map(|socket| Listener::Published { socket, guest_port }),
            Protocol::Udp => sys::socket::bind_udp(address)
                .map(|socket| Listener::Datagrams { socket: socket.into(), guest_port }),
        };
        match opened {
            Ok(listener) => listeners.push(listener),
            Err(error) if ip.is_ipv6() && is_without_ipv6(&error) => {}
            Err(error) => {
                let reason = match error.kind() {
                    ErrorKind::AddrInUse => {
                        "is in use by another program; stop that or choose another port"
                    }
                    ErrorKind::PermissionDenied => {
                        "may not be used by this user; choose a port above 1023, lower the sysctl net.ipv4.ip_unprivileged_port_start, or give mote CAP_NET_BIND_SERVICE"
                    }
                    _ => "cannot be used",
                };
                return Err(error).with_context(|| format!("host port {} {reason}", port.host));
            }
        }
    }
    Ok(listeners)
}

/// Whether a port could not be published because somebody has it.
fn is_in_use(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == ErrorKind::AddrInUse)
}

/// Whether the host has no IPv6: not in its kernel, or not on any interface.
fn is_without_ipv6(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixStream;

    fn scratch(name: &str) -> HostSocket {
        let path = std::env::temp_dir().join(format!("mote-{name}-{}", std::process::id()));
        let _ = fs::remove_file(&path);
        HostSocket { path, guest_port: None, fallback_port: None }
    }

    #[test]
    fn stale_sockets_are_replaced_and_ours_removed() {
        let plan = scratch("stale");
        drop(UnixListener::bind(&plan.path).expect("leaves a file behind"));
        let (listener, file) = listen(&plan).expect("replaces it");
        let mode = fs::metadata(&plan.path).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        UnixStream::connect(&plan.path).expect("connects");
        drop(listener);
        file.remove();
        assert!(!plan.path.exists());
    }

    #[test]
    fn the_longest_path_works_and_nothing_else_is_left() {
        let dir = std::env::temp_dir().join(format!("mote-sockets-{}", std::process::id()));
        fs::create_dir_all(&dir).expect("directory");
        let room = MAX_SOCKET_PATH - dir.as_os_str().len() - 1;
        for name in ["s".repeat(room), "x".into()] {
            let path = dir.join(name);
            let plan = HostSocket { path: path.clone(), guest_port: None, fallback_port: None };
            let (_listener, file) = listen(&plan).expect("binds");
            UnixStream::connect(&path).expect("connects");
            assert_eq!(fs::read_dir(&dir).expect("directory").count(), 1);
            file.remove();
        }
        fs::remove_dir(&dir).expect("empty");
    }

    #[test]
    fn a_live_socket_is_left_alone() {
        let plan = scratch("live");
        let (_listener, _file) = listen(&plan).expect("binds");
        let error = listen(&plan).expect_err("taken");
        assert!(format!("{error:#}").contains("is this box running already?"), "{error:#}");
        UnixStream::connect(&plan.path).expect("still there");
        fs::remove_file(&plan.path).expect("cleaned");
    }

    #[test]
    fn the_slower_of_two_starts_leaves_the_socket_of_the_faster_one() {
        let plan = scratch("two-starts");
        drop(UnixListener::bind(&plan.path).expect("leaves a file behind"));
        // Both have found the stale file when one of them goes on.
        assert!(is_stale(&plan.path).expect("nobody listens"));
        let (_listener, file) = listen(&plan).expect("the faster one");
        let error = remove_stale(&plan.path).expect_err("taken");
        assert!(error.to_string().contains("is this box running already?"), "{error:#}");
        UnixStream::connect(&plan.path).expect("still there");
        file.remove();
    }

    #[test]
    fn of_many_starts_on_one_stale_socket_one_gets_it() {
        let plan = scratch("many-starts");
        for _ in 0..50 {
            drop(UnixListener::bind(&plan.path).expect("leaves a file behind"));
            let start = std::sync::Barrier::new(4);
            let started: Vec<_> = std::thread::scope(|scope| {
                let one = || {
                    start.wait();
                    listen(&plan)
                };
                let threads: Vec<_> = (0..4).map(|_| scope.spawn(one)).collect();
                threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
            });
            UnixStream::connect(&plan.path).expect("the winner's");
            let mut winners = started.into_iter().filter_map(Result::ok);
            let (_listener, file) = winners.next().expect("a winner");
            assert!(winners.next().is_none());
            assert!(file.is_there());
            file.remove();
        }
    }

    #[test]
    fn an_end_leaves_the_socket_of_the_next_start() {
        let plan = scratch("next-start");
        let (listener, file) = listen(&plan).expect("binds");
        // mote has been killed, and its janitor comes late.
        drop(listener);
        let (_listener, next) = listen(&plan).expect("replaces it");
        assert!(!file.is_there());
        file.remove();
        UnixStream::connect(&plan.path).expect("still there");
        next.remove();
    }

    #[test]
    fn a_socket_whose_listener_is_stuck_is_a_live_one() {
        let plan = scratch("stuck");
        let stuck = sys::socket::unix_stream_socket().expect("a socket");
        sys::socket::bind_and_listen(&stuck, plan.path.as_os_str().as_bytes(), 0).expect("bound");
        let _queued = UnixStream::connect(&plan.path).expect("the only place");
        let error = listen(&plan).expect_err("taken");
        assert!(format!("{error:#}").contains("is this box running already?"), "{error:#}");
        fs::remove_file(&plan.path).expect("cleaned");
    }

    #[test]
    fn a_file_that_is_no_socket_is_left_alone() {
        let plan = scratch("regular");
        fs::write(&plan.path, "precious").expect("written");
        let error = listen(&plan).expect_err("in the way");
        assert!(format!("{error:#}").contains("not a socket"), "{error:#}");
        assert_eq!(fs::read_to_string(&plan.path).expect("still there"), "precious");
        fs::remove_file(&plan.path).expect("cleaned");
    }

    /// A published port, which was free a moment ago.
    fn published() -> (PublishedPort, Vec<TcpListener>) {
        let any = TcpListener::bind("0.0.0.0:0").expect("bound");
        let host = any.local_addr().expect("bound").port();
        drop(any);
        let port = PublishedPort { protocol: Protocol::Tcp, host, guest: 80 };
        (port, tcp(publish(&port).expect("free")))
    }

    fn tcp(listeners: Vec<Listener>) -> Vec<TcpListener> {
        let socket = |listener| match listener {
            Listener::Published { socket, .. } => socket,
            other => panic!("{other:?} is not a TCP port"),
        };
        listeners.into_iter().map(socket).collect()
    }

    #[test]
    fn a_published_port_takes_clients_of_both_families() {
        let (port, listeners) = published();
        for (listener, address) in listeners.iter().zip(["127.0.0.1", "::1"]) {
            let address: IpAddr = address.parse().expect("an address");
            let client = TcpStream::connect((address, port.host)).expect("connected");
            let (_, from) = listener.accept().expect("accepted");
            assert_eq!(from, client.local_addr().expect("connected"));
        }
    }

    #[test]
    fn a_port_is_published_once_and_again_when_free() {
        let (port, listeners) = published();
        let error = publish(&port).expect_err("taken");
        let expected = format!("host port {} is in use by another program; ", port.host);
        assert!(error.to_string().starts_with(&expected), "{error:#}");
        // A connection that the host ended first lingers; the port is free nevertheless.
        let mut client = TcpStream::connect(("127.0.0.1", port.host)).expect("connected");
        drop(listeners[0].accept().expect("accepted"));
        assert_eq!(std::io::Read::read(&mut client, &mut [0]).expect("the end"), 0);
        drop((client, listeners));
        publish(&port).expect("free again");
    }

    #[test]
    fn a_port_that_is_taken_for_ipv6_only_is_taken() {
        let (port, mut listeners) = published();
        drop(listeners.remove(0));
        let error = publish(&port).expect_err("taken");
        assert!(error.to_string().contains("is in use"), "{error:#}");
    }

    #[test]
    fn a_port_of_udp_is_another_than_that_of_tcp() {
        let (port, _listeners) = published();
        let port = PublishedPort { protocol: Protocol::Udp, ..port };
        let _datagrams = publish(&port).expect("free");
        let error = publish(&port).expect_err("taken");
        assert!(error.to_string().contains("is in use"), "{error:#}");
    }

    #[test]
    fn a_switchs_socket_is_one_processes_and_replaced_when_that_has_ended() {
        let dir = std::env::temp_dir().join(format!("mote-switch-{}", std::process::id()));
        let path = dir.join("not/there/yet.sock");
        let (socket, file) = bind_datagrams(&path).expect("made, with its directories");
        let error = bind_datagrams(&path).expect_err("taken");
        assert!(format!("{error:#}").contains("is this box running already?"), "{error:#}");
        drop(socket);
        let (_socket, next) = bind_datagrams(&path).expect("replaced");
        file.remove();
        assert!(path.exists());
        next.remove();
        assert!(!path.exists());
        fs::remove_dir_all(dir).expect("removed");
    }

    #[test]
    fn somebody_elses_file_is_not_removed() {
        let plan = scratch("foreign");
        let (_listener, file) = listen(&plan).expect("binds");
        fs::remove_file(&plan.path).expect("removed");
        fs::write(&plan.path, "new").expect("written");
        file.remove();
        assert!(plan.path.exists());
        fs::remove_file(&plan.path).expect("cleaned");
    }
}
