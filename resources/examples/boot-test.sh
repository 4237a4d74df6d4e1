#!/usr/bin/env bash
# Boots a root file system of yours in a box, and fails if the command in it does: for CI. Needs jq.
#   boot-test.sh DIRECTORY [COMMAND [ARGUMENT…]]        without a command: a shell that says what it runs on
#   MOTE_KERNEL=vmlinux boot-test.sh DIRECTORY …        the same with a kernel of yours, uncompressed, with what
#                                                       resources/guest-kernel.md lists
# LIMIT_S (60) is how long it may take, MEMORY_MIB (512) the box's memory. The box writes to DIRECTORY.
set -euo pipefail

root=$(realpath "$1")
shift
[ $# -gt 0 ] || set -- /bin/sh -c '. /etc/os-release; echo "$PRETTY_NAME on Linux $(uname -r)"'
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

jq -n --arg root "$root" --argjson memory "${MEMORY_MIB:-512}" '{
    box_id: "boot-test", vcpus: 1, memory_mib: $memory, rootfs_path: $root, fs_mounts: [],
    exec_socket_path: "", workdir: "/",
    entrypoint: {executable: $ARGS.positional[0], args: $ARGS.positional[1:], env: []}
}' --args -- "$@" >"$work/spec.json"

code=0
timeout "${LIMIT_S:-60}" mote --config-file "$work/spec.json" --outcome "$work/outcome.json" || code=$?
if [ $code != 0 ]; then
    # 124 is timeout's, and mote's for a back-end that died: the outcome file says which.
    echo "boot-test: FAILED with $code: $(cat "$work/outcome.json")" >&2
    exit 1
fi
echo "boot-test: passed" >&2
