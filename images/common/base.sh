#!/bin/sh
# Usage: base.sh SUITE ARCH IMAGE [STORAGE-OPTION...]
# Makes a slim base image from Debian packages, for builders that reach a Debian mirror and no registry. Storage
# options go to buildah (such as --root DIR). The image knows no mirror: its list of apt sources is an empty file, and
# a build mounts the sources it needs over it.
# Debian packages: mmdebstrap and buildah; uidmap too when not run as root.
set -eu
suite=$1 arch=$2 image=$3
shift 3
work=$(mktemp -d)
container=
cleanup() {
    rm -rf "$work"
    [ -z "$container" ] || buildah "$@" rm "$container" > /dev/null
}
trap 'cleanup "$@"' EXIT
"$(dirname "$0")/debian-sources.sh" "$suite" > "$work/debian.sources"
if [ ! -s "$work/debian.sources" ]; then
    echo "base.sh: apt knows no Debian mirror of $suite; run apt-get update, or set EDGE_DEBIAN_MIRROR=URL" >&2
    exit 1
fi
# Without documentation and locales: 48 MB in place of 62 compressed.
mmdebstrap --quiet --variant=minbase --architectures="$arch" \
    --aptopt='APT::Install-Recommends "false"' --aptopt='Acquire::Languages "none"' \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/info/*' \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
    --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/lintian/*' \
    --customize-hook='rm -rf "$1"/etc/apt/sources.list "$1"/etc/apt/sources.list.d/* "$1"/var/lib/apt/lists/*' \
    --customize-hook='rm -rf "$1"/var/cache/apt/* "$1"/var/log/*.log "$1"/var/log/apt "$1"/etc/resolv.conf' \
    --customize-hook='rm -f "$1"/etc/hostname; : > "$1"/etc/apt/sources.list.d/debian.sources' \
    "$suite" "$work/base.tar" "$work/debian.sources"
container=$(buildah "$@" from scratch)
buildah "$@" add --quiet "$container" "$work/base.tar" / > /dev/null
buildah "$@" config --cmd /bin/sh --env LANG=C.UTF-8 \
    --label "org.opencontainers.image.title=Debian $suite ($arch), slim, made by mmdebstrap" "$container"
buildah "$@" commit --quiet "$container" "$image"
