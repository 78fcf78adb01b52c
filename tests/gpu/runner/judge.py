"""What the end and the words of a program say: "passed", "passed, ...", "FAILED: ..." or "not run: ..."."""
import re

# What programs say where they cannot run.
NO_GPU = re.compile(r"no GPU(?: device)?(?::.*|$)|no CUDA device.*|not built with CUDA", re.MULTILINE)
# compute-sanitizer, on virtual machines that do not let it.
NO_TOOL = re.compile(r"Device not supported.*")
MOST_NAMES = 3


def last_line(text):
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


class Judge:
    """`has_gpu`: the machine has one, so that a program that finds none has failed."""

    def __init__(self, has_gpu):
        self.has_gpu = has_gpu

    def _without(self, why):
        return f"FAILED: {why}, on a machine that has one" if self.has_gpu else f"not run: {why}"

    def program(self, done):
        if done.code == 0:
            return {"": "passed"}
        if said := NO_GPU.search(done.log):
            return {"": self._without(said[0])}
        return {"": f"FAILED: exit code {done.code}: {last_line(done.log)}"}

    def tests(self, done):
        """Of GoogleTest."""
        log = done.log
        if refused := NO_TOOL.search(log):
            return {"": f"not run: {refused[0]}"}
        if done.code != 0:
            failed = list(dict.fromkeys(re.findall(r"^\[  FAILED  \] ([^\s,]*[./][^\s,]*)", log, re.MULTILINE)))
            more = f" and {len(failed) - MOST_NAMES} more" if len(failed) > MOST_NAMES else ""
            names = ", ".join(failed[:MOST_NAMES]) + more
            return {"": f"FAILED: exit code {done.code}: {names or last_line(log)}"}
        passed = re.search(r"^\[  PASSED  \] (\d+) test", log, re.MULTILINE)
        skipped = re.search(r"^\[  SKIPPED \] (\d+) test", log, re.MULTILINE)
        why = re.search(r"Skipped\n(?:SKIPPED: )?(.+)", log)
        # An environment that skips has all tests counted as passed.
        none_ran = re.search(r"^SKIPPED: ", log, re.MULTILINE) or (skipped and (not passed or passed[1] == "0"))
        if none_ran:
            reason = why[1] if why else "skipped"
            return {"": self._without(reason) if NO_GPU.match(reason) else f"not run: {reason}"}
        if not passed or passed[1] == "0":
            return {"": "FAILED: no test ran"}
        if skipped:
            return {"": f"passed, {skipped[1]} skipped: {why[1] if why else 'see the log'}"}
        return {"": "passed"}

    def nccl(self, done):
        """Lines "result: WHAT: RESULT" beside the tests' own."""
        said = re.findall(r"^result: (.*): (.*)$", done.log, re.MULTILINE)
        return {**self.tests(done), **dict(said)}

    def torch(self, done):
        skipped = done.data.get("skipped") if isinstance(done.data, dict) else None
        return {"": f"not run: {skipped}"} if skipped else self.program(done)

    def transports(self, done):
        """Each row that could not be measured says why."""
        rows = done.data.get("transports", []) if isinstance(done.data, dict) else []
        skipped = {f"transports, {row['way']}": f"not run: {row['skipped']}" for row in rows if "skipped" in row}
        return {**self.program(done), **skipped}
