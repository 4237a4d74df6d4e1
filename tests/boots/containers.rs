//! A container engine in a box: a bridge, address translation, a published port, and the cgroups and mounts
//! that containers take.

use std::fs;

use crate::common::TestBox;

#[test]
fn podman_publishes_a_port_of_a_container_on_a_bridge() {
    // Overlayfs takes no upper layer on this share, which is an overlay itself: a tmpfs. The image has busybox and nothing else.
    let script = "
set -e
mkdir -p /image/bin /image/www /var/lib/containers
mount -t tmpfs tmpfs /var/lib/containers
mv /busybox /image/bin/
for applet in sh httpd ip; do ln -s busybox /image/bin/$applet; done
tar -C /image -cf /image.tar .
rm -r /etc/cni
podman() { command podman --cgroup-manager=cgroupfs --events-backend=none \"$@\"; }
podman import --quiet /image.tar small >/dev/null
podman run -d -p 8080:80 small \
    /bin/sh -c 'ip -4 -o address show eth0 >/www/index.html; exec httpd -f -h /www' >/dev/null
exec curl -sS --retry 60 --retry-connrefused --retry-delay 1 http://127.0.0.1:8080/
";
    let test = TestBox::containers().without_console_file().shell(script);
    fs::copy("/bin/busybox", test.path("root/busybox")).expect("busybox-static is installed");
    // Without the deadline of `run`: the engine is large, and takes a minute or more where all is emulated.
    let ran = test.start().wait();
    let expected = "2: eth0    inet 10.88.0.2/16 brd 10.88.255.255 scope global eth0";
    assert!(ran.stdout.starts_with(expected), "{} {} {}", ran.code, ran.stdout, ran.stderr);
}
