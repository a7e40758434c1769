#!/bin/sh
# Usage: debian-sources.sh SUITE
# Prints the host's Debian sources for SUITE (deb822), so that an image is built from the mirror the host uses. The
# mirror is read at run time and stands in no file of the project. Needs apt, and one `apt-get update` before.
# EDGE_DEBIAN_MIRROR=URL replaces what the host says, for hosts that are not Debian.
set -eu
suite=${1:?usage: debian-sources.sh SUITE}
source_of() {
    printf 'Types: deb\nURIs: %s\nSuites: %s\nComponents: main\n' "$1" "$2"
    printf 'Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n\n'
}
if [ -n "${EDGE_DEBIAN_MIRROR:-}" ]; then
    source_of "$EDGE_DEBIAN_MIRROR" "$suite"
    exit
fi
apt-get indextargets --format '$(ORIGIN)|$(CODENAME)|$(REPO_URI)' 'Identifier: Packages' 'Component: main' |
    sort -u | while IFS='|' read -r origin codename uri; do
        case "$origin|$codename" in
            "Debian|$suite" | "Debian|$suite-updates" | "Debian|$suite-security") source_of "$uri" "$codename" ;;
        esac
    done
