#!/usr/bin/env bash
# Builds virtiofsd, which serves a box's file systems, from crates.io as a static program, and prints its path. The
# result is kept in the user's cache under a hash of everything that decides its bytes, so that each machine builds it
# once, whatever the number of checkouts. mote has it inside (resources/build.rs).
set -euo pipefail

version=1.14.0
# Of the crate, which holds a Cargo.lock with the hashes of what it depends on.
sha256=7051accc9cf2816e25945c8216e6d4be2b4e75fc5e77559cd7eed5e400245cc1
here=$(cd "$(dirname "$0")" && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/mote
target=x86_64-unknown-linux-gnu
libraries=/usr/lib/x86_64-linux-gnu

# A build script that runs this has settings for what it is part of.
unset CARGO_TARGET_DIR CARGO_BUILD_TARGET CARGO_ENCODED_RUSTFLAGS RUSTC_WRAPPER RUSTC_WORKSPACE_WRAPPER

say() { echo "virtiofsd: $*" >&2; }
die() { say "$*"; exit 1; }

for library in seccomp cap-ng; do
    [ -r "$libraries/lib$library.a" ] || die "$libraries/lib$library.a is missing; 'make tools' installs it"
done
key=$({
    dpkg-query -W -f '${Version}\n' libseccomp-dev libcap-ng-dev libc6-dev
    rustc --version
    cat "$here/virtiofsd.sh"
} | sha256sum | cut -c1-16)
program=$cache/virtiofsd-$key

mkdir -p "$cache"
exec 9>"$cache/virtiofsd.lock"
flock 9
if [ ! -x "$program" ]; then
    say "building virtiofsd $version from crates.io, about two minutes on two cores"
    work=$(mktemp -d "$cache/virtiofsd-build.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    cd "$work"
    # A project of its own, outside this checkout, whose cargo settings are not meant for it. It fetches the crate
    # alone; what is built is that.
    mkdir fetch fetch/src
    touch fetch/src/lib.rs
    printf '[package]\nname = "fetch"\nversion = "0.0.0"\nedition = "2021"\n[dependencies]\nvirtiofsd = "=%s"\n' "$version" >fetch/Cargo.toml
    cargo fetch --quiet --manifest-path fetch/Cargo.toml --target "$target"
    crate=$(find "${CARGO_HOME:-$HOME/.cargo}/registry/cache" -name "virtiofsd-$version.crate" | head -n 1)
    [ -n "$crate" ] || die "cargo has not fetched virtiofsd $version"
    echo "$sha256  $crate" | sha256sum --quiet --check || die "virtiofsd $version is not the one that is known here"
    tar -xf "$crate"
    # As small and as quick to start as it can be: nothing to link at its start, nothing to relocate.
    export RUSTFLAGS="-C target-feature=+crt-static -C relocation-model=static"
    export CARGO_PROFILE_RELEASE_LTO=fat CARGO_PROFILE_RELEASE_CODEGEN_UNITS=1 CARGO_PROFILE_RELEASE_PANIC=abort
    export CARGO_PROFILE_RELEASE_STRIP=symbols
    export LIBSECCOMP_LINK_TYPE=static LIBSECCOMP_LIB_PATH=$libraries LIBCAPNG_LINK_TYPE=static LIBCAPNG_LIB_PATH=$libraries
    # Two builds of the same inputs give the same bytes, wherever.
    RUSTFLAGS+=" --remap-path-prefix=$work=/virtiofsd --remap-path-prefix=${CARGO_HOME:-$HOME/.cargo}=/cargo"
    cargo build --quiet --release --locked --target "$target" --manifest-path "virtiofsd-$version/Cargo.toml" --target-dir "$work/target" >&2
    cp "$work/target/$target/release/virtiofsd" "$program.tmp"
    mv "$program.tmp" "$program"
    say "built $program"
fi
echo "$program"
