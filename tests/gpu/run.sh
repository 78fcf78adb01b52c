#!/usr/bin/env bash
# Everything that needs a GPU, in one go: builds, checks under compute-sanitizer, times, and writes a report.
#
#   tests/gpu/run.sh [OUT]        on a machine with a GPU; report.json, table.md and logs go to OUT (default: gpu-report)
#   tests/gpu/run.sh --bundle DIR here: puts the programs and their libraries into DIR, to be brought along to a machine
#                                 that has none of the packages; there: STRUCTKV_GPU_BUNDLE=DIR tests/gpu/run.sh
#
# The server and the client are among them: they compress a captured prompt and synthetic ones on the GPU (serve.py), and
# prompts over each transport, CUDA IPC and NCCL among them, beside their floors (structkv_wire_bench).
# Without a bundle the programs are built from this tree (CMake, nvcc, the packages of scripts/setup); where only CMake
# and nvcc are, the benchmark alone is. What could not run is in the report as "not run", with the reason.
set -euo pipefail
cd "$(dirname "$0")/../.."
tests=(gpu_saliency_test gpu_select_test gpu_gather_test gpu_rotation_test gpu_conformance_test gpu_ipc_test)
programs=("${tests[@]}" gpu_nccl_test structkv_gpu_bench structkv_overlap_bench structkv-server structkv structkv_wire_bench structkv_wire_count
  structkv_counting_server)
# A few cases of each: a kernel runs some hundred times longer under compute-sanitizer.
declare -A sanitized=(
  [gpu_saliency_test]='*bf16_bf16*:*f32_f8_e4m3*:CudaSaliencyInputTest.Depends*'
  [gpu_select_test]='*Many*:*LongRow*:*SumsAre*:*StatisticsAre*:*Pools*'
  [gpu_gather_test]='*Alignment*:*AnyNumber*:*PartOfEachRow*'
  [gpu_rotation_test]='*Alignment*:*DoesNotMove*'
  [gpu_conformance_test]='*PagedSaliency*bf16_bf16_q4*:*GathersRows*:*MovesKeysInBlocks*'
  [gpu_ipc_test]='*OfThisProcess')

build() {
  cmake --preset cuda >&2
  cmake --build --preset cuda --target "${programs[@]}" >&2
}

# Where the loader, or else the toolkit, has libnccl.so.2; STRUCTKV_NCCL goes first. Empty: nowhere.
find_nccl() {
  local at
  for at in "${STRUCTKV_NCCL:-}" "$(ldconfig -p | awk '$1 == "libnccl.so.2" {print $NF; exit}')" \
    /usr/local/cuda/lib/libnccl.so.2 /usr/local/cuda/lib64/libnccl.so.2; do
    if [[ -n $at && -e $at ]]; then
      readlink -f "$at"
      return
    fi
  done
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
  # Loaded at run time: no program names it.
  nccl=$(find_nccl)
  if [[ -n $nccl ]]; then
    cp -L "$nccl" "$2/libnccl.so.2"
    echo "run.sh: NCCL is $nccl" | tee "$2/nccl.txt"
  else
    echo "run.sh: no libnccl.so.2 found (STRUCTKV_NCCL says where it is): gpu_nccl_test will not run" | tee "$2/nccl.txt"
  fi
  exit 0
fi

out=${1:-gpu-report}
mkdir -p "$out"
: >"$out/summary.txt"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>&1 | tee "$out/device.txt" || true

if [[ -n ${STRUCTKV_GPU_BUNDLE:-} ]]; then
  bin=$STRUCTKV_GPU_BUNDLE
  export LD_LIBRARY_PATH=$bin${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
elif build; then
  bin=build/cuda/bin
else
  echo "run.sh: the tests cannot be built here; the benchmark alone" >&2
  bin=$out/bin
  mkdir -p "$bin"
  nvcc -std=c++20 -O3 -I. -arch=native -o "$bin/structkv_gpu_bench" tests/gpu/gpu_bench.cc tests/gpu/layer_bench.cc \
    kernels/cuda/*.cu >&2
fi

failed=0
checks=""
# note CHECK RESULT: a line of the summary and an entry of the report.
note() {
  echo "run.sh: $1: $2" | tee -a "$out/summary.txt"
  checks+="${checks:+, }\"$1\": \"$2\""
  [[ $2 != FAILED ]] || failed=1
}
# check NAME LOG COMMAND...
check() {
  local name=$1 log=$2
  shift 2
  if ! "$@" >"$log" 2>&1; then
    note "$name" FAILED
  elif grep -q SKIPPED "$log"; then
    note "$name" "not run: $(grep -m1 'no GPU' "$log" || echo skipped)"
  else
    note "$name" passed
  fi
}

[[ ! -f $bin/nccl.txt ]] || note NCCL "$(sed 's/^run.sh: //' "$bin/nccl.txt")"
for test in "${tests[@]}"; do
  if [[ ! -x $bin/$test ]]; then
    note "$test" "not run: not built"
    continue
  fi
  check "$test" "$out/$test.log" "$bin/$test"
  for tool in memcheck racecheck initcheck synccheck; do
    if command -v compute-sanitizer >/dev/null; then
      check "$test, $tool" "$out/$test.$tool.log" compute-sanitizer --tool "$tool" --error-exitcode 9 \
        "$bin/$test" --gtest_filter="${sanitized[$test]}"
    else
      note "$test, $tool" "not run: no compute-sanitizer"
    fi
  done
done

# Not under compute-sanitizer: NCCL's own kernels wait for each other.
if [[ -x $bin/gpu_nccl_test ]]; then
  check gpu_nccl_test "$out/gpu_nccl_test.log" timeout 300 "$bin/gpu_nccl_test"
  while IFS= read -r line; do
    note "${line%%: *}" "${line#*: }"
  done < <(sed -n 's/^result: //p' "$out/gpu_nccl_test.log")
else
  note gpu_nccl_test "not run: not built"
fi

serve=null
if [[ -x $bin/structkv-server && -x $bin/structkv ]]; then
  if python3 tests/gpu/serve.py --bin "$bin" --capture tests/data/capture-tiny-llama-1000.safetensors \
    >"$out/serve.json" 2>"$out/serve.log"; then
    note "server and client" passed
    serve=$(<"$out/serve.json")
  elif grep -qE 'no CUDA device|not built with CUDA' "$out/serve.log"; then
    note "server and client" "not run: $(grep -oEm1 'no CUDA device|not built with CUDA' "$out/serve.log")"
  else
    note "server and client" FAILED
  fi
else
  note "server and client" "not run: not built"
fi

# Rows that cannot be run (NCCL takes two GPUs) say why.
wire=null
if [[ -x $bin/structkv_wire_bench && -x $bin/structkv-server ]]; then
  flags=(--server "$bin/structkv-server" --holds 3 --gib 0.25 --transports 3)
  if [[ -x $bin/structkv_wire_count && -x $bin/structkv_counting_server ]]; then
    flags+=(--count-program "$bin/structkv_wire_count" --count-server "$bin/structkv_counting_server")
  else
    flags+=(--count-program "")
  fi
  nccl=${STRUCTKV_GPU_BUNDLE:+libnccl.so.2}
  nccl=${nccl:-$(find_nccl)}
  [[ -z $nccl ]] || flags+=(--nccl-library "$nccl")
  if "$bin/structkv_wire_bench" --json --repeats 0 --prompts 0 "${flags[@]}" >"$out/wire.json" 2>"$out/wire.log"; then
    note transports passed
    wire=$(<"$out/wire.json")
    while IFS= read -r line; do
      note "${line%%: *}" "not run: ${line#*: }"
    done < <(python3 -c 'import json, sys
for row in json.load(sys.stdin)["transports"]:
    if "skipped" in row: print("transports, " + row["way"] + ": " + row["skipped"].replace("\"", "\x27"))' <"$out/wire.json")
  else
    note transports FAILED
  fi
else
  note transports "not run: not built"
fi

bench=null
if "$bin/structkv_gpu_bench" --table "$out/table.md" >"$out/bench.json"; then
  note benchmark passed
  bench=$(<"$out/bench.json")
else
  note benchmark FAILED
  : >"$out/table.md"
fi

# Copies from the host and computation, each alone and together, on one GPU.
overlap=null
one_gpu=${CUDA_VISIBLE_DEVICES:-0}
if [[ ! -x $bin/structkv_overlap_bench ]]; then
  note overlap "not run: not built"
elif CUDA_VISIBLE_DEVICES=${one_gpu%%,*} "$bin/structkv_overlap_bench" --table "$out/table.md" \
  >"$out/overlap.json" 2>"$out/overlap.log"; then
  note overlap passed
  overlap=$(<"$out/overlap.json")
elif grep -q 'no CUDA device' "$out/overlap.log"; then
  note overlap "not run: no CUDA device"
else
  note overlap FAILED
fi

# Says itself where it cannot run, and why.
python3 tests/gpu/torch_compare.py --bench "$out/bench.json" --table "$out/table.md" >"$out/torch.json" ||
  echo '{"skipped": "torch_compare.py failed"}' >"$out/torch.json"
torch=$(<"$out/torch.json")
case $torch in
  *'"skipped"'*) note PyTorch "not run: $(sed -n 's/.*"skipped": "\([^"]*\)".*/\1/p' "$out/torch.json")" ;;
  *) note PyTorch passed ;;
esac
printf '{"checks": {%s},\n"serve": %s,\n"transports": %s,\n"bench": %s,\n"overlap": %s,\n"torch": %s}\n' "$checks" "$serve" "$wire" "$bench" \
  "$overlap" "$torch" >"$out/report.json"
cat "$out/table.md"
exit $failed
