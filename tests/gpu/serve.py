#!/usr/bin/env python3
"""Runs the server on this machine's GPU and the client against it, for tests/gpu/run.sh.

  serve.py --bin DIR [--backend cuda] [--tokens N]... --capture FILE

Compresses the capture in the service and, on the CPU, in the client's process, and compares the positions that stay:
the two round differently, so that a token at the edge of the budget may be another one. Then benchmarks synthetic prompts
of Llama-3.1-8B over shared memory and, of up to --inline-tokens, inline. Prints JSON, also where it is ended by SIGTERM;
exits 1 where something failed. Standard library alone.
"""
import argparse
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time

READY_SECONDS = 60
LEAST_OVERLAP = 0.99  # of the positions of every layer


def positions(path):
    """Of a compacted safetensors file: the kept positions by layer."""
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        begin = file.tell()
        found = {}
        for name, entry in header.items():
            if not name.endswith("positions") or "layer" not in name:
                continue
            first, last = entry["data_offsets"]
            file.seek(begin + first)
            found[name] = set(struct.unpack(f"<{(last - first) // 4}i", file.read(last - first)))
        return found


class Server:
    """structkv-server on unix sockets in `directory`; ends with the block."""

    def __init__(self, binary, backend, directory):
        self.address = f"unix:{directory}/server"
        self.log_path = f"{directory}/log"
        self.log = open(self.log_path, "w", encoding="utf-8")
        self.process = subprocess.Popen(
            [binary, "--listen", self.address, "--admin-listen", "off", "--region-socket", f"{directory}/regions",
             "--backend", backend],
            stdout=self.log, stderr=subprocess.STDOUT)

    def __enter__(self):
        end = time.monotonic() + READY_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            for line in self.lines():
                if "ready" in line:
                    return line.strip()
            time.sleep(0.05)
        self.__exit__()
        sys.exit(f"serve.py: the server did not start: {''.join(self.lines()).strip()}")

    def lines(self):
        with open(self.log_path, encoding="utf-8") as file:
            return file.readlines()

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


def client(binary, *arguments):
    """What the command prints as JSON; None, with its words on stderr, where it failed."""
    done = subprocess.run([binary, *arguments, "--json"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(f"serve.py: {' '.join(arguments)}: {done.stderr.strip()}", file=sys.stderr)
        return None
    return json.loads(done.stdout)


def least_overlap(served, local):
    """The smallest share of a layer's positions that both kept."""
    if not served or served.keys() != local.keys():
        sys.exit(f"serve.py: positions of {sorted(served)} and of {sorted(local)}")
    return min(len(served[name] & local[name]) / len(local[name]) for name in local)


def transports(tokens, inline_tokens):
    return ("inline", "shm") if tokens <= inline_tokens else ("shm",)


def measure(flags, report):
    """Into `report`, as it goes. Whether all went well."""
    command = os.path.join(flags.bin, "structkv")
    with tempfile.TemporaryDirectory() as directory:
        server = Server(os.path.join(flags.bin, "structkv-server"), flags.backend, directory)
        with server as report["ready"]:
            to_service = ["--server", server.address]
            files = [os.path.join(directory, name) for name in ("served", "local")]
            for place, out in ((to_service, files[0]), (["--in-process"], files[1])):
                if client(command, "compress", *place, flags.capture, "--out", out) is None:
                    return False
            report["least_overlap"] = least_overlap(*map(positions, files))
            well = report["least_overlap"] >= LEAST_OVERLAP
            if not well:
                print(f"serve.py: least_overlap {report['least_overlap']}, at least {LEAST_OVERLAP}", file=sys.stderr)
            report["benchmarks"] = []
            for tokens in flags.tokens or (8192, 32768, 131072):
                for transport in transports(tokens, flags.inline_tokens):
                    result = client(command, "bench", *to_service, "--tokens", str(tokens), "--transport", transport,
                                    "--prompts", str(flags.prompts))
                    well = well and result is not None
                    if result is not None:
                        report["benchmarks"].append(
                            {key: result[key] for key in ("backend", "transport", "tokens", "input_bytes_per_second",
                                                          "layers_per_second", "compute_micros", "layer_seconds")})
    return well


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", required=True)
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--capture", required=True)
    parser.add_argument("--tokens", type=int, action="append")
    parser.add_argument("--inline-tokens", type=int, default=32768)
    parser.add_argument("--prompts", type=int, default=2)
    flags = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("serve.py: ended by SIGTERM"))
    report = {}
    try:
        well = measure(flags, report)
    finally:
        print(json.dumps(report, indent=1))
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
