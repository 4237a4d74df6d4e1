#!/usr/bin/env bash
# Makes the Debian package of what `make build` has made, has lintian judge it, and prints its path. What is
# in it and where: [package.metadata.deb] in Cargo.toml.
set -euo pipefail
cd "$(dirname "$0")/../.."

cargo_deb=$(resources/tools.sh deb)
staged=target/debian/staged
rm -rf "$staged"
resources/install.sh install "$staged"
version() { dpkg-query -W -f '${Version}' "$1"; }
sed "s/@LINUX@/$(version linux-source-6.12)/; s/@LIBC@/$(version libc6-dev)/; s/@CAPNG@/$(version libcap-ng-dev)/" \
    resources/debian/copyright >"$staged/copyright"

# The changelog has the version of the package, whose first part is mote's.
packaged=$(dpkg-parsechangelog -l resources/debian/changelog -S Version)
built=$("$staged/bin/mote" --version)
[ "mote ${packaged%-*}" = "$built" ] ||
    { echo "deb: resources/debian/changelog is about $packaged, this is $built" >&2; exit 1; }
package=$("$cargo_deb" --no-build --no-strip --quiet --deb-version "$packaged")
lintian --fail-on error,warning "$package" >&2
echo "$package"
