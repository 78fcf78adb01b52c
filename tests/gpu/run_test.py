#!/usr/bin/env python3
"""tests/gpu/run.sh with stand-ins for the programs that it runs: what it runs and in which order, how each may end, and the
report. Of the real programs, in STRUCTKV_BIN, the cases that run under compute-sanitizer are looked up."""
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import unittest

import stand_ins

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "runner"))
import plan  # noqa: E402
from report import Report  # noqa: E402
from steps import Runner, Step  # noqa: E402


class Run:
    """A run of run.sh: its exit code, words, report and calls of programs. `programs`, `tools`: in the place of those that
    work. `bundle`: makes the folder `programs` into what is brought along, and says where that is."""

    def __init__(self, root, *flags, programs=None, tools=None, bundle=lambda folder: folder):
        self.root, self.out = root, os.path.join(root, "out")
        folder = os.path.join(root, "programs")
        stand_ins.write(folder, {**stand_ins.PROGRAMS, **(programs or {})})
        environment = stand_ins.environment(root, {**stand_ins.TOOLS, **(tools or {})})
        environment["STRUCTKV_GPU_BUNDLE"] = bundle(folder)
        done = subprocess.run(["bash", os.path.join(HERE, "run.sh"), *flags, self.out], env=environment,
                              capture_output=True, text=True, timeout=100, check=False)
        self.code, self.said = done.returncode, done.stdout + done.stderr
        with open(os.path.join(self.out, "report.json"), encoding="utf-8") as file:
            self.report = json.load(file)
        self.checks = self.report["checks"]
        with open(os.path.join(root, "calls"), encoding="utf-8") as file:
            self.calls = [line.split(" ", 2) for line in file.read().splitlines()]


class WellTest(unittest.TestCase):
    """One run in which all is well, but for PyTorch."""

    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        early = f"cp '{folder.name}/out/report.json' '{folder.name}/early.json'"
        cls.run_ = Run(folder.name, programs={"structkv_overlap_bench": f"{early}\n{stand_ins.OVERLAP}"})

    def test_passes(self):
        self.assertEqual(self.run_.code, 0, self.run_.said)
        others = {name: result for name, result in self.run_.checks.items() if result != "passed"}
        self.assertEqual(others, {
            "torch": 'not run: no torch: libtorch.so: cannot open "shared" object file',
            "transports, NCCL": "not run: one GPU",
            "NCCL, two processes on one GPU": "works",
        })

    def test_the_report_has_what_programs_print(self):
        report = self.run_.report
        self.assertEqual(report["device"], "NVIDIA H200, 580.1, 143771 MiB")
        self.assertEqual(report["bench"]["device"], "a GPU")
        self.assertEqual([(row["tokens"], row["transport"]) for row in report["serve"]["benchmarks"]],
                         [(8192, "inline"), (8192, "shm"), (32768, "inline"), (32768, "shm"), (131072, "shm")])
        self.assertLessEqual({"bench", "overlap", "torch", "serve", "transports"}, report.keys())

    def test_the_report_is_there_while_steps_run(self):
        with open(os.path.join(self.run_.root, "early.json"), encoding="utf-8") as file:
            self.assertEqual(list(json.load(file)["checks"]), ["benchmark", "torch"])

    def test_leaves_three_files(self):
        out = self.run_.out
        self.assertEqual(sorted(os.listdir(out)), ["logs.tar.gz", "report.json", "table.md"])
        with tarfile.open(os.path.join(out, "logs.tar.gz")) as logs:
            self.assertIn("logs/gpu_select_test-racecheck.log", logs.getnames())
        with open(os.path.join(out, "table.md"), encoding="utf-8") as file:
            table = file.read()
        self.assertLess(table.index("| step |"), table.index("| layers from the host |"))
        self.assertIn("| gpu_gather_test | passed |", table)

    def test_what_is_timed_comes_first_and_nccl_last(self):
        names = [call[0] for call in self.run_.calls if call[0] in stand_ins.PROGRAMS]
        self.assertEqual(names[:2], ["structkv_gpu_bench", "structkv_overlap_bench"])
        self.assertEqual(names[-2:], ["structkv_wire_bench", "gpu_nccl_test"])
        last_test = max(i for i, name in enumerate(names) if name in stand_ins.TESTS)
        self.assertLess(last_test, names.index("structkv-server"))

    def test_runs_every_part_of_a_test_and_every_tool(self):
        calls = self.run_.calls
        parts = sorted(call[1] for call in calls if call[0] == "gpu_conformance_test" and call[1])
        self.assertEqual(parts, [str(part) for part in range(plan.TESTS["gpu_conformance_test"])])
        tools = [call[2].split()[1] for call in calls if call[0] == "compute-sanitizer"]
        self.assertEqual({tool: tools.count(tool) for tool in plan.TOOLS}, dict.fromkeys(plan.TOOLS, len(stand_ins.TESTS)))

    def test_nccl_is_pythons_where_the_loader_has_none(self):
        path = os.path.realpath(os.path.join(self.run_.root, "packages/nvidia/nccl/lib/libnccl.so.2"))
        self.assertEqual(self.run_.report["nccl"], path)
        wire = next(call for call in self.run_.calls if call[0] == "structkv_wire_bench")
        self.assertTrue(wire[2].endswith("--nccl-library " + path), wire)


class RunTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = folder.name

    def test_unpacks_a_bundle(self):
        def pack(folder):
            with open(os.path.join(folder, "bundle.txt"), "w", encoding="utf-8") as file:
                file.write("a bundle of a test\n")
            os.remove(os.path.join(folder, "structkv_overlap_bench"))
            to = os.path.join(self.root, "bundle")
            os.mkdir(to)
            with tarfile.open(os.path.join(to, "gpu-bundle.tar.xz"), "w:xz") as archive:
                archive.add(folder, ".")
            return to

        run = Run(self.root, bundle=pack)
        self.assertEqual(run.code, 0, run.said)
        self.assertEqual(run.report["programs"], "a bundle of a test")
        self.assertEqual(run.checks["benchmark"], "passed")
        self.assertEqual(run.checks["overlap"], "not run: no structkv_overlap_bench: not in the bundle")

    def test_without_packages_nvcc_builds_the_benchmark(self):
        tools = {"cmake": "echo 'CMake Error: no abseil'\nexit 1", "nvcc": stand_ins.NVCC}
        run = Run(self.root, tools=tools, bundle=lambda folder: "")
        self.assertEqual(run.code, 0, run.said)
        self.assertIn("CMake Error: no abseil", run.said)
        self.assertEqual([name for name, result in run.checks.items() if result == "passed"], ["benchmark"])
        self.assertEqual(run.checks["gpu_ipc_test, memcheck"], "not run: no gpu_ipc_test: not built by nvcc alone")

    def test_runs_some_steps_alone(self):
        run = Run(self.root, "--only", "^benchmark|select_test, mem")
        self.assertEqual(list(run.checks), ["benchmark", "gpu_select_test, memcheck"])

    def test_goes_on_after_what_fails_and_hangs(self):
        run = Run(self.root, "--limit", "3", programs={
            "structkv_overlap_bench": stand_ins.IGNORES_TERM,
            "structkv_gpu_bench": "echo 'out of luck' >&2\nexit 3",
            "gpu_saliency_test": stand_ins.FAILS,
            "gpu_select_test": stand_ins.SKIPS_SOME,
            "gpu_gather_test": stand_ins.SKIPS_ALL,
            "gpu_rotation_test": stand_ins.RUNS_NOTHING,
            "gpu_ipc_test": stand_ins.HANGS,
            "gpu_nccl_test": "exec /no/such/program",
        }, tools={"compute-sanitizer": stand_ins.NO_DEVICE})
        self.assertEqual(run.code, 1, run.said)
        expected = {
            "benchmark": "FAILED: exit code 3: out of luck",
            "torch": "not run: benchmark did not pass",
            "overlap": "timed out after the 3 s",
            "gpu_saliency_test, part 1 of 4": "FAILED: exit code 1: Some/Suite.Case/f16, Suite.Other",
            "gpu_select_test": "passed, 1 skipped: no second GPU",
            "gpu_gather_test": "FAILED: no GPU: no driver, on a machine that has one",
            "gpu_rotation_test": "FAILED: no test ran",
            "gpu_ipc_test": "timed out after the 3 s",
            "gpu_ipc_test, memcheck": "not run: Device not supported",
            "server and client": "passed",
            "transports": "passed",
        }
        self.assertEqual({name: run.checks.get(name) for name in expected}, expected)
        self.assertRegex(run.checks["gpu_nccl_test"], "^FAILED: exit code 12[67]: ")

    def test_without_a_gpu_nothing_runs_and_nothing_fails(self):
        none = {**dict.fromkeys(stand_ins.TESTS, stand_ins.SKIPS_BY_ENVIRONMENT),
                **dict.fromkeys(("structkv_gpu_bench", "structkv_overlap_bench", "structkv-server", "structkv_wire_bench"),
                                stand_ins.NO_GPU),
                "gpu_nccl_test": stand_ins.SKIPS_ALL}
        run = Run(self.root, programs=none, tools={"nvidia-smi": "echo 'no devices' >&2\nexit 9"})
        self.assertEqual(run.code, 77, run.said)
        self.assertEqual(run.checks.pop("torch"), "not run: benchmark did not pass")
        self.assertEqual(set(run.checks.values()), {"not run: no GPU: no driver"})

    def test_begins_nothing_without_time(self):
        run = Run(self.root, "--budget", "0")
        self.assertEqual(run.code, 77, run.said)
        self.assertEqual(set(run.checks.values()), {"skipped: no time left"})

    def test_begins_nothing_after_its_time(self):
        report = Report(self.root, self.root, {})
        runner = Runner(report, self.root, time.monotonic() + 100, 100)
        steps = [Step(name, ["true"], lambda done: {"": "passed"}) for name in ("one", "two")]
        runner.run(steps[:1])
        runner.end = time.monotonic()
        runner.run(steps[1:])
        self.assertEqual(report.checks, {"one": "passed", "two": "skipped: no time left"})


class PlanTest(unittest.TestCase):
    def test_all_programs_are_built(self):
        script = 'source "$0" && printf "%s\\n" "${programs[@]}"'
        done = subprocess.run(["bash", "-c", script, os.path.join(HERE, "programs.sh")], capture_output=True, text=True,
                              check=True)
        self.assertEqual(set(done.stdout.split()), set(stand_ins.PROGRAMS))
        self.assertEqual(set(plan.TESTS), set(plan.SANITIZED))

    def test_every_pattern_of_cases_has_some(self):
        if "STRUCTKV_BIN" not in os.environ:
            self.skipTest("no CUDA kernels in this build")
        for test, patterns in plan.SANITIZED.items():
            program = os.path.join(os.environ["STRUCTKV_BIN"], test)
            for pattern in patterns:
                done = subprocess.run([program, "--gtest_list_tests", "--gtest_filter=" + pattern], capture_output=True,
                                      text=True, check=True)
                self.assertRegex(done.stdout, r"(?m)^  \w", f"{test}: {pattern}")


if __name__ == "__main__":
    unittest.main()
