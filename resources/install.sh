#!/usr/bin/env bash
# Installs what `make build` has made below a directory such as /usr/local, or removes it from there.
#   install.sh install|uninstall DIRECTORY
set -euo pipefail

verb=$1
directory=$2
here=$(cd "$(dirname "$0")/.." && pwd)
mote=$here/target/release/mote

[ "$verb" = uninstall ] || [ -x "$mote" ] ||
    { echo "install: $mote is missing; run 'make build' first" >&2; exit 1; }

# File, mode, what prints its contents.
while read -r file mode contents; do
    case $verb in
        install) $contents | install -D -m "$mode" /dev/stdin "$directory/$file" ;;
        uninstall) rm -f "$directory/$file" ;;
    esac
done <<END
bin/mote 755 cat $mote
share/man/man1/mote.1 644 $mote man mote.1
share/man/man5/mote-spec.5 644 $mote man mote-spec.5
share/bash-completion/completions/mote 644 $mote completions bash
share/zsh/site-functions/_mote 644 $mote completions zsh
share/fish/vendor_completions.d/mote.fish 644 $mote completions fish
END

# mote's own file, as an OCI runtime.
case $verb in
    install) ln -sf mote "$directory/bin/mote-oci" ;;
    uninstall) rm -f "$directory/bin/mote-oci" ;;
esac
