#!/usr/bin/env bash
# The man pages and completions that mote prints, as those who read them see them: groff without a warning,
# the three shells' parsers, and what bash and fish then complete.
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d "${TMPDIR:-/tmp}/mote-manual.XXXXXX")
trap 'rm -rf "$work"' EXIT
fail() { echo "manual: $*" >&2; exit 1; }

mkdir -p "$work/bin" "$work/fish/completions" "$work/here/directory"
cp target/release/mote "$work/bin/mote"
export PATH=$work/bin:$PATH XDG_CONFIG_HOME=$work

for page in mote.1 mote-spec.5; do
    mote man $page >"$work/$page"
    warnings=$(groff -man -ww -rCHECKSTYLE=3 -Tutf8 -z "$work/$page" 2>&1)
    [ -z "$warnings" ] || fail "$page: $warnings"
done
mote completions bash >"$work/mote.bash"
mote completions zsh >"$work/_mote"
mote completions fish >"$work/fish/completions/mote.fish"
bash -n "$work/mote.bash"
zsh -n "$work/_mote"
fish -n "$work/fish/completions/mote.fish"

cd "$work/here"
touch spec.json
/usr/bin/python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind("a socket")'

by_bash() {
    . "$work/mote.bash"
    read -ra COMP_WORDS <<<"$1"
    [ "${1% }" = "$1" ] || COMP_WORDS+=('')
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    _mote
    printf '%s\n' "${COMPREPLY[@]}"
}
by_fish() { fish -c 'complete -C $argv[1]' "$1" | cut -f1; }

# LINE WORD…: bash and fish complete this line with these words, in the alphabet's order.
completes() {
    local line=$1 expected found shell
    shift
    expected=$(printf '%s\n' "$@")
    for shell in bash fish; do
        found=$("by_$shell" "$line" | sed 's:/$::' | LC_ALL=C sort)
        [ "$found" = "$expected" ] || fail "$shell completes '$line' with: $(echo $found)"
    done
}
completes 'mote p' probe pty
completes 'mote --con' --config --config-file
completes 'mote --config-file ' 'a socket' directory spec.json
completes 'mote check --o'
completes 'mote exec ' 'a socket' directory
completes 'mote exec --user root --w' --wait --workdir
completes 'mote exec --user '
completes 'mote exec s '
completes 'mote exec s -- -'
completes 'mote pty --t'
completes 'mote cp s ' 'a socket' directory spec.json
completes 'mote cp s spec.json :s'
completes 'mote man ' mote-spec.5 mote.1
completes 'mote completions ' bash fish zsh
echo "manual: pages and completions are right"
