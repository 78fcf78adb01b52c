#!/usr/bin/env bash
# Builds the images of container/ with buildah, from a Debian root that debootstrap makes, starts them as a cluster
# would (read-only root, numeric user, no capabilities, a memory limit), and has a client outside compress a prompt
# through them. Needs root, Debian's mirror, and Debian's debootstrap, buildah and runc (scripts/setup --all).
#   tests/container.sh [cpu|cuda]...     default: cpu, and cuda where this machine has nvcc
# 77: skipped, the last line says why. Things lie in build/container; a second run builds what has changed alone.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { echo "container: $*"; }
skip() { say "skipped: $*"; exit 77; }
fail() { say "FAILED: $*" >&2; exit 1; }

[[ $(id -u) -eq 0 ]] || skip "building and running images needs root"
for tool in debootstrap buildah runc python3 curl; do
  command -v "$tool" >/dev/null || skip "there is no $tool; scripts/setup --all installs it"
done
cuda=/usr/local/cuda
nccl=$cuda/lib/libnccl.so.2
left_out=()
if [[ $# -eq 0 ]]; then
  set -- cpu
  [[ -x $cuda/bin/nvcc ]] && set -- cpu cuda || left_out+=("the image with CUDA, there is no $cuda/bin/nvcc")
fi

work=$PWD/build/container
mkdir -p "$work"
buildah() { command buildah --root "$work/storage" --runroot "$work/run" "$@"; }
base=localhost/structkv-debian:12
revision=$(git rev-parse --short=12 HEAD || echo none)$(git diff --quiet HEAD || echo -changed)
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}

# What a failure would leave behind.
containers=() started=()
clean_up() {
  local each
  for each in "${started[@]}"; do
    runc --root "$work/runc" kill "$each" KILL >/dev/null 2>&1 || true
    runc --root "$work/runc" delete --force "$each" >/dev/null 2>&1 || true
  done
  for each in "${containers[@]}"; do
    buildah umount "$each" >/dev/null 2>&1 || true
    buildah rm "$each" >/dev/null 2>&1 || true
  done
}
trap clean_up EXIT

make_base() {
  if buildah images "$base" >/dev/null 2>&1; then
    say "base: $base is there"
    return
  fi
  say "base: debootstrap from $mirror"
  rm -rf "$work/root"
  debootstrap --variant=minbase --include=ccache bookworm "$work/root" "$mirror" >"$work/debootstrap.log" 2>&1 ||
    { tail -n 3 "$work/debootstrap.log"; skip "debootstrap failed, log in $work/debootstrap.log"; }
  # Only here: what this machine has compiled already is not compiled again.
  printf '%s\n' 'cache_dir = /ccache' 'base_dir = /src' 'hash_dir = false' 'max_size = 12G' >"$work/root/etc/ccache.conf"
  local container
  container=$(buildah from scratch)
  containers+=("$container")
  buildah add --quiet "$container" "$work/root" / >/dev/null
  buildah commit --quiet "$container" "$base" >/dev/null
  buildah rm "$container" >/dev/null
  rm -rf "$work/root"
}

build_image() {
  local kind=$1 file=container/Containerfile options=()
  if [[ $kind == cuda ]]; then
    file=container/Containerfile.cuda
    # This machine's toolkit stands in for NVIDIA's packages.
    options=(--volume "$(readlink -f $cuda):$cuda:ro")
    [[ -e $nccl ]] && options+=(--volume "$(readlink -f "$nccl"):/usr/lib/x86_64-linux-gnu/libnccl.so.2:ro")
  fi
  say "$kind: building from $file (log in $work/build-$kind.log)"
  local cache=$work/ccache
  command -v ccache >/dev/null && cache=$(ccache --get-config cache_dir)
  mkdir -p "$cache"
  options+=(--volume "$cache:/ccache")
  buildah build --layers --isolation chroot --network host --build-arg "BASE=$base" --build-arg "JOBS=$(nproc)" \
    --build-arg "REVISION=$revision" "${options[@]}" -f "$file" -t "localhost/structkv:$kind" . >"$work/build-$kind.log" 2>&1 ||
    { tail -n 30 "$work/build-$kind.log"; fail "the image structkv:$kind"; }
}

# What an image may not have.
inspect_root() {
  local kind=$1 root=$2
  local found
  for found in sh bash dash busybox perl python3 apt dpkg; do
    [[ -z $(find "$root" -name "$found" \( -type f -o -type l \) -perm /111) ]] || fail "$kind has $found"
  done
  found=$(find "$root" -xdev -type f -perm /6000)
  [[ -z $found ]] || fail "$kind has files with setuid or setgid: $found"
  found=$(find "$root" -xdev -type f -user 65532)
  [[ -z $found ]] || fail "$kind has files that its user may change: $found"
  [[ -s $root/etc/ssl/certs/ca-certificates.crt ]] || fail "$kind has no authorities of TLS"
  found=$(chroot "$root" /usr/bin/structkv-server --version)
  grep -qx "revision: $revision" <<<"$found" || fail "$kind is not of the revision $revision: $found"
  say "$kind: $(du -sh --apparent-size "$root" | cut -f1), $(find "$root" -xdev -type f | wc -l) files, no shell"
}

field() { sed -n "s/^$2:[[:space:]]*\([^[:space:]]*\).*/\1/p" "/proc/$1/status"; }
held_to() {
  local pid=$1
  [[ $(field "$pid" Uid) == 65532 ]] || fail "the user is $(field "$pid" Uid)"
  [[ $(field "$pid" CapEff) == 0000000000000000 ]] || fail "capabilities: $(field "$pid" CapEff)"
  [[ $(field "$pid" NoNewPrivs) == 1 ]] || fail "new privileges are allowed"
  awk '$5 == "/" { found = ($6 ~ /(^|,)ro(,|$)/) } END { exit !found }' "/proc/$pid/mountinfo" ||
    fail "the root can be written to"
}

# Starts the image, compresses through it, and stops it.
serve() {
  local kind=$1 image=localhost/structkv:$1 name=structkv-$1-$$
  local bundle=$work/bundle-$kind log=$work/serve-$kind.log container root
  container=$(buildah from "$image")
  containers+=("$container")
  root=$(buildah mount "$container")
  inspect_root "$kind" "$root"
  rm -rf "$bundle"
  mkdir -p "$bundle"
  # Debian's buildah has no json in --format.
  buildah inspect --type image "$image" |
    python3 -c 'import json, sys; json.dump(json.load(sys.stdin)["OCIv1"]["config"], sys.stdout)' >"$bundle/image.json"
  python3 tests/container/bundle.py "$bundle" "$root" "$bundle/image.json" $((1 << 30)) \
    --listen 127.0.0.1:0 --admin-listen 127.0.0.1:0 --memory-budget 512MiB --log-format json
  started+=("$name")
  runc --root "$work/runc" run --bundle "$bundle" "$name" >"$log" 2>&1 </dev/null &
  local runner=$! state=0
  check_served "$kind" "$name" "$log" || state=$?
  runc --root "$work/runc" kill "$name" TERM 2>/dev/null || true
  local code=0
  wait "$runner" || code=$?
  buildah rm "$container" >/dev/null
  [[ $state -eq 0 ]] || { tail -n 5 "$log" >&2; fail "$kind did not serve"; }
  [[ $code -eq 0 ]] || { tail -n 5 "$log" >&2; fail "$kind ended with $code after SIGTERM"; }
  grep -q '"event":"stopped"' "$log" || fail "$kind did not say that it stopped"
  say "$kind: drained and ended with 0 on SIGTERM"
}

check_served() {
  local kind=$1 name=$2 log=$3 ready='' address admin pid
  for _ in $(seq 300); do
    ready=$(grep -a '"event":"ready"' "$log" || true)
    [[ -n $ready ]] && break
    sleep 0.1
  done
  [[ -n $ready ]] || { say "no line 'ready' in 30 s"; return 1; }
  address=$(python3 -c 'import json,sys; print(json.loads(sys.argv[1])["listen"])' "$ready") || return 1
  admin=$(python3 -c 'import json,sys; print(json.loads(sys.argv[1])["admin"])' "$ready") || return 1
  [[ $kind != cuda || $ready == *'"backend":"cuda"'* ]] || left_out+=("a GPU, $kind served with the CPU")
  say "$kind: serves at $address with $(python3 -c 'import json,sys; r=json.loads(sys.argv[1]); print(r["backend"], "-", r["backend_reason"])' "$ready")"
  pid=$(runc --root "$work/runc" state "$name" | python3 -c 'import json,sys; print(json.load(sys.stdin)["pid"])')
  held_to "$pid"
  local path
  for path in livez readyz metrics; do
    curl --fail --silent --max-time 5 --output /dev/null "http://$admin/$path" || { say "/$path does not answer"; return 1; }
  done
  local capture=tests/data/capture-tiny-llama-1000.safetensors
  "$client" compress "$capture" --server "$address" --out "$work/served.safetensors" >"$work/client.log" 2>&1 ||
    { cat "$work/client.log"; return 1; }
  "$client" compress "$capture" --in-process --out "$work/embedded.safetensors" >>"$work/client.log" 2>&1 ||
    { cat "$work/client.log"; return 1; }
  cmp "$work/served.safetensors" "$work/embedded.safetensors" || { say "the answer is not that of the library"; return 1; }
  say "$kind: a prompt of 1,000 tokens came back as the library in this build makes it, to the byte"
}

client=build/release/bin/structkv
[[ -x $client ]] || scripts/build release structkv
make_base
for kind in "$@"; do
  case $kind in
    cpu | cuda) build_image "$kind"; serve "$kind" ;;
    *) fail "unknown kind '$kind'; allowed: cpu, cuda" ;;
  esac
done
# This machine's toolkit stood in for it, if for anything.
left_out+=("container/cuda_toolkit")
say "passed: $*; left out: $(printf '%s; ' "${left_out[@]}" | sed 's/; $//')"
