"""Runs what tests/gpu/run.sh has made ready, and writes report.json, table.md and logs.tar.gz. See run.sh --help."""
import argparse
import os
import re
import sys
import time

import machine
from judge import Judge
from plan import Plan
from report import Report
from steps import Runner


def main():
    parser = argparse.ArgumentParser(prog="runner", description=__doc__)
    parser.add_argument("--programs", required=True, help="folder of the programs")
    parser.add_argument("--missing", default="not built", help="why programs are not there")
    parser.add_argument("--about", default="", help="where the programs come from")
    parser.add_argument("--work", required=True, help="folder for what is not kept")
    parser.add_argument("--seconds", type=float, required=True, help="that the run may take")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds of a step at most")
    parser.add_argument("--only", default="", help="steps whose name matches this pattern")
    parser.add_argument("out")
    flags = parser.parse_args()

    begin = time.monotonic()
    device, has_gpu = machine.gpus()
    nccl = machine.find_nccl()
    report = Report(flags.out, flags.work, {"device": device, "programs": flags.about, "nccl": nccl or "none found"})
    print(f"run.sh: {device}; {flags.about}; NCCL: {nccl or 'none found'}", flush=True)
    plan = Plan(flags.programs, flags.missing, flags.work, Judge(has_gpu), machine.find_sanitizer(), nccl)
    runner = Runner(report, flags.work, begin + flags.seconds, flags.limit)
    for steps, at_once in ((plan.timed(), 1), (plan.tests(), min(8, os.cpu_count() or 1)), (plan.whole_machine(), 1)):
        runner.run([step for step in steps if re.search(flags.only, step.name)], at_once)

    print(report.tables())
    failed = report.failed()
    passed = [name for name in report.checks if report.passed(name)]
    others = len(report.checks) - len(passed) - len(failed)
    print(f"run.sh: {len(passed)} passed, {len(failed)} failed, {others} not run or skipped, in "
          f"{time.monotonic() - begin:.0f} s" + "".join(f"\nrun.sh: {name}: {report.checks[name]}" for name in failed))
    if failed:
        sys.exit(1)
    sys.exit(0 if passed else 77)


if __name__ == "__main__":
    main()
