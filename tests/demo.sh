#!/usr/bin/env bash
# The main job, end to end: a box from a spec file, commands in it, its output, its exit code.
# `make demo` runs this where boxes can run. The root file system is the Debian tree, overlaid so that
# it stays as it is.
set -euo pipefail

mote=${MOTE:-target/release/mote}
work=$(mktemp -d /run/mote-demo.XXXXXX)
trap 'umount "$work/root" 2>/dev/null || true; rm -rf "$work"' EXIT
mkdir "$work/root" "$work/upper" "$work/work"
mount -t overlay overlay -o "lowerdir=$MOTE_TEST_DEBIAN,upperdir=$work/upper,workdir=$work/work" "$work/root"

cat >"$work/spec.json" <<JSON
{
  "box_id": "demo", "vcpus": 2, "memory_mib": 512,
  "rootfs_path": "$work/root", "fs_mounts": [],
  "exec_socket_path": "$work/exec.sock",
  "entrypoint": {
    "executable": "/bin/sh",
    "args": ["-c", "echo Hello from \$(. /etc/os-release; echo \$PRETTY_NAME), Linux \$(uname -r); python3 -c 'import os; print(os.cpu_count(), \"CPUs, pid\", os.getpid())'; until [ -e /tmp/over ]; do sleep 0.1; done; exit 7"],
    "env": [["GREETING", "hello"]]
  },
  "workdir": "/root",
  "console_output": "$work/console.log"
}
JSON

echo "== the spec"
cat "$work/spec.json"
echo "== the plan (mote check)"
"$mote" check --config-file "$work/spec.json"
echo "== mote --config-file spec.json"
"$mote" --config-file "$work/spec.json" --outcome "$work/outcome.json" --timeline "$work/timeline.json" &
until [ -S "$work/exec.sock" ]; do sleep 0.01; done
echo "== echo ping | mote exec exec.sock -- sh -c 'cat; echo pong from \$HOSTNAME as \$(id -un)'"
echo ping | "$mote" exec --wait 60 --user nobody --env HOSTNAME=demo "$work/exec.sock" -- \
    sh -c 'cat; echo "pong from $HOSTNAME as $(id -un)"'
echo "== mote cp exec.sock :/etc/os-release - | head -n 1"
"$mote" cp "$work/exec.sock" :/etc/os-release - | head -n 1
echo "== mote exec exec.sock -- touch /tmp/over"
"$mote" exec "$work/exec.sock" -- touch /tmp/over
code=0
wait $! || code=$?
echo "== its console output"
cat "$work/console.log"
echo "== when what happened, in microseconds"
cat "$work/timeline.json"
echo "== how it ended"
cat "$work/outcome.json"
echo "== exit code $code (the entrypoint's own is 7)"
[ "$code" = 7 ]
