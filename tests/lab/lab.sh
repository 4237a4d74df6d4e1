#!/usr/bin/env bash
# Runs a command in the lab: a Linux machine with a complete /dev/kvm (nested SVM) under QEMU's
# software emulation, on this machine's own root file system. Needs no hardware virtualisation.
#   lab.sh COMMAND [ARGUMENT…]   its output, and its exit code
#   lab.sh                       a shell
# It has one processor, or LAB_CPUS.
# The file system is read-only there, but for /run, /tmp and /dev/shm, which are the lab's own.
set -euo pipefail

cache=${XDG_CACHE_HOME:-$HOME/.cache}/mote
vng=$cache/virtme-ng-1.42/bin/vng
# A lab without a heartbeat for this long hangs: it is ended, and the command is run in a new one.
silence_limit_s=${LAB_SILENCE_S:-45}
attempts=${LAB_ATTEMPTS:-4}
run_limit_s=${LAB_LIMIT_S:-2400}

die() { echo "lab: $*" >&2; exit 1; }
[ -x "$vng" ] || die "virtme-ng is missing; run 'make tools'"
virtiofsd=$("$(dirname "$0")/../../resources/tools.sh" virtiofsd)
kernel=$(find /boot -name 'vmlinuz-*-cloud-amd64' | sort -V | tail -n 1)
[ -n "$kernel" ] || die "no cloud kernel in /boot; run 'make tools'"
qemu=$("$(dirname "$0")/qemu.py")

# A third of this machine's memory, since two labs may run at a time; enough for a 6 GiB guest where
# there is that much.
total_mib=$(awk '/^MemTotal:/ { print int($2 / 1024) }' /proc/meminfo)
memory_mib=$((total_mib / 3 < 12288 ? total_mib / 3 : 12288))

# One processor: with two, each on a thread of QEMU's, nested virtualisation is not right. The lab's own
# kernel takes page faults with a guest's GS base until its stack is full, and kernels that patch
# themselves run an old instruction: guests crash (triple fault, "Oops: int3"), and the lab hangs, panics
# (corrupted stack end) or resets. Two on one thread are right, but wait up to 100 ms for each interrupt
# from one another.
cpus=${LAB_CPUS:-1}

# The guests' XSAVE would confuse nested emulation (it does not intercept XSETBV), and the lab's
# kernel cannot use AVX without it.
# CMPXCHG16B leaves RAX's low bits in EFLAGS under emulation; the kernel's slab allocator uses it where
# it is offered, and guests crashed of it now and then. Kernels do without.
cpu=EPYC,+svm,+npt,-cx16,-xsave,-avx,-avx2,-f16c,-fma,-aes,-pclmulqdq,-sha-ni,enforce=off

work=$(mktemp -d "${TMPDIR:-/tmp}/mote-lab.XXXXXX")
lab_pid=
pulse_pid=
end_lab() { [ -z "$lab_pid" ] || kill -KILL -- "-$lab_pid" 2>/dev/null || true; }
trap 'end_lab; [ -z "$pulse_pid" ] || kill "$pulse_pid" 2>/dev/null || true; rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# QEMU's flag that the interrupt controller has something for the CPU may get lost when a guest's exit
# comes at the same moment, and the interrupt then waits for another one: a halted lab waits for ever.
# Ten bytes a second for its second serial port are such other ones.
pulse=$work/pulse
mkfifo "$pulse.in" "$pulse.out"
exec 7<>"$pulse.in"
while sleep 0.1; do echo >&7; done &
pulse_pid=$!

# The command goes into a file: it then needs no quoting on a kernel command line. Its exit code
# and the lab's heartbeat come back through the one directory that is shared.
shared=$work/shared
mkdir "$shared"
{
    echo '#!/bin/bash'
    echo "while echo >$shared/beat; do sleep 2; done &"
    echo 'modprobe kvm_amd || exit 125'
    echo 'stty -F /dev/ttyS1 -echo; cat /dev/ttyS1 >/dev/null &'
    # Loopback is up on a booted host; virtme-ng's init does not see to that.
    echo 'ip link set lo up'
    echo "export PATH=$(printf %q "$PATH") HOME=$(printf %q "$HOME") TMPDIR=/tmp"
    # Tells tests that this is a machine of their own, whose clock they may set.
    echo 'export MOTE_LAB=1'
    for name in "${!MOTE_@}"; do echo "export $name=$(printf %q "${!name}")"; done
    echo "cd $(printf %q "$PWD")"
    if [ $# -gt 0 ]; then printf '%q ' "$@"; else echo -n 'bash -i'; fi
    echo
    echo "echo \$? >$shared/code"
} >"$work/command"

start_lab() {
    local serial="-chardev pipe,id=pulse,path=$pulse -device isa-serial,index=1,chardev=pulse"
    # virtme-ng serves the file system by it.
    mkdir -p "$work/bin"
    ln -sf "$virtiofsd" "$work/bin/virtiofsd"
    export PATH=$work/bin:$(dirname "$vng"):$PATH
    exec "$@" "$vng" --run "$kernel" \
        --qemu "$qemu" --disable-kvm --disable-microvm --cpus $cpus --memory "${memory_mib}M" \
        --rwdir="$shared" --qemu-opts="-L /usr/share/qemu -L /usr/share/seabios -cpu $cpu $serial" --exec "bash $work/command"
}

if [ $# -eq 0 ]; then
    (start_lab env)
    exit
fi

# Seconds since the lab's last sign of life.
silence() {
    local last=$started
    [ ! -e "$shared/beat" ] || last=$(stat -c %Y "$shared/beat")
    echo $(($(date +%s) - last))
}

for attempt in $(seq $attempts); do
    rm -f "$shared"/*
    started=$(date +%s)
    # In a process group of its own, so that all of it can be ended. Its output goes through pipes: a file
    # QEMU would open again, and so empty it.
    start_lab setsid </dev/null > >(cat) 2> >(grep --line-buffered -v "TCG doesn't support" >&2) &
    lab_pid=$!
    while kill -0 "$lab_pid" 2>/dev/null && [ ! -s "$shared/code" ]; do
        [ "$(silence)" -lt $silence_limit_s ] || break
        [ $(($(date +%s) - started)) -lt "$run_limit_s" ] || die "the command took more than $run_limit_s s"
        sleep 0.2
    done
    if [ -s "$shared/code" ]; then
        # It has a moment to end by itself: its last output may still be on the way.
        for _ in $(seq 50); do kill -0 "$lab_pid" 2>/dev/null && sleep 0.1 || break; done
        exit "$(cat "$shared/code")"
    fi
    echo "lab: attempt $attempt of $attempts hung or died" >&2
    end_lab
    wait "$lab_pid" 2>/dev/null || true
    lab_pid=
done
die "the lab does not work on this machine"
