#!/usr/bin/env bash
# Installs what building, running and testing need and is not here yet: Debian packages with apt, programs
# from crates.io and virtme-ng from PyPI (below the user's cache). Says what it installs and why; does
# nothing when all is there.
#   tools.sh GROUP…
#     build   what `make build` needs
#     box     a root file system to run a box on
#     lab     for a machine whose /dev/kvm is not complete: the emulated one
#     test    what the tests need besides
#     bench   what the benchmarks need besides
#     deny, fuzz, deb   what the target of this name needs; prints the path of its cargo-…
#     virtiofsd   what serves files to the lab, and to other VMMs in the benchmarks; prints its path
set -euo pipefail

cache=${XDG_CACHE_HOME:-$HOME/.cache}/mote
virtme_version=1.42
cargo_deny_version=0.20.2
cargo_fuzz_version=0.13.2
cargo_deb_version=3.8.0
qemu_version=10
# The one that mote has inside.
virtiofsd_version=1.14.0

say() { echo "tools: $*" >&2; }
die() { say "$*"; exit 1; }

# package, a file it brings, why
build_packages="
linux-source-6.12   /usr/src/linux-source-6.12.tar.xz    source of the guest kernel
gcc                 /usr/bin/gcc                         compiles the guest kernel, links everything
libc6-dev           /usr/lib/x86_64-linux-gnu/libc.a     static linking
make                /usr/bin/make                        builds the guest kernel
binutils            /usr/bin/ld                          links the guest kernel
flex                /usr/bin/flex                        builds the guest kernel
bison               /usr/bin/bison                       builds the guest kernel
bc                  /usr/bin/bc                          builds the guest kernel
libelf-dev          /usr/include/libelf.h                the kernel's objtool
xz-utils            /usr/bin/xz                          unpacks the kernel source
patch               /usr/bin/patch                       changes it, by resources/kernel
clang               /usr/bin/clang                       compiles the agent's BPF programs
libbpf-dev          /usr/include/bpf/bpf_helpers.h       declares what those call
libcap-ng-dev       /usr/include/cap-ng.h                mote's virtiofsd uses it
"
box_packages="
debootstrap         /usr/sbin/debootstrap                makes a root file system
"
lab_packages="
python3-venv        /usr/share/doc/python3-venv          runs virtme-ng, which starts the lab
linux-image-cloud-amd64 /usr/share/doc/linux-image-cloud-amd64 the lab's kernel, with kvm_amd
kmod                /sbin/modprobe                       loads kvm_amd in the lab
udev                /usr/bin/udevadm                     virtme-ng runs it in the lab
iproute2            /sbin/ip                             virtme-ng runs it in the lab
procps              /usr/bin/ps                          virtme-ng runs it in the lab
busybox-static      /usr/share/doc/busybox-static        the lab starts from it
file                /usr/bin/file                        tells virtme-ng the version of its kernel
"
test_packages="
busybox-static      /usr/share/doc/busybox-static        the small test root file system
tmux                /usr/bin/tmux                        the terminal that the tests look at
cpio                /usr/bin/cpio                        a unit test lists our archives with it
procps              /usr/bin/ps                          the tests signal processes with its kill
iproute2            /sbin/ip                             makes networks for the tests
musl-tools          /usr/bin/musl-gcc                    a static client with musl for the tests
openssl             /usr/bin/openssl                     a certificate authority for the tests
apache2-utils       /usr/bin/ab                          load on published ports
passt               /usr/bin/passt                       the network that boxes with 'network' use
systemd             /usr/bin/busctl                      makes cgroups of containers in the tests
dbus                /usr/bin/dbus-daemon                 carries its calls
groff-base          /usr/bin/groff                       reads the man pages
zsh                 /usr/bin/zsh                         reads its completions
fish                /usr/bin/fish                        the same, and completes with them
"
bench_packages="
gcc                 /usr/bin/gcc                         compiles the benchmark's floor, guests and tracer
libc6-dev           /usr/lib/x86_64-linux-gnu/libc.a     links them statically
linux-libc-dev      /usr/include/linux/kvm.h             declares KVM to the floor
binutils            /usr/bin/nm                          names the functions of a profile
linux-image-cloud-amd64 /usr/share/doc/linux-image-cloud-amd64 the kernel of the machine that counts, with kvm_amd
e2fsprogs           /sbin/mkfs.ext4                      makes the disk of VMMs whose root is one
cpio                /usr/bin/cpio                        packs the benchmark's root file systems
passt               /usr/bin/passt                       the network of the benchmark
iproute2            /sbin/ip                             makes networks for the benchmark
iperf3              /usr/bin/iperf3                      the network benchmark
busybox-static      /usr/share/doc/busybox-static        the benchmark's root file system
"
virtiofsd_packages="
libcap-ng-dev       /usr/include/cap-ng.h                builds virtiofsd
libseccomp-dev      /usr/include/seccomp.h               builds virtiofsd
"
deb_packages="
dpkg-dev            /usr/bin/dpkg-parsechangelog         reads the package's changelog
lintian             /usr/bin/lintian                     judges the package
"

fuzz_packages="
g++                 /usr/bin/g++                         compiles libFuzzer
"

install_packages() {
    local missing=() package file why
    while read -r package file why; do
        [ -n "$package" ] && [ ! -e "$file" ] || continue
        say "installing $package: $why"
        missing+=("$package")
    done <<<"$1"
    [ ${#missing[@]} -gt 0 ] || return 0
    [ "$(id -u)" = 0 ] || die "installing needs root; run: sudo apt-get install ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq || die "apt-get update failed"
    apt-get install -qq -y --no-install-recommends "${missing[@]}" >/dev/null ||
        die "apt-get install failed (Debian 12 has linux-source-6.12 in its suite bookworm-security)"
}

# QEMU is the lab's machine, and the peer to compare with. Debian 12's own (7.2) at times runs code that
# another of its CPUs has just changed as it was before: of guests with two vCPUs, one in thirty
# crashed as it booted. That of Debian's backports has not (none of ninety).
install_qemu() {
    local found=0 from=() sources=$cache/apt suite
    if command -v qemu-system-x86_64 >/dev/null; then
        found=$(qemu-system-x86_64 --version | sed -n 's/.*version \([0-9]*\)\..*/\1/p')
    fi
    [ "${found:-0}" -lt $qemu_version ] || return 0
    say "installing qemu-system-x86: the lab's machine, and the peer to compare with"
    [ "$(id -u)" = 0 ] || die "installing needs root; install qemu-system-x86, version $qemu_version or newer"
    export DEBIAN_FRONTEND=noninteractive
    if grep -q '^VERSION_CODENAME=bookworm' /etc/os-release; then
        # For this package alone: the machine's own list of sources stays as it is.
        mkdir -p "$sources/lists/partial"
        for suite in bookworm bookworm-backports; do
            echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian $suite main"
        done >"$sources/mote.list"
        from=(-t bookworm-backports -o Dir::Etc::sourceparts="$sources" -o Dir::State::lists="$sources/lists"
            -o APT::Sandbox::User=root)
    fi
    apt-get "${from[@]}" update -qq || die "apt-get update failed"
    apt-get "${from[@]}" install -qq -y --no-install-recommends qemu-system-x86 >/dev/null ||
        die "apt-get install failed"
}

# Builds a program of crates.io and prints its path. With --debug without optimisation: most run for seconds, and
# would take minutes longer to build.
install_cargo_tool() {
    local name=$1 version=$2 why=$3 root=$cache/$1-$2
    if [ ! -x "$root/bin/$name" ]; then
        say "building $name $version from crates.io: $why"
        (cd / && cargo install --quiet --locked "${@:4}" --root "$root" --version "$version" "$name")
    fi
    echo "$root/bin/$name"
}

install_virtiofsd() {
    install_packages "$virtiofsd_packages"
    install_cargo_tool virtiofsd "$virtiofsd_version" "serves files to the lab"
}

install_virtme() {
    local root=$cache/virtme-ng-$virtme_version
    [ -x "$root/bin/vng" ] && return
    say "installing virtme-ng $virtme_version from PyPI: starts the lab"
    rm -rf "$root"
    /usr/bin/python3 -m venv "$root"
    "$root/bin/pip" install --quiet --disable-pip-version-check "virtme-ng==$virtme_version"
}

[ $# -gt 0 ] || die "usage: $0 build|box|lab|test|bench|deny|fuzz|deb|virtiofsd…"
mkdir -p "$cache"
exec 9>"$cache/tools.lock"
flock 9
command -v cargo >/dev/null || die "cargo is missing; install Rust from https://rustup.rs"
for group; do
    case $group in
        build) install_packages "$build_packages" ;;
        box) install_packages "$box_packages" ;;
        lab)
            install_packages "$lab_packages"
            install_qemu
            install_virtme
            install_virtiofsd >/dev/null
            ;;
        test) install_packages "$test_packages" ;;
        bench)
            install_packages "$bench_packages"
            install_qemu
            install_virtiofsd >/dev/null
            ;;
        virtiofsd) install_virtiofsd ;;
        deny) install_cargo_tool cargo-deny "$cargo_deny_version" "looks at the dependencies" --debug ;;
        fuzz)
            install_packages "$fuzz_packages"
            install_cargo_tool cargo-fuzz "$cargo_fuzz_version" "builds the fuzzers" --debug
            ;;
        deb)
            install_packages "$deb_packages"
            install_cargo_tool cargo-deb "$cargo_deb_version" "makes the Debian package" --debug
            ;;
        *) die "there is no group '$group'" ;;
    esac
done
