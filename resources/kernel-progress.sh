#!/usr/bin/env bash
# kernel.sh, with what takes minutes in sight: on a terminal one line that counts, elsewhere a line each 30 s.
# Apart from it, because whatever changes in that script means another kernel.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
log=${XDG_CACHE_HOME:-$HOME/.cache}/mote/kernel-build.log
every_s=30 start_of_line='' end_of_line='\n'
[ ! -t 2 ] || every_s=1 start_of_line='\r' end_of_line='\e[K'

progress() {
    local files=0
    # What make says of each file that it makes: "  CC      init/main.o".
    [ "$(stat -c %Y "$log" 2>/dev/null || echo 0)" -lt "$started" ] || files=$(grep -c '^  [A-Z]' "$log" || true)
    printf "${start_of_line}kernel: %d files made, %d s$end_of_line" "$files" $(($(date +%s) - started)) >&2
}

started=$(date +%s)
# A read that times out is a sleep without a process, which would be left at the end.
(exec {nothing}<> <(:); while ! read -rt $every_s -u "$nothing"; do progress; done) &
ticker=$!
code=0
"$here/kernel.sh" "$@" || code=$?
kill $ticker
[ ! -t 2 ] || printf '\r\e[K' >&2
exit $code
