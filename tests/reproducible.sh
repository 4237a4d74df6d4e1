#!/usr/bin/env bash
# Builds the guest's kernel image and initramfs archives twice, in two fresh clones with paths of
# their own, and compares their bytes. The kernel itself is built once a machine, with a fixed identity.
set -euo pipefail

here=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d "${TMPDIR:-/tmp}/mote-reproducible.XXXXXX")
trap 'rm -rf "$work"' EXIT

for name in one another/place; do
    git clone --quiet "$here" "$work/$name"
    # Checking the product runs its build script, which builds the guest's files in full.
    (cd "$work/$name" && cargo check --quiet --locked)
    for file in initramfs.cpio attest.cpio vmlinux main.bpf main-outgoing.bpf vcpu.bpf output.bpf; do
        built=$(find "$work/$name/target" -path "*/mote-*/out/$file")
        printf '%s  %s\n' "$(sha256sum <"$built" | cut -d' ' -f1)" "$file"
    done >"$work/sums.${name%%/*}"
done
cat "$work/sums.one"
diff "$work/sums.one" "$work/sums.another" >&2 || { echo "reproducible: two builds differ" >&2; exit 1; }
echo "reproducible: two builds gave the same bytes"
