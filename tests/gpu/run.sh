#!/usr/bin/env bash
# Everything that needs a GPU, in one go: builds, checks under compute-sanitizer, times, and writes a report.
#
#   tests/gpu/run.sh [OUT]        on a machine with a GPU; report.json, table.md and logs go to OUT (default: gpu-report)
#   tests/gpu/run.sh --bundle DIR here: puts the programs and their libraries into DIR, to be brought along to a machine
#                                 that has none of the packages; there: STRUCTKV_GPU_BUNDLE=DIR tests/gpu/run.sh
#
# Without a bundle the programs are built from this tree (CMake, nvcc, the packages of scripts/setup); where only CMake
# and nvcc are, the benchmark alone is.
set -euo pipefail
cd "$(dirname "$0")/../.."
programs=(gpu_saliency_test structkv_gpu_bench)

build() {
  cmake --preset cuda >&2
  cmake --build --preset cuda --target "${programs[@]}" >&2
}

if [[ ${1:-} == --bundle ]]; then
  [[ $# -eq 2 ]] || { echo "usage: $0 --bundle DIR" >&2; exit 2; }
  build
  mkdir -p "$2"
  for program in "${programs[@]}"; do
    strip -o "$2/$program" "build/cuda/bin/$program"
    ldd "$2/$program" | awk '$3 ~ "^/" {print $3}' | grep -vE '/(libc|libm|libdl|librt|libpthread)\.so' |
      xargs -r cp -Lt "$2"
  done
  exit 0
fi

out=${1:-gpu-report}
mkdir -p "$out"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/device.txt"

if [[ -n ${STRUCTKV_GPU_BUNDLE:-} ]]; then
  bin=$STRUCTKV_GPU_BUNDLE
  export LD_LIBRARY_PATH=$bin${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
elif build; then
  bin=build/cuda/bin
else
  echo "run.sh: the tests cannot be built here; the benchmark alone" >&2
  bin=$out/bin
  mkdir -p "$bin"
  nvcc -std=c++20 -O3 -I. -arch=native -o "$bin/structkv_gpu_bench" tests/gpu/gpu_bench.cc kernels/cuda/*.cu >&2
fi

failed=0
note() { echo "run.sh: $1" | tee -a "$out/summary.txt"; }
if [[ -x $bin/gpu_saliency_test ]]; then
  "$bin/gpu_saliency_test" >"$out/gpu_saliency_test.log" 2>&1 && note "gpu_saliency_test passed" ||
    { note "gpu_saliency_test FAILED"; failed=1; }
  if command -v compute-sanitizer >/dev/null; then
    # A few cases: a kernel runs some hundred times longer under it.
    for tool in memcheck racecheck initcheck synccheck; do
      compute-sanitizer --tool "$tool" --error-exitcode 9 "$bin/gpu_saliency_test" \
        --gtest_filter='*bf16_bf16*:*f32_f8_e4m3*:CudaSaliencyInputTest.Depends*' >"$out/$tool.log" 2>&1 &&
        note "$tool passed" || { note "$tool FAILED"; failed=1; }
    done
  else
    note "no compute-sanitizer here: NOT RUN"
  fi
fi
"$bin/structkv_gpu_bench" >"$out/report.json" && "$bin/structkv_gpu_bench" --table >"$out/table.md" &&
  note "benchmark done" || { note "benchmark FAILED"; failed=1; }
cat "$out/table.md"
exit $failed
