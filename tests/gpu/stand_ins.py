"""Programs that print what those of tests/gpu/run.sh do, or fail as they may, for run_test.py."""
import os
import shlex
import stat
import sys

TESTS = ("gpu_saliency_test", "gpu_select_test", "gpu_gather_test", "gpu_rotation_test", "gpu_conformance_test",
         "gpu_ipc_test")

# What a program does after it has noted its name, its part of a test and its arguments in $CALLS.
PASSES = 'echo "[  PASSED  ] 4 tests."'
FAILS = """echo "[  FAILED  ] Some/Suite.Case/f16, where GetParam() = 1 (5 ms)"
echo "[  FAILED  ] 2 tests, listed below:"
echo "[  FAILED  ] Some/Suite.Case/f16, where GetParam() = 1"
echo "[  FAILED  ] Suite.Other"
exit 1"""
HANGS = "sleep 60"
IGNORES_TERM = "trap '' TERM\nwhile :; do sleep 1; done"
SKIPS_SOME = 'printf "a.cc:1: Skipped\\nno second GPU\\n[  PASSED  ] 3 tests.\\n[  SKIPPED ] 1 test, listed below:\\n"'
SKIPS_ALL = 'printf "a.cc:1: Skipped\\nno GPU: no driver\\n[  PASSED  ] 0 tests.\\n[  SKIPPED ] 2 tests, listed below:\\n"'
SKIPS_BY_ENVIRONMENT = 'printf "a.cc:1: Skipped\\nSKIPPED: no GPU: no driver\\n[  PASSED  ] 2050 tests.\\n"'
RUNS_NOTHING = 'echo "[  PASSED  ] 0 tests."'
NO_DEVICE = "echo 'Error: Device not supported' >&2\necho '[  FAILED  ] Suite.Case'\nexit 9"
NCCL = PASSES + '\necho "result: NCCL, two processes on one GPU: works"'
BENCHMARK = """echo "| step | us |" >"$2"
echo '{"device": "a GPU", "copy_bytes_per_second": 4e12, "rows": []}'"""
NO_GPU = "echo 'structkv_gpu_bench: no GPU: no driver' >&2\nexit 1"
OVERLAP = 'echo "| layers from the host |" >>"$2"\necho \'{"rows": []}\''
WIRE = """echo '{"transports": [{"way": "shared memory"}, {"way": "NCCL", "skipped": "one GPU"}]}'"""
SERVER = "echo ready\nexec sleep 60"
CLIENT = """exec python3 - "$@" <<'END'
import json, struct, sys
if sys.argv[1] == "compress":
    header = json.dumps({"layer.0.positions": {"data_offsets": [0, 4]}}).encode()
    with open(sys.argv[sys.argv.index("--out") + 1], "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header + struct.pack("<i", 7))
    print("{}")
else:
    given = dict(zip(sys.argv[2::2], sys.argv[3::2]))
    names = ("backend", "input_bytes_per_second", "layers_per_second", "compute_micros", "layer_seconds")
    print(json.dumps({"transport": given["--transport"], "tokens": int(given["--tokens"]), **dict.fromkeys(names)}))
END"""
SANITIZER = 'shift 6\nexec "$@"'
GPU = "echo 'NVIDIA H200, 580.1, 143771 MiB'"

PROGRAMS = {
    **dict.fromkeys(TESTS, PASSES),
    "gpu_nccl_test": NCCL,
    "structkv_gpu_bench": BENCHMARK,
    "structkv_overlap_bench": OVERLAP,
    "structkv_wire_bench": WIRE,
    "structkv_wire_count": PASSES,
    "structkv_counting_server": PASSES,
    "structkv-server": SERVER,
    "structkv": CLIENT,
}
# Compiles anything, and links the benchmark.
NVCC = f"""for last; do :; done
while [ "$1" != -o ]; do shift; done
case $last in *.cu | *.cc) echo >"$2" ;; *) printf '%s' {shlex.quote("#!/bin/sh" + chr(10) + BENCHMARK)} >"$2"; chmod +x "$2" ;; esac"""
# On the PATH. The loader knows no NCCL.
TOOLS = {"nvidia-smi": GPU, "compute-sanitizer": SANITIZER, "ldconfig": ":"}
NO_TORCH = 'raise ImportError("libtorch.so: cannot open \\"shared\\" object file")\n'


def write(folder, programs):
    os.makedirs(folder, exist_ok=True)
    for name, body in programs.items():
        path = os.path.join(folder, name)
        with open(path, "w", encoding="utf-8") as file:
            file.write(f'#!/bin/sh\necho "{name} ${{GTEST_SHARD_INDEX:-}} $*" >>"$CALLS"\n{body}\n')
        os.chmod(path, os.stat(path).st_mode | stat.S_IXUSR)


def environment(root, tools):
    """Of a run: `tools` on the PATH, a torch that cannot be imported, and NCCL as Python has it."""
    write(os.path.join(root, "tools"), tools)
    packages = os.path.join(root, "packages")
    nccl = os.path.join(packages, "nvidia/nccl/lib")
    os.makedirs(nccl)
    open(os.path.join(nccl, "libnccl.so.2"), "w", encoding="utf-8").close()
    with open(os.path.join(packages, "torch.py"), "w", encoding="utf-8") as file:
        file.write(NO_TORCH)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("STRUCTKV_", "GTEST_"))}
    path = os.pathsep.join((os.path.join(root, "tools"), os.path.dirname(sys.executable), os.environ["PATH"]))
    return {**kept, "PATH": path, "PYTHONPATH": packages, "CALLS": os.path.join(root, "calls")}
