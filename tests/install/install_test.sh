#!/usr/bin/env bash
# Installs the client and the server into a temporary prefix, builds the example twice outside of the source tree
# (CMake's find_package, pkg-config), and runs both programs against the installed server.
#   install_test.sh BUILD_DIR EXAMPLE_DIR LIBDIR    CMAKE, CXX, CXXFLAGS, LDFLAGS, CMAKE_GENERATOR: environment
set -euo pipefail
build=$1
example=$2
libdir=$3

work=$(mktemp -d)
server=
cleanup() {
  if [[ -n $server ]]; then
    kill "$server" 2>/dev/null || true
    wait "$server" 2>/dev/null || true
  fi
  rm -rf "$work"
}
trap cleanup EXIT
fail() { echo "install_test: $*" >&2; exit 1; }
# Runs a command whose output matters only where it fails.
quietly() { "$@" >"$work/log" 2>&1 || { cat "$work/log" >&2; fail "failed: $*"; }; }

# The prefix moves after the installation: nothing in it may hold an absolute path of its own.
for component in client server; do
  quietly "$CMAKE" --install "$build" --prefix "$work/installed" --component "$component"
done
mv "$work/installed" "$work/prefix"
prefix=$work/prefix
if grep -rlI -e "$build" -e "$work/installed" "$prefix"; then fail "the files above name the build or its prefix"; fi

# Every public header compiles alone, with nothing but the prefix and what the .pc file says.
export PKG_CONFIG_PATH=$prefix/$libdir/pkgconfig
cflags=$(pkg-config --cflags structkv)
headers=0
for header in "$prefix"/include/structkv/*.h; do
  echo "#include \"structkv/${header##*/}\"" >"$work/header.cc"
  # shellcheck disable=SC2086
  quietly "$CXX" -std=c++17 -Wall -Wextra -Werror -fsyntax-only $cflags "$work/header.cc"
  headers=$((headers + 1))
done
[[ $headers -gt 0 ]] || fail "no public header was installed"

cp -r "$example" "$work/example"
quietly "$CMAKE" -S "$work/example" -B "$work/with-cmake" -DCMAKE_PREFIX_PATH="$prefix"
quietly "$CMAKE" --build "$work/with-cmake"
# shellcheck disable=SC2046,SC2086
quietly "$CXX" -std=c++20 $CXXFLAGS $cflags "$work/example/main.cc" -o "$work/with-pkg-config" \
  $LDFLAGS $(pkg-config --libs structkv)

"$prefix/bin/structkv-server" --listen "unix:$work/socket" --admin-listen off >"$work/server.log" 2>&1 &
server=$!
for _ in $(seq 300); do
  grep -q ready "$work/server.log" && break
  kill -0 "$server" 2>/dev/null || break
  sleep 0.1
done
grep -q ready "$work/server.log" || { cat "$work/server.log" >&2; fail "the server does not start"; }

for program in with-cmake/structkv_example with-pkg-config; do
  timeout 60 "$work/$program" "unix:$work/socket" >"$work/output" || fail "$program failed"
  # A tenth of 2,000 tokens in 2 heads of 64 floats; a fifth of them in the skeleton.
  for layer in 0 1 2 3; do
    grep -qx "layer $layer: 200 of 2000 tokens, 102400 bytes of keys" "$work/output" ||
      { cat "$work/output" >&2; fail "$program: layer $layer is missing or wrong"; }
  done
  grep -qxE "pivot: layer [0-3], skeleton of 400 tokens" "$work/output" ||
    { cat "$work/output" >&2; fail "$program: the pivot is missing or wrong"; }
  [[ $(wc -l <"$work/output") -eq 5 ]] || { cat "$work/output" >&2; fail "$program printed other lines"; }
done

kill -TERM "$server"
wait "$server" || fail "the server exited with $?"
server=
echo "install_test: $headers public headers, and both programs"
