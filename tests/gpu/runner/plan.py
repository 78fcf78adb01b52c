"""The steps of a run, in three parts: what is timed, alone; tests, several at once; what needs the whole machine."""
import os
import sys

from steps import Step

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "../../.."))
CAPTURE = os.path.join(ROOT, "tests/data/capture-tiny-llama-1000.safetensors")

# Tests, and in how many parts each runs.
TESTS = {
    "gpu_conformance_test": 8,
    "gpu_saliency_test": 4,
    "gpu_select_test": 1,
    "gpu_gather_test": 1,
    "gpu_rotation_test": 1,
    "gpu_ipc_test": 1,
}
# A few cases of each: a kernel runs some hundred times longer under compute-sanitizer.
SANITIZED = {
    "gpu_saliency_test": ("*bf16_bf16*", "*f32_f8_e4m3*", "CudaSaliencyInputTest.Depends*"),
    "gpu_select_test": ("*Many*", "*LongRow*", "*SumsAre*", "*StatisticsAre*", "*Pools*"),
    "gpu_gather_test": ("*Alignment*", "*AnyNumber*", "*PartOfEachRow*"),
    "gpu_rotation_test": ("*Alignment*", "*DoesNotMove*"),
    "gpu_conformance_test": ("*PagedSaliency*bf16_bf16_q4*", "*GathersRows*", "*MovesKeysInBlocks*"),
    "gpu_ipc_test": ("*OfThisProcess",),
}
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


class Plan:
    """`missing`: why programs are not in the folder `programs`. `work`: where steps leave files for others.
    `sanitizer`, `nccl`: paths of compute-sanitizer and libnccl.so.2; None: there is none."""

    def __init__(self, programs, missing, work, judge, sanitizer, nccl):
        self.programs, self.missing, self.work, self.judge = programs, missing, work, judge
        self.sanitizer, self.nccl = sanitizer, nccl

    def _program(self, name):
        return os.path.join(self.programs, name)

    def _missing(self, *names):
        """Why a step that needs these programs cannot run; empty: it can."""
        lacking = [name for name in names if not os.access(self._program(name), os.X_OK)]
        return f"no {', '.join(lacking)}: {self.missing}" if lacking else ""

    def _table(self, name):
        return os.path.join(self.work, name + ".table")

    def timed(self):
        compare = os.path.join(ROOT, "tests/gpu/torch_compare.py")
        one_gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        return [
            Step("benchmark", [self._program("structkv_gpu_bench"), "--table", self._table("benchmark")],
                 self.judge.program, prints="bench", missing=self._missing("structkv_gpu_bench")),
            Step("torch", [sys.executable, compare, "--bench", os.path.join(self.work, "benchmark.json"),
                           "--table", self._table("torch")],
                 self.judge.torch, prints="torch", after="benchmark"),
            # Copies from the host and computation, each alone and together, on one GPU.
            Step("overlap", [self._program("structkv_overlap_bench"), "--table", self._table("overlap")],
                 self.judge.program, seconds=150, environment={"CUDA_VISIBLE_DEVICES": one_gpu}, prints="overlap",
                 missing=self._missing("structkv_overlap_bench")),
        ]

    def tests(self):
        steps = []
        for test, parts in TESTS.items():
            for part in range(parts):
                name = test if parts == 1 else f"{test}, part {part + 1} of {parts}"
                steps.append(Step(name, [self._program(test)], self.judge.tests,
                                  environment={"GTEST_TOTAL_SHARDS": str(parts), "GTEST_SHARD_INDEX": str(part)},
                                  missing=self._missing(test)))
        no_tool = "" if self.sanitizer else "no compute-sanitizer"
        for tool in TOOLS:
            for test, cases in SANITIZED.items():
                steps.append(Step(f"{test}, {tool}",
                                  [self.sanitizer, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20",
                                   self._program(test), "--gtest_filter=" + ":".join(cases)],
                                  self.judge.tests, missing=self._missing(test) or no_tool))
        return steps

    def whole_machine(self):
        server, command = self._program("structkv-server"), self._program("structkv")
        serve = [sys.executable, os.path.join(ROOT, "tests/gpu/serve.py"), "--bin", self.programs, "--capture", CAPTURE]
        wire = [self._program("structkv_wire_bench"), "--json", "--repeats", "0", "--prompts", "0", "--holds", "3",
                "--gib", "0.25", "--transports", "3", "--server", server, "--count-program"]
        counts = [self._program("structkv_wire_count"), self._program("structkv_counting_server")]
        wire += [counts[0], "--count-server", counts[1]] if all(map(os.path.exists, counts)) else [""]
        environment = {}
        if self.nccl:
            wire += ["--nccl-library", self.nccl]
            # With nothing else in it.
            folder = os.path.join(self.work, "nccl")
            os.mkdir(folder)
            os.symlink(self.nccl, os.path.join(folder, "libnccl.so.2"))
            environment["LD_LIBRARY_PATH"] = folder
        return [
            Step("server and client", serve, self.judge.program, seconds=90, prints="serve",
                 missing=self._missing(os.path.basename(server), os.path.basename(command))),
            # Rows that cannot be run (NCCL takes two GPUs) say why.
            Step("transports", wire, self.judge.transports, seconds=90, prints="transports",
                 missing=self._missing("structkv_wire_bench", os.path.basename(server))),
            # Not under compute-sanitizer: NCCL's own kernels wait for each other.
            Step("gpu_nccl_test", [self._program("gpu_nccl_test")], self.judge.nccl, seconds=90, environment=environment,
                 missing=self._missing("gpu_nccl_test")),
        ]
