#!/bin/sh
# get_oras.sh TARGET: the oras command out of Debian's unstable suite, unpacked and not installed; apt checks its signatures.
set -eu
target=$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/parts"
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Label: Debian' | head -n 1)
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror sid main" > "$work/sid.list"
set -- -qq -o Dir::Etc::sourcelist="$work/sid.list" -o Dir::Etc::sourceparts="$work/parts" \
    -o Dir::State::lists="$work/lists" -o Dir::Cache="$work/cache" -o APT::Sandbox::User=root -o Acquire::Languages=none
apt-get "$@" update
(cd "$work" && apt-get "$@" download oras && dpkg -x oras_*.deb unpacked)
install -m 755 "$work/unpacked/usr/bin/oras" "$target"
