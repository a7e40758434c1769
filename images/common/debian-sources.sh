#!/bin/sh
# Usage: debian-sources.sh SUITE
# Prints the host's Debian sources for SUITE as one-line apt sources, so that an image is built from the mirror the
# host uses. The mirror is read at run time and stands in no file of the project. Needs apt (and one `apt-get update`).
# EDGE_DEBIAN_MIRROR=URL replaces what the host says, for hosts that are not Debian.
set -eu
suite=${1:?usage: debian-sources.sh SUITE}
signed='[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]'
if [ -n "${EDGE_DEBIAN_MIRROR:-}" ]; then
    echo "deb $signed $EDGE_DEBIAN_MIRROR $suite main"
    exit
fi
apt-get indextargets --format '$(ORIGIN)|$(REPO_URI)|$(CODENAME)' 'Identifier: Packages' 'Component: main' |
    sort -u | while IFS='|' read -r origin uri codename; do
        case "$origin|$codename" in
            "Debian|$suite" | "Debian|$suite-updates" | "Debian|$suite-security") echo "deb $signed $uri $codename main" ;;
        esac
    done
