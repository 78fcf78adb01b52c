"""What a run leaves: report.json, table.md and logs.tar.gz, each written anew after every step."""
import io
import json
import os
import tarfile
import threading

# Of a log, from its begin and its end.
MOST_LOG_BYTES = 1 << 20


def is_failure(result):
    return result.startswith(("FAILED", "timed out"))


class Report:
    def __init__(self, out, work, about):
        self.out, self.work = out, work
        self.about = about
        self.checks, self.seconds, self.data = {}, {}, {}
        self.lock = threading.Lock()

    def passed(self, name):
        return self.checks.get(name, "").startswith("passed")

    def failed(self):
        return [name for name, result in self.checks.items() if is_failure(result)]

    def note(self, results, seconds=None, entry="", data=None):
        """Of one step, first its own result."""
        with self.lock:
            self.checks.update(results)
            if seconds is not None:
                self.seconds[next(iter(results))] = round(seconds, 1)
            if entry and data is not None:
                self.data[entry] = data
            for name, result in results.items():
                print(f"run.sh: {name}: {result}", flush=True)
            self._write()

    def _write(self):
        whole = {**self.about, "checks": self.checks, "seconds": self.seconds, **self.data}
        self._replace("report.json", json.dumps(whole, indent=1).encode())
        self._replace("table.md", (self.tables() + "\n\n" + self._checks() + "\n").encode())
        logs = io.BytesIO()
        with tarfile.open(fileobj=logs, mode="w:gz") as archive:
            for name in sorted(os.listdir(self.work)):
                if name.endswith(".log"):
                    self._add_log(archive, name)
        self._replace("logs.tar.gz", logs.getvalue())

    def _add_log(self, archive, name):
        with open(os.path.join(self.work, name), "rb") as file:
            text = file.read(MOST_LOG_BYTES)
            size = os.fstat(file.fileno()).st_size
            if size > 2 * MOST_LOG_BYTES:
                text += b"\n[...]\n"
                file.seek(size - MOST_LOG_BYTES)
            text += file.read(MOST_LOG_BYTES)
        entry = tarfile.TarInfo(f"logs/{name}")
        entry.size = len(text)
        archive.addfile(entry, io.BytesIO(text))

    def tables(self):
        """Those that programs wrote."""
        parts = []
        for name in ("benchmark", "torch", "overlap"):
            path = os.path.join(self.work, name + ".table")
            if os.path.exists(path):
                with open(path, encoding="utf-8") as file:
                    parts.append(file.read().strip())
        return "\n\n".join(parts)

    def _checks(self):
        rows = [f"| {name} | {result.replace('|', '/')} | {self.seconds.get(name, '')} |"
                for name, result in self.checks.items()]
        return "\n".join(["| check | result | seconds |", "|---|---|---|", *rows])

    def _replace(self, name, content):
        path = os.path.join(self.out, name)
        with open(path + ".part", "wb") as file:
            file.write(content)
        os.replace(path + ".part", path)
