#!/usr/bin/env bash
# k8s/components/haproxy/haproxy.cfg in front of two real servers: prompts, identities, servers that come and go,
# limits and HTTP/2 abuse. Part of scripts/test --all; needs haproxy, openssl and python3, no root.
#   tests/haproxy.sh [BIN]   BIN: the folder of structkv-server and structkv; default: build/release/bin
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${1:-build/release/bin}
for program in haproxy openssl python3; do
  # Debian's haproxy is in /usr/sbin, which is not on everybody's PATH.
  PATH=$PATH:/usr/sbin command -v "$program" >/dev/null || { echo "haproxy: $program is not installed"; exit 77; }
done
PATH=$PATH:/usr/sbin exec python3 tests/haproxy/check.py "$bin"
