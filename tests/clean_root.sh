#!/usr/bin/env bash
# Shows that a clone is enough: makes a bare Debian 12 root, clones HEAD into it, and runs scripts/demo and
# scripts/test there. Needs root, debootstrap and git. A command, not part of scripts/test (about 30 minutes).
#   tests/clean_root.sh [ROOT]   ROOT: an existing bare root to use (it is changed); default: a new one, removed
#   DEBIAN_MIRROR=...            Debian mirror; default: debootstrap's
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
root=${1:-}
if [[ -z $root ]]; then
  root=$(mktemp -d)
  trap 'umount "$root/proc" 2>/dev/null || true; rm -rf "$root"' EXIT
  debootstrap --variant=minbase bookworm "$root" ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"}
else
  trap 'umount "$root/proc" 2>/dev/null || true' EXIT
fi
mountpoint -q "$root/proc" || mount -t proc proc "$root/proc"
cp /etc/resolv.conf "$root/etc/resolv.conf"
rm -rf "$root/structkv"
git clone -q "$repository" "$root/structkv"
for command in scripts/demo scripts/test; do
  echo "clean_root: $command"
  chroot "$root" /usr/bin/env -i HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    "/structkv/$command"
done
echo "clean_root: both commands passed"
