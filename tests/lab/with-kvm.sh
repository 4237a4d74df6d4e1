#!/usr/bin/env bash
# Runs a command where boxes can run: here, when this machine's /dev/kvm is complete, else in the
# lab, for which it installs what is missing. Cargo uses it as the runner of the boot tests.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
mote=${MOTE:-$here/../../target/release/mote}

if "$mote" probe >/dev/null 2>&1; then
    exec "$@"
fi
"$here/../../resources/tools.sh" lab
# Nested virtualisation under emulation is not always right: what fails there is tried once more, with
# a message.
"$here/lab.sh" "$@" && exit
echo "lab: failed with $?; emulation is not always right, trying once more" >&2
exec "$here/lab.sh" "$@"
