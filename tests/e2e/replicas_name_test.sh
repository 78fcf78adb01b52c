#!/usr/bin/env bash
# Servers behind a name whose addresses change while prompts run: replicas_name_test.sh SERVER COMMAND. The name is looked up
# as any other, in an /etc/hosts of the test's own. Exits with 77 where that cannot be had.
set -euo pipefail

if [[ $1 != --inside ]]; then
  if ! unshare --user --map-root-user --mount mount --bind /etc/hosts /etc/hosts 2>/dev/null; then
    echo "SKIPPED: no user and mount namespaces (unshare --user --mount), or no mounts in them"
    exit 77
  fi
  exec unshare --user --map-root-user --mount "$0" --inside "$@"
fi
server=$2
command=$3

folder=$(mktemp -d)
declare -A pids=()
cleanup() {
  touch "$folder/stop"
  for pid in "${pids[@]}" "${load:-}"; do
    [[ -n $pid ]] && kill -KILL "$pid" 2>/dev/null || true
  done
  rm -rf "$folder"
}
trap cleanup EXIT
fail() {
  echo "FAILED: $*" >&2
  cat "$folder"/load* >&2 2>/dev/null || true
  exit 1
}
# Polls a condition.
eventually() {
  for _ in $(seq 600); do
    if "$@"; then return 0; fi
    sleep 0.05
  done
  fail "never true: $*"
}

port=0
# Servers have one port at addresses of their own, as pods have.
start() {
  local log=$folder/server$1
  "$server" --listen "127.0.0.$1:$port" --admin-listen off --region-socket "" --threads 1 --memory-budget 64MiB \
    >"$log" 2>&1 &
  pids[$1]=$!
  eventually grep -q ready "$log"
  port=$(sed -n 's/.*listen=127\.0\.0\.[0-9]*:\([0-9]*\).*/\1/p' "$log" | head -n 1)
}
# SIGTERM: it drains, and is gone.
stop() {
  kill -TERM "${pids[$1]}"
  wait "${pids[$1]}" || fail "server $1 ended with $?"
  unset "pids[$1]"
}
name_is() {
  local host
  { echo "127.0.0.1 localhost"; for host in "$@"; do echo "127.0.0.$host replicas.test"; done; } >"$folder/new"
  cat "$folder/new" >"$folder/hosts"
}
sessions() { grep -c 'status=OK' "$folder/server$1" || true; }
has_more_than() { [[ $(sessions "$1") -gt $2 ]]; }
# A client that starts now finds both.
both_ready() {
  local states
  states=$("$command" info --server "dns:///replicas.test:$port" 2>/dev/null) || return 1
  [[ $(grep -c -w ready <<<"$states") -eq 2 ]]
}
bench() {
  "$command" bench --server "dns:///replicas.test:$port" --layers 4 --query-heads 8 --kv-heads 2 --dim 64 --tokens 512 "$@"
}

touch "$folder/hosts"
mount --bind "$folder/hosts" /etc/hosts

start 2
start 3
name_is 2 3
echo "both replicas get prompts"
bench --prompts 20 --concurrency 2 >"$folder/load" 2>&1 || fail "bench ended with $?"
has_more_than 2 0 || fail "127.0.0.2 had none"
has_more_than 3 0 || fail "127.0.0.3 had none"

echo "replicas are replaced under load, and no prompt fails"
(
  while [[ ! -e $folder/stop ]]; do
    bench --prompts 100 --concurrency 2 >"$folder/load" 2>&1 || { touch "$folder/failed"; break; }
  done
) &
load=$!
before=$(sessions 2)
eventually has_more_than 2 "$before"
start 4
name_is 3 4
stop 2
eventually has_more_than 4 0
start 5
name_is 4 5
stop 3
eventually has_more_than 5 0
touch "$folder/stop"
wait "$load" || true
load=
[[ ! -e $folder/failed ]] || fail "a prompt failed"

echo "a replica that is silent keeps no prompt"
kill -STOP "${pids[4]}"
timeout 60 "$command" bench --server "dns:///replicas.test:$port" --layers 4 --query-heads 8 --kv-heads 2 --dim 64 --tokens 512 \
  --prompts 20 --concurrency 2 >"$folder/load" 2>&1 || fail "bench ended with $?"
kill -CONT "${pids[4]}"
eventually both_ready

echo "shards meet at one of them"
bench --prompts 20 --shards 2 >"$folder/load" 2>&1 || fail "bench ended with $?"
stop 4
stop 5
echo "ok"
