#!/usr/bin/env bash
# Has a real kube-apiserver, with a real etcd, take every overlay by a server-side dry run (apiserver.py). The
# apiserver is built from Debian 12's source package, version 1.20.2: what is newer is converted down or left out, and
# said. Needs golang-go, etcd-server, dpkg-dev and golang-github-modern-go-reflect2-dev (scripts/setup --all), and some
# ten minutes of two cores the first time; it stays in build/apiserver. 77: skipped, the last line says why.
set -euo pipefail
cd "$(dirname "$0")/../.."
source=$PWD
work=$source/build/apiserver
mkdir -p "$work"

say() { echo "apiserver: $*"; }
skip() { say "skipped: $*"; exit 77; }

fetch() {
  local keyring=/usr/share/keyrings/debian-archive-keyring.gpg
  mkdir -p "$work"/{lists/partial,cache/archives/partial}
  echo "deb-src [signed-by=$keyring] ${DEBIAN_MIRROR:-http://deb.debian.org/debian} bookworm main" >"$work/sources.list"
  local apt=(apt-get -qq -o "Dir::Etc::sourcelist=$work/sources.list" -o Dir::Etc::sourceparts=/dev/null
    -o "Dir::State::lists=$work/lists" -o "Dir::Cache=$work/cache" -o APT::Sandbox::User=root)
  (cd "$work" && "${apt[@]}" update && "${apt[@]}" source --download-only kubernetes)
}

# GOPATH mode: no module is fetched.
build() {
  export GOPATH=$work/go GO111MODULE=off GOFLAGS='' GOCACHE=$work/gocache CGO_ENABLED=0
  local tree=$GOPATH/src/k8s.io/kubernetes openapi=k8s.io/kubernetes/pkg/generated/openapi
  rm -rf "$GOPATH"
  mkdir -p "$(dirname "$tree")"
  dpkg-source --no-check -x "$work"/kubernetes_*.dsc "$tree"
  # The vendored one is older than Go 1.18.
  rm -rf "$tree/vendor/github.com/modern-go/reflect2"
  cp -rL /usr/share/gocode/src/github.com/modern-go/reflect2 "$tree/vendor/github.com/modern-go/"
  cd "$tree"
  # Not in the source: what describes every type, of the packages that ask for it.
  local inputs
  inputs=$(grep -rl --include='*.go' '^// +k8s:openapi-gen=true' pkg staging/src/k8s.io cmd | sed 's|/[^/]*$||' |
    sed 's|^staging/src/||; s|^\(pkg\|cmd\)/|k8s.io/kubernetes/\1/|' |
    grep -vE '/(sample-|code-generator|apiextensions-apiserver/examples)' |
    sed 's|^k8s.io/kubernetes/||; t own; s|^|k8s.io/kubernetes/vendor/|; b; :own; s|^|k8s.io/kubernetes/|' | sort -u | paste -sd,)
  go run ./vendor/k8s.io/kube-openapi/cmd/openapi-gen --logtostderr -i "$inputs" -p "$openapi" -O zz_generated.openapi \
    -h hack/boilerplate/boilerplate.generatego.txt -r "$work/violations" --output-base "$GOPATH/src"
  go build -o "$work/kube-apiserver" ./cmd/kube-apiserver
  cd "$source"
}

for tool in go etcd dpkg-source openssl; do
  command -v "$tool" >/dev/null || skip "there is no $tool; scripts/setup --all installs it"
done
[[ -d /usr/share/gocode/src/github.com/modern-go/reflect2 ]] || skip "there is no golang-github-modern-go-reflect2-dev"
if [[ ! -x $work/kube-apiserver ]]; then
  compgen -G "$work/kubernetes_*.dsc" >/dev/null || fetch || skip "Debian's source package cannot be had"
  say "building kube-apiserver (log in $work/build.log)"
  (build) >"$work/build.log" 2>&1 || { tail -n 20 "$work/build.log"; say "FAILED: kube-apiserver was not built"; exit 1; }
fi
tests/k8s/get_kubectl.sh || true
exec tests/k8s/k8s_test.sh "$source/build/release" "$source" "$(command -v python3)" --program apiserver.py "$work/kube-apiserver"
