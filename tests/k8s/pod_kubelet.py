"""Probes a container as the kubelet does: each probe of its manifest at its own port, period and thresholds."""

from __future__ import annotations

import threading
import time
import urllib.error
import urllib.request
from typing import Any

# Defaults of the API.
PERIOD, TIMEOUT, FAILURES, SUCCESSES = 10, 1, 3, 1


class Probe:
    """One probe: asks, and knows whether it holds, by its thresholds."""

    def __init__(self, probe: dict[str, Any], address: str, ports: dict[str, int]) -> None:
        check = probe["httpGet"]
        self.url = f"http://{address}:{ports[check['port']]}{check['path']}"
        self.period = probe.get("periodSeconds", PERIOD)
        self.failure_threshold = probe.get("failureThreshold", FAILURES)
        self._timeout = probe.get("timeoutSeconds", TIMEOUT)
        self._needed = probe.get("successThreshold", SUCCESSES)
        self._in_a_row = 0
        self._last: bool | None = None
        self.holds: bool | None = None  # None: not yet known
        self.asked = 0

    def ask(self) -> int:
        """The answer's status; 0 without one. 200 to 399 is a success."""
        try:
            with urllib.request.urlopen(self.url, timeout=self._timeout) as answer:
                status: int = answer.status
        except urllib.error.HTTPError as error:
            status = error.code
        except OSError:
            status = 0
        good = 200 <= status < 400
        self._in_a_row = self._in_a_row + 1 if good == self._last else 1
        self._last = good
        if self._in_a_row >= (self._needed if good else self.failure_threshold):
            self.holds = good
        self.asked += 1
        return status


class Kubelet:
    """The probes of one container. `start` is the startup probe, and waits; the other two then run by themselves."""

    def __init__(self, container: dict[str, Any], address: str) -> None:
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        self.startup, self.readiness, self.liveness = (
            Probe(container[name], address, ports) for name in ("startupProbe", "readinessProbe", "livenessProbe"))
        self._end = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> float:
        """Seconds until the container had started; AssertionError where the kubelet would have killed it."""
        began = time.monotonic()
        for _ in range(self.startup.failure_threshold):
            self.startup.ask()
            if self.startup.holds:
                break
            time.sleep(self.startup.period)
        assert self.startup.holds, f"{self.startup.url} did not succeed within the startup probe's limits"
        for probe in (self.readiness, self.liveness):
            thread = threading.Thread(target=self._loop, args=(probe,), daemon=True)
            thread.start()
            self._threads.append(thread)
        return time.monotonic() - began

    def _loop(self, probe: Probe) -> None:
        while not self._end.is_set():
            probe.ask()
            self._end.wait(probe.period)

    def stop(self) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()
