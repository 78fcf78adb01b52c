"""Writes an OCI runtime bundle's config.json for an image, held as a cluster's restricted profile holds it.

The root is read-only, the user is the image's, there are no capabilities and no new privileges, /tmp and /dev/shm are
memory. The network is the host's, so that a client of the host reaches what listens on loopback.

    bundle.py BUNDLE_DIR ROOT_DIR IMAGE_CONFIG.json MEMORY_BYTES ARGUMENT...
"""

import json
import pathlib
import sys

NAMESPACES = ["pid", "ipc", "uts", "mount"]


def mount(at: str, kind: str, options: list[str]) -> dict:
    return {"destination": at, "type": kind, "source": kind, "options": ["nosuid", "noexec", *options]}


def config(root: str, image: dict, memory: int, arguments: list[str]) -> dict:
    uid, gid = (int(part) for part in image["User"].split(":"))
    return {
        "ociVersion": "1.0.2",
        "root": {"path": root, "readonly": True},
        "process": {
            "user": {"uid": uid, "gid": gid},
            "args": [*image["Entrypoint"], *arguments],
            "env": image.get("Env") or [],
            "cwd": "/",
            "noNewPrivileges": True,
            "capabilities": {},
            "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 1024, "hard": 8192}],
        },
        "mounts": [
            mount("/proc", "proc", ["nodev"]),
            mount("/dev", "tmpfs", ["mode=755", "size=65536k"]),
            mount("/dev/shm", "tmpfs", ["nodev", "mode=1777", "size=64m"]),
            mount("/tmp", "tmpfs", ["nodev", "mode=1777", "size=16m"]),
        ],
        "linux": {
            "namespaces": [{"type": kind} for kind in NAMESPACES],
            "resources": {"memory": {"limit": memory}, "devices": [{"allow": False, "access": "rwm"}]},
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    }


def main() -> None:
    bundle, root, image_file, memory, *arguments = sys.argv[1:]
    image = json.loads(pathlib.Path(image_file).read_text())
    (pathlib.Path(bundle) / "config.json").write_text(json.dumps(config(root, image, int(memory), arguments), indent=1))


if __name__ == "__main__":
    main()
