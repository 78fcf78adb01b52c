"""Steps of a run: commands with a limit of time each, one after another or several at once."""
import concurrent.futures
import contextlib
import json
import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass, field
from typing import Callable

# A step that has less than this left of the run's time is not begun.
LEAST_SECONDS = 5
# From a request to end to the end by force.
GRACE_SECONDS = 3


@dataclass
class Done:
    """How a command ended."""

    code: int
    timed_out: bool
    log: str
    data: object  # what it printed as JSON; None: nothing, or no JSON


@dataclass
class Step:
    name: str
    command: list
    judge: Callable  # (Done) -> {name of a check: result}, that of the step itself under ""
    seconds: float = 120
    environment: dict = field(default_factory=dict)
    prints: str = ""  # the entry of the report that its JSON on stdout is; empty: stdout is part of the log
    missing: str = ""  # why it cannot run; empty: it can
    after: str = ""  # the step that must have passed

    def file_name(self):
        return re.sub(r"[^\w.-]+", "-", self.name)


class Runner:
    """Runs steps until `end` (time.monotonic()) and tells `report` of each. `limit`: seconds a step at most."""

    def __init__(self, report, work, end, limit):
        self.report, self.work, self.end, self.limit = report, work, end, limit

    def run(self, steps, at_once=1):
        with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
            for running in [pool.submit(self._step, step) for step in steps]:
                running.result()

    def _step(self, step):
        left = self.end - time.monotonic()
        if step.missing:
            self.report.note({step.name: f"not run: {step.missing}"})
        elif left < LEAST_SECONDS:
            self.report.note({step.name: "skipped: no time left"})
        elif step.after and not self.report.passed(step.after):
            self.report.note({step.name: f"not run: {step.after} did not pass"})
        else:
            begin = time.monotonic()
            limit = min(step.seconds, self.limit, left)
            done = self._execute(step, limit)
            if done.timed_out:
                left_over = " that were left" if limit == left else ""
                results = {"": f"timed out after the {limit:.0f} s{left_over}"}
            else:
                results = step.judge(done)
            self.report.note(
                {name or step.name: result for name, result in results.items()},
                time.monotonic() - begin, step.prints, done.data)

    def _execute(self, step, limit):
        path = os.path.join(self.work, step.file_name())
        command = ["timeout", "-k", str(GRACE_SECONDS), f"{limit:.2f}", *step.command]
        with open(path + ".log", "wb") as log, open(path + ".json", "wb") if step.prints else log as out:
            begin = time.monotonic()
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=log,
                                       env={**os.environ, **step.environment})
            code = process.wait()
            timed_out = code in (124, 137, -signal.SIGKILL) and time.monotonic() - begin >= limit
            # What the command left running in its group, which is that of `timeout`.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        with open(path + ".log", encoding="utf-8", errors="replace") as log:
            text = log.read()
        data = None
        if step.prints:
            with open(path + ".json", encoding="utf-8") as out, contextlib.suppress(ValueError):
                data = json.load(out)
        return Done(code, timed_out, text, data)
