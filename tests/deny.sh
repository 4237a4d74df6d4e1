#!/usr/bin/env bash
# Judges the dependency tree with cargo-deny by deny.toml. The database of advisories is on the network; where it
# cannot be had, everything else is judged and that is said.
set -euo pipefail

export PATH=${XDG_CACHE_HOME:-$HOME/.cache}/mote/cargo-deny-0.20.2/bin:$PATH
cargo deny --log-level error check bans licenses sources
if cargo deny --log-level error fetch db; then
    cargo deny --log-level error check advisories
else
    echo "deny: ADVISORIES NOT CHECKED: the advisory database cannot be reached from here" >&2
fi
