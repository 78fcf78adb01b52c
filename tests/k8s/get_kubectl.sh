#!/usr/bin/env bash
# Brings kubectl into build/kubectl where the machine has none: the one of Debian 13, which runs on Debian 12, unpacked and
# not installed.
set -euo pipefail
cd "$(dirname "$0")/../.."
target=$PWD/build/kubectl
if command -v kubectl >/dev/null || [[ -x $target/kubectl ]]; then exit 0; fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/{lists/partial,cache/archives/partial} "$target"
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror trixie main" >"$work/sources.list"
apt=(apt-get -qq -o "Dir::Etc::sourcelist=$work/sources.list" -o Dir::Etc::sourceparts=/dev/null -o "Dir::State::lists=$work/lists"
  -o "Dir::Cache=$work/cache" -o APT::Sandbox::User=root -o Dir::Etc::preferencesparts=/dev/null -o Dir::State::status=/dev/null)
"${apt[@]}" update
cd "$work"
"${apt[@]}" download kubectl
dpkg-deb -x kubectl_*.deb unpacked
# Whole or not at all.
cp unpacked/usr/bin/kubectl "$target/kubectl.part"
mv "$target/kubectl.part" "$target/kubectl"
"$target/kubectl" version --client
