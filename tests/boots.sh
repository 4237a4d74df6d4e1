#!/usr/bin/env bash
# The boot tests: the release binary driven with real specs, on this machine or in the lab.
#   boots.sh             all of them
#   boots.sh GROUP…      the tests whose names contain this; a comma joins several names to one group, and after
#                        "cold=" their boxes start from no template, after "template=" all from one that is made first
# Else boxes start from templates as they do at their users': the first of each shape boots, and the next ones start from
# what is made meanwhile. That a boot does the same is shown by the tests of what the agent and the kernel do until the
# entrypoint runs, once more and cold.
# In groups of a minute or two, so that a lab that hangs costs one group's time, not all. A lab has one
# processor, so two groups run at a time there; the output of each is printed when it has ended.
set -euo pipefail
cd "$(dirname "$0")/.."

# The modules that take long, the longest first; a comma joins several to one group. All modules that are
# not named here are one more group, the first, so a new module runs without being entered anywhere.
long=(tsi:: requests::,egress::,bad_input:: attestation:: ports:: oci::,containers::,features:: hostile::
    lifecycle::,entrypoint::,faults::back_ends:: faults::host::,faults::ends::,faults::callers:: guest::,commands::
    logs::,published_udp::,exec::,terminal:: inits::,switch:: passt::,oci_passt:: datagrams:: outcomes::,shares::,sockets::
    oci_rootless::,oci_systemd:: limits::)
# Of middling length. Of those of memory, most are the first of their shape, and so boot anyway.
cold=(cold=features::,shares::,memory::who_looks)

MOTE_TEST_DEBIAN="$(tests/rootfs.sh)"
MOTE_TEST_CONTAINERS="$(tests/rootfs.sh containers)"
export MOTE_TEST_DEBIAN MOTE_TEST_CONTAINERS
export MOTE=$PWD/target/x86_64-unknown-linux-gnu/release/mote
export MOTE_TEST_BINARY=$MOTE
# The lab's own, where there is a lab.
export MOTE_TEMPLATES=${MOTE_TEMPLATES:-/dev/shm/mote-templates-of-tests}
# Far above what a group takes.
export LAB_LIMIT_S=${LAB_LIMIT_S:-600}
# The binary under test is the one that is shipped; the tests themselves are built faster without.
cargo build --locked --release
cargo test --locked --test boots --no-run

if [ $# = 0 ]; then
    # Every module that has a test; of a test outside of any module, its own name.
    modules=$(cargo test --quiet --locked --test boots -- --list --format terse |
        sed -n 's/: test$//p' | sed 's/\(.*::\).*/\1/' | sort -u)
    in_lines() { printf '%s\n' "$@" | tr , '\n' | sort; }
    gone=$(comm -13 <(echo "$modules") <(in_lines "${long[@]}"))
    [ -z "$gone" ] || { echo "boots: there is no such module with tests:" $gone >&2; exit 1; }
    others=$(comm -23 <(echo "$modules") <(in_lines "${long[@]}") | paste -sd ,)
    set -- ${others:+"$others"} "${cold[@]}" "${long[@]}"
fi

export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER=$PWD/tests/lab/with-kvm.sh
group() {
    case $1 in
    cold=*) export MOTE_TEMPLATES=off ;;
    template=*) export MOTE_TEST_TEMPLATES_FIRST=1 ;;
    esac
    local names=${1#*=}
    cargo test --locked --test boots -- ${names//,/ }
}
if "$MOTE" probe >/dev/null 2>&1; then
    for names; do (group "$names"); done
    exit
fi

work=$(mktemp -d "${TMPDIR:-/tmp}/mote-boots.XXXXXX")
trap 'rm -rf "$work"' EXIT
in_its_turn() {
    local log code=0
    log=$(mktemp "$work/XXXXXX")
    # Where a box is bound to one of two processors.
    case $1 in *limits::* | *cpuset*) export LAB_CPUS=2 ;; esac
    group "$1" >"$log" 2>&1 || code=$?
    flock "$work" cat "$log"
    return $code
}
export work
export -f group in_its_turn
printf '%s\n' "$@" | xargs -P 2 -I{} bash -c 'in_its_turn "$1"' _ {}
