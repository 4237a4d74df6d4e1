//! A container engine in a box: a bridge, address translation, a published port, and the cgroups and mounts
//! that containers take.

use std::fs;

use crate::common::TestBox;

/// Makes `/image.tar`, which has busybox and nothing else. Overlayfs takes no upper layer on this share, which is an
/// overlay itself: the engine's storage is a tmpfs.
const PREPARE: &str = "
set -e
mkdir -p /image/bin /image/www $storage
mount -t tmpfs tmpfs $storage
mv /busybox /image/bin/
for applet in sh httpd ip; do ln -s busybox /image/bin/$applet; done
tar -C /image -cf /image.tar .
";

/// A container's command, and a client of its published port.
const SERVE: &str =
    "/bin/sh -c 'ip -4 -o address show eth0 >/www/index.html; exec httpd -f -h /www' >/dev/null";
const FETCH: &str =
    "curl -sS --retry 60 --retry-connrefused --retry-delay 1 http://127.0.0.1:8080/";

/// What a box answers in which this script has an engine run that container.
fn assert_serves(storage: &str, script: &str, address: &str) {
    let script = format!("storage={storage}{PREPARE}{script}");
    let test = TestBox::containers().without_console_file().shell(&script);
    fs::copy("/bin/busybox", test.path("root/busybox")).expect("busybox-static is installed");
    // Without the deadline of `run`: engines are large, and take a minute or more where all is emulated.
    let ran = test.start().wait();
    assert!(ran.stdout.contains(address), "{} {} {}", ran.code, ran.stdout, ran.stderr);
}

#[test]
fn podman_publishes_a_port_of_a_container_on_a_bridge() {
    let script = format!(
        "rm -r /etc/cni
podman() {{ command podman --cgroup-manager=cgroupfs --events-backend=none \"$@\"; }}
podman import --quiet /image.tar small >/dev/null
podman run -d -p 8080:80 small {SERVE}
exec {FETCH}"
    );
    assert_serves("/var/lib/containers", &script, "inet 10.88.0.2/16 brd 10.88.255.255 ");
}

#[test]
fn dockerd_publishes_a_port_of_a_container_on_a_bridge() {
    let script = format!(
        "dockerd >/dev/shm/log 2>&1 &
until docker info >/dev/null 2>&1; do kill -0 $! || {{ cat /dev/shm/log; exit 1; }}; sleep 1; done
docker import /image.tar small >/dev/null
docker run -d -p 8080:80 small {SERVE}
{FETCH}"
    );
    assert_serves("/var/lib/docker", &script, "inet 172.17.0.2/16 brd 172.17.255.255 ");
}
