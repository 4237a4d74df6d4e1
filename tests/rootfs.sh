#!/usr/bin/env bash
# Prints the path of a Debian root file system for the tests and the demo: glibc, python3, curl, and
# what users of a network run (getent and python3 stand in for bind9-host, which brings 20 MB).
#   rootfs.sh              that
#   rootfs.sh containers   the same with container engines and tools for networks and disk images (400 MB more)
# Each is made once per machine with debootstrap and kept in the user's cache under a hash of this script.
set -euo pipefail

cache=${XDG_CACHE_HOME:-$HOME/.cache}/mote
packages=python3-minimal,python3,curl,ca-certificates,procps,iproute2
packages+=,fuse-overlayfs,openssl,python3-requests,iputils-ping,iperf3,netcat-openbsd,nginx-light
# What its container engines only recommend is named, too.
containers=(podman crun netavark docker.io iptables nftables ipset wireguard-tools
    erofs-utils squashfs-tools dosfstools)
key=$(sha256sum "$0" | cut -c1-16)

say() { echo "rootfs: $*" >&2; }

# Runs a command that makes $work/tree, and keeps that as $1; $2 says what is being made.
make_tree() {
    local tree=$1 what=$2
    shift 2
    [ ! -d "$tree" ] || return 0
    [ "$(id -u)" = 0 ] || { say "$what needs root; run this once with sudo"; exit 1; }
    say "$what"
    work=$(mktemp -d "$cache/debian.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    "$@" >"$cache/rootfs.log" 2>&1 || { say "$1 failed; see $cache/rootfs.log"; exit 1; }
    rm -rf "$work/tree/var/cache/apt/archives" "$work/tree/var/lib/apt/lists"
    mkdir -p "$work/tree/var/cache/apt/archives/partial" "$work/tree/var/lib/apt/lists/partial"
    mv "$work/tree" "$tree"
    rmdir "$work"
}

of_packages() {
    debootstrap --variant=minbase --include="$packages" bookworm "$work/tree"
}

with_containers() {
    cp -a "$plain" "$work/tree" && chroot "$work/tree" apt-get update &&
        DEBIAN_FRONTEND=noninteractive chroot "$work/tree" \
            apt-get install -y --no-install-recommends "${containers[@]}"
}

mkdir -p "$cache"
exec 9>"$cache/rootfs.lock"
flock 9
plain=$cache/debian-$key
make_tree "$plain" "making a Debian tree with debootstrap, about 2 minutes" of_packages
case ${1-} in
    '') echo "$plain" ;;
    containers)
        make_tree "$plain-containers" "adding container engines to a copy of it, about a minute" with_containers
        echo "$plain-containers"
        ;;
    *) say "there is no tree '$1'"; exit 2 ;;
esac
