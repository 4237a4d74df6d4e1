#!/usr/bin/env bash
# Builds the guest kernel from Debian's linux-source-6.12, without six lines of it, with three changed and the patches
# of resources/kernel, and resources/kernel.config, and prints the path of the stripped vmlinux. The result is kept in
# the user's cache under a hash of everything that decides its bytes (source package, patches, fragment, this script,
# compiler), so that each machine builds it once, whatever the number of checkouts.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/mote
source_tar=/usr/src/linux-source-6.12.tar.xz
build_log=$cache/kernel-build.log

say() { echo "kernel: $*" >&2; }
die() { say "$*"; exit 1; }

[ -r "$source_tar" ] || die "$source_tar is missing; 'make tools' installs linux-source-6.12"

key=$({
    dpkg-query -W -f '${Version}\n' linux-source-6.12
    gcc -dumpfullversion
    ld --version | head -n 1
    cat "$here/kernel.config" "$here/kernel.sh" "$here"/kernel/*
} | sha256sum | cut -c1-16)
image=$cache/vmlinux-$key

mkdir -p "$cache"
exec 9>"$cache/kernel.lock"
flock 9
if [ ! -s "$image" ]; then
    say "building Linux $(dpkg-query -W -f '${Version}' linux-source-6.12), about 10 minutes on two cores; log: $build_log"
    : >"$build_log"
    work=$(mktemp -d "$cache/kernel-build.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    tar -xf "$source_tar" -C "$work"
    tree=$(echo "$work"/linux-source-*)
    # What every start would pay for and nobody uses here: the files of /sys/kernel/slab and of
    # /sys/module/*/parameters, a filter for PTP packets, which only drivers of network cards ask for, emptying an
    # IO-APIC that KVM has made empty, and a look for the ROMs of cards in 48 pages where there are none. There are no
    # options for them, and a word of the command line costs as much as it saves.
    leave_out() { # FILE LINE
        grep -qxF -- "$2" "$tree/$1" || die "$1 has no line '$2'"
        grep -vxF -- "$2" "$tree/$1" >"$work/edited"
        cp "$work/edited" "$tree/$1"
    }
    leave_out mm/slub.c 'late_initcall(slab_late_init);'
    leave_out kernel/params.c 'late_initcall(param_sysfs_builtin_init);'
    leave_out net/socket.c $'\tptp_classifier_init();'
    leave_out arch/x86/kernel/apic/io_apic.c $'\tclear_IO_APIC();'
    leave_out arch/x86/kernel/setup.c $'\tx86_init.resources.probe_roms();'
    # Static calls that are patched where they are made, for which all these places are sorted at the start: instead they go by way of
    # a jump, as on other architectures.
    leave_out arch/x86/Kconfig $'\tselect HAVE_STATIC_CALL_INLINE\t\tif HAVE_OBJTOOL'
    # Where compiled BPF programs lie together: the first of them has it filled, and mapped page by page, to put some
    # 10 KiB there. Of 2 MiB, that costs each start and the host's memory for as long as a box lives. More programs have
    # more such places; a filter for seccomp(2), of 4,096 instructions at most, still has room in one.
    replace() { # FILE LINE NEW
        grep -qxF -- "$2" "$tree/$1" || die "$1 has no line '$2'"
        awk -v line="$2" -v new="$3" '{ print $0 == line ? new : $0 }' "$tree/$1" >"$work/edited"
        cp "$work/edited" "$tree/$1"
    }
    replace kernel/bpf/core.c '#define BPF_PROG_PACK_SIZE (SZ_2M * num_possible_nodes())' \
        '#define BPF_PROG_PACK_SIZE SZ_128K'
    # Buckets for IP's identifiers, which leave the guest for other boxes at most: as many as in a machine of 128 MiB,
    # since all are filled with randomness, which at 4 GiB is a tenth of a start.
    replace net/ipv4/route.c $'\t\t\t\t\t      256*1024);' $'\t\t\t\t\t      2048);'
    # Nor is what was needed for the start alone filled with bytes that would betray a late use of it.
    replace arch/x86/mm/init.c $'\t\t\t\t   POISON_FREE_INITMEM, what);' $'\t\t\t\t   -1, what);'
    for change in "$here"/kernel/*.patch; do
        patch --directory="$tree" --strip=1 --fuzz=0 --silent <"$change" >>"$build_log" 2>&1 ||
            die "$change does not apply; see $build_log"
    done
    # The functions that boxes run, for cold-text.patch. GCC has those that it splits off as unlikely in sections of their own.
    {
        echo 'SECTIONS { .text..used : {'
        sed -E '/^#/d; s/^(.*)\.cold(\.[0-9]+)?$/unlikely.\1/; s/.*/*(.text.&)/' "$here/kernel/used-functions"
        echo '} }'
    } >"$tree/scripts/used-text.lds"
    # Fixed identity: two builds of the same inputs give the same bytes.
    export KBUILD_BUILD_TIMESTAMP='2026-01-01 00:00:00 UTC' KBUILD_BUILD_USER=mote KBUILD_BUILD_HOST=mote
    kmake() { make -C "$tree" O="$work/out" "$@" >>"$build_log" 2>&1 || die "'make $*' failed; see $build_log"; }
    kmake KCONFIG_ALLCONFIG="$here/kernel.config" allnoconfig

    lost=$(while IFS= read -r line; do
        case $line in
            CONFIG_*=n) ! grep -q "^${line%=n}=" "$work/out/.config" || echo "$line" ;;
            CONFIG_*) grep -qxF "$line" "$work/out/.config" || echo "$line" ;;
        esac
    done <"$here/kernel.config")
    [ -z "$lost" ] || die "Kconfig did not take these lines of kernel.config: $(echo $lost)"

    kmake -j"$(nproc)" KCFLAGS=-ffunction-sections vmlinux
    # The start of mote's layout::COLD_TEXT is the text's, and this is its end.
    used=$(nm "$work/out/vmlinux" | awk '$3 == "__used_text_start" { print $1 }')
    [ "$used" = ffffffff80800000 ] || die "used functions start at $used, and not 6 MiB behind the text's start: see src/layout.rs"
    strip -o "$image.tmp" "$work/out/vmlinux"
    mv "$image.tmp" "$image"
    say "built $image"
fi
echo "$image"
