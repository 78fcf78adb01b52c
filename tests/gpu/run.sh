#!/usr/bin/env bash
# Everything that needs a GPU, in one go: checks, times, and writes a report.
#
#   tests/gpu/run.sh [--budget SECONDS] [--limit SECONDS] [--only PATTERN] [OUT]
#       on a machine with a GPU. Into OUT (default: gpu-report): report.json, table.md and logs.tar.gz, written anew after
#       every step, so that a run that is ended leaves what it has. Exit code: 1 where a check failed, 77 where none could
#       run, else 0
#   tests/gpu/run.sh --bundle DIR [-DVARIABLE=VALUE]...
#       where the packages of scripts/setup are: builds the programs and packs them, with the libraries that they need, into
#       DIR/gpu-bundle.tar.xz, to be brought to a machine that has none of these (tests/gpu/bundle.sh)
#
# Programs come from the first of these that there is:
#   a bundle   STRUCTKV_GPU_BUNDLE: the folder DIR, the file in it, or a folder of programs. Nothing is built
#   CMake      where the packages are, the programs are built from this tree; that is no part of the budget
#   nvcc       (12.8 or newer) alone builds the kernels and their benchmark, not the tests, which need abseil and GoogleTest
# In this order run (tests/gpu/runner/plan.py): the benchmark of the kernels, PyTorch beside it, and copies beside computation,
# each alone; the tests, several at once, and some cases of each under compute-sanitizer; the server and the client
# (serve.py), and prompts over each transport beside their floors (structkv_wire_bench); NCCL.
#   --budget   seconds from the start of this script (default 520): what has not begun then is "skipped: no time left"
#   --limit    seconds of a step at most, in the place of each one's own limit where that is longer
#   --only     steps whose name matches: 'benchmark|torch', 'gpu_select_test', 'memcheck'
# What could not run is in the report as "not run", with the reason. STRUCTKV_NCCL: path of libnccl.so.2, which is else
# looked for where the loader, Python (PyTorch has one) and the CUDA toolkit have theirs.
set -euo pipefail
usage() { sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0"; }
die() {
  echo "run.sh: $*" >&2
  exit 2
}

budget=520
limit=inf
only=
while [[ ${1:-} == -* ]]; do
  case $1 in
    --help | -h) usage; exit ;;
    --bundle) shift; exec "$(dirname "$0")/bundle.sh" "$@" ;;
    --budget | --limit)
      [[ ${2:-} =~ ^[0-9]+$ ]] || die "$1 takes whole seconds"
      declare "${1#--}=$2"
      shift 2
      ;;
    --only) only=${2?run.sh: --only takes a pattern}; shift 2 ;;
    *) usage >&2; die "unknown flag '$1'" ;;
  esac
done
[[ $# -le 1 ]] || { usage >&2; exit 2; }
out=$(realpath -m "${1:-$(dirname "$0")/../../gpu-report}")
bundle=${STRUCTKV_GPU_BUNDLE:+$(realpath -m "$STRUCTKV_GPU_BUNDLE")}
cd "$(dirname "$0")/../.."
# shellcheck source=tests/gpu/programs.sh
source tests/gpu/programs.sh
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out" "$work/logs"
missing="not built"

unpack() {
  mkdir "$work/bin"
  if command -v xz >/dev/null; then tar -xJf "$1" -C "$work/bin"; else python3 -m tarfile -e "$1" "$work/bin"; fi
  bin=$work/bin
}

compile() { nvcc -std=c++20 -O3 -I. -arch=native -c -o "$objects/$(basename "$1").o" "$1" >&2; }
build_by_nvcc() {
  export objects=$work/objects
  export -f compile
  mkdir -p "$objects" "$work/bin"
  printf '%s\n' tests/gpu/gpu_bench.cc tests/gpu/layer_bench.cc kernels/cuda/*.cu |
    xargs -P "$(nproc)" -I{} bash -c 'compile {}' &&
    nvcc -arch=native -o "$work/bin/structkv_gpu_bench" "$objects"/*.o >&2
}

if [[ -n $bundle ]]; then
  [[ ! -f $bundle/gpu-bundle.tar.xz ]] || bundle=$bundle/gpu-bundle.tar.xz
  [[ -e $bundle ]] || die "no '$bundle' (STRUCTKV_GPU_BUNDLE)"
  bin=$bundle
  [[ -d $bundle ]] || unpack "$bundle"
  about="programs of $bundle"
  [[ ! -f $bin/bundle.txt ]] || about=$(<"$bin/bundle.txt")
  missing="not in the bundle"
elif cmake --preset cuda >"$work/logs/configure.log" 2>&1; then
  cmake --build --preset cuda --target "${programs[@]}" >&2 || die "the build failed"
  SECONDS=0
  bin=$PWD/build/cuda/bin
  about="built from this tree by CMake"
else
  grep -A3 'CMake Error' "$work/logs/configure.log" >&2 || true
  echo "run.sh: CMake cannot configure this tree here, as above; building the kernels and their benchmark by nvcc alone" >&2
  command -v nvcc >/dev/null || die "no nvcc, and no bundle (STRUCTKV_GPU_BUNDLE)"
  build_by_nvcc || die "the build failed"
  bin=$work/bin
  about="built from this tree by nvcc alone; with the packages of scripts/setup, or a bundle, there is more (run.sh --help)"
  missing="not built by nvcc alone"
fi

if ! command -v python3 >/dev/null; then
  echo "run.sh: no python3, which runs the steps and writes report.json; the benchmark alone" >&2
  timeout $((budget > SECONDS ? budget - SECONDS : 1)) "$bin/structkv_gpu_bench" --table "$out/table.md" >"$out/bench.json"
  exit
fi
python3 tests/gpu/runner --programs "$bin" --missing "$missing" --about "$about" --work "$work/logs" \
  --seconds $((budget - SECONDS)) --limit "$limit" --only "$only" "$out"
