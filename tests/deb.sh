#!/usr/bin/env bash
# Installs the Debian package in a fresh Debian tree with apt, runs a box from there, and removes it.
# `make deb-test` runs this where boxes can run. MOTE_DEB is the package, MOTE_TEST_DEBIAN the tree, which stays as
# it is, and which is the box's root file system too.
set -euo pipefail

fail() { echo "deb: $*" >&2; exit 1; }

if [ "${1:-}" != inside ]; then
    # A root directory of its own, and no chroot: in one there are no user namespaces.
    exec unshare --mount bash "$0" inside
fi
work=$(mktemp -d /run/mote-deb.XXXXXX)
overlay() {
    mkdir -p "$work/$1" "$work/upper-$1" "$work/work-$1"
    mount -t overlay overlay -o "lowerdir=$MOTE_TEST_DEBIAN,upperdir=$work/upper-$1,workdir=$work/work-$1" "$work/$1"
}
mount -t tmpfs tmpfs "$work"
overlay host
overlay box
root=$work/host
for directory in dev proc sys; do mount --rbind /$directory "$root/$directory"; done
mkdir -p "$root/srv/box"
mount --move "$work/box" "$root/srv/box"
cp "$MOTE_DEB" "$root/root/"
cat >"$root/root/spec.json" <<'JSON'
{
  "box_id": "deb", "vcpus": 1, "memory_mib": 256, "rootfs_path": "/srv/box", "fs_mounts": [],
  "exec_socket_path": "", "workdir": "/",
  "entrypoint": {"executable": "/bin/sh", "args": ["-c", "echo a box from the package; exit 7"], "env": []}
}
JSON

cd "$root"
pivot_root . mnt
exec chroot . /bin/bash -euo pipefail <<'INSIDE'
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TMPDIR=/tmp DEBIAN_FRONTEND=noninteractive
umount -l /mnt
fail() { echo "deb: $*" >&2; exit 1; }
apt-get install -qq -y -o Dpkg::Use-Pty=0 /root/mote_*.deb
dpkg -L mote | grep -v '/\.$' >/root/files
[ "$(command -v mote)" = /usr/bin/mote ] || fail "mote is not in PATH"
mote probe
code=0
output=$(mote --config-file /root/spec.json) || code=$?
[ "$code $output" = "7 a box from the package" ] || fail "the box ended with $code and said: $output"
apt-get purge -qq -y -o Dpkg::Use-Pty=0 mote
while read -r file; do [ -d "$file" ] || [ ! -e "$file" ] || fail "$file is left"; done </root/files
echo "deb: installed, ran a box, removed"
INSIDE
