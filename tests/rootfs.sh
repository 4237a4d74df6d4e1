#!/usr/bin/env bash
# Prints the path of a Debian root file system for the tests and the demo: glibc, python3, curl, and
# what users of a network run (getent and python3 stand in for bind9-host, which brings 20 MB). It is
# made once per machine with debootstrap and kept in the user's cache under a hash of this script.
set -euo pipefail

cache=${XDG_CACHE_HOME:-$HOME/.cache}/mote
packages=python3-minimal,python3,curl,ca-certificates,procps,iproute2
packages+=,fuse-overlayfs,openssl,python3-requests,iputils-ping,iperf3,netcat-openbsd,nginx-light
key=$(sha256sum "$0" | cut -c1-16)
tree=$cache/debian-$key

say() { echo "rootfs: $*" >&2; }

mkdir -p "$cache"
exec 9>"$cache/rootfs.lock"
flock 9
if [ ! -d "$tree" ]; then
    [ "$(id -u)" = 0 ] || { say "debootstrap needs root; run this once with sudo"; exit 1; }
    say "making a Debian tree with debootstrap, about 2 minutes"
    work=$(mktemp -d "$cache/debian.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    debootstrap --variant=minbase --include="$packages" bookworm "$work/tree" >"$cache/rootfs.log" 2>&1 ||
        { say "debootstrap failed; see $cache/rootfs.log"; exit 1; }
    rm -rf "$work/tree/var/cache/apt/archives" "$work/tree/var/lib/apt/lists"
    mkdir -p "$work/tree/var/cache/apt/archives/partial" "$work/tree/var/lib/apt/lists/partial"
    mv "$work/tree" "$tree"
fi
echo "$tree"
