#!/usr/bin/env bash
# Judges the dependency tree with cargo-deny by deny.toml. The database of advisories is on the network; where it
# cannot be had, everything else is judged and that is said.
set -euo pipefail

cargo_deny=$(resources/tools.sh deny)
export PATH=${cargo_deny%/*}:$PATH
cargo deny --log-level error check bans licenses sources
if cargo deny --log-level error fetch db; then
    cargo deny --log-level error check advisories
else
    echo "deny: ADVISORIES NOT CHECKED: the advisory database cannot be reached from here" >&2
fi
