#!/usr/bin/env bash
# tests/gpu/bundle.sh DIR [-DVARIABLE=VALUE]...: builds what tests/gpu/run.sh runs, for a machine that has none of the packages,
# and writes it, with its libraries, into DIR/gpu-bundle.tar.xz. The flags are CMake's: -DCMAKE_CUDA_ARCHITECTURES=80-real in
# the place of sm_90a, say. NCCL is not in it: machines with PyTorch have one.
set -euo pipefail
[[ $# -ge 1 && $1 != -* ]] || { echo "usage: $0 DIR [-DVARIABLE=VALUE]..." >&2; exit 2; }
to=$(realpath -m "$1")
shift
cd "$(dirname "$0")/../.."
# shellcheck source=tests/gpu/programs.sh
source tests/gpu/programs.sh
carried_mib=64  # as much as is carried to a machine, the tree with it

cmake --preset gpu-bundle "$@" >&2
cmake --build --preset gpu-bundle --target "${programs[@]}" >&2

stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
for program in "${programs[@]}"; do
  strip -o "$stage/$program" "build/gpu-bundle/bin/$program"
done
libraries() { ldd "${programs[@]/#/$stage/}" | awk '$2 == "=>" {print $3}' | sort -u; }
glibc='/(libc|libm|libdl|librt|libpthread|libresolv)\.so'
libraries | grep -vE "$glibc" | xargs -r cp -Lt "$stage"
if elsewhere=$(libraries | grep -vE "$glibc" | grep -v "^$stage/"); then
  echo "bundle: not in the bundle: $elsewhere" >&2
  exit 1
fi
architectures=$(sed -n 's/^CMAKE_CUDA_ARCHITECTURES[^=]*=//p' build/gpu-bundle/CMakeCache.txt)
revision=$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)$(git diff --quiet HEAD 2>/dev/null || echo -changed)
echo "a bundle of revision $revision, CUDA architectures $architectures" >"$stage/bundle.txt"

# The programs have kernels in common: a dictionary as large as several of them finds these again.
mkdir -p "$to"
tar -C "$stage" --sort=name --owner=0 --group=0 -cf - . | xz -T1 --lzma2=preset=6,dict=128MiB >"$to/gpu-bundle.tar.xz"
bundle=$(stat -c %s "$to/gpu-bundle.tar.xz")
tree=$(git ls-files -z 2>/dev/null | du -cb --files0-from=- | tail -1 | cut -f1)
awk -v bundle="$bundle" -v tree="$tree" -v most="$carried_mib" -v at="$to/gpu-bundle.tar.xz" 'BEGIN {
  printf "bundle: %s: %.1f MiB, %.1f with the tree, of at most %d\n", at, bundle / 1048576, (bundle + tree) / 1048576, most
  exit bundle + tree > most * 1048576 }'
