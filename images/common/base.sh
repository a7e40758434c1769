#!/bin/sh
# Usage: base.sh SUITE ARCH IMAGE [STORAGE-OPTION...]
# Makes a slim base image from Debian packages, for builders that reach a Debian mirror and no registry. Storage
# options go to buildah (such as --root DIR). The image knows no mirror: /etc/apt/sources.list.d/debian.sources is
# empty, and a build mounts the sources it needs over it.
# Debian packages: mmdebstrap buildah (and uidmap when not run as root). 180 MB become 135 by leaving out the
# documentation and locales.
set -eu
suite=$1 arch=$2 image=$3
shift 3
here=$(dirname "$0")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$here/debian-sources.sh" "$suite" > "$work/sources.list"
if [ ! -s "$work/sources.list" ]; then
    echo "base.sh: apt knows no Debian mirror of $suite; run apt-get update, or set EDGE_DEBIAN_MIRROR=URL" >&2
    exit 1
fi
mmdebstrap --quiet --variant=minbase --architectures="$arch" \
    --aptopt='APT::Install-Recommends "false"' --aptopt='Acquire::Languages "none"' \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/info/*' \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
    --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/lintian/*' \
    --customize-hook='rm -rf "$1"/etc/apt/sources.list "$1"/etc/apt/sources.list.d/* "$1"/var/lib/apt/lists/*' \
    --customize-hook='rm -rf "$1"/var/cache/apt/* "$1"/var/log/*.log "$1"/var/log/apt "$1"/etc/resolv.conf' \
    --customize-hook='rm -f "$1"/etc/hostname; : > "$1"/etc/apt/sources.list.d/debian.sources' \
    "$suite" "$work/base.tar" "$work/sources.list"
container=$(buildah "$@" from scratch)
buildah "$@" add --quiet "$container" "$work/base.tar" / > /dev/null
buildah "$@" config --cmd /bin/sh --env LANG=C.UTF-8 \
    --label "org.opencontainers.image.title=Debian $suite ($arch), slim, made by mmdebstrap" "$container"
buildah "$@" commit --quiet --rm "$container" "$image"
