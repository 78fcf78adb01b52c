"""Starts a container of a rendered pod as a runtime would: its mounts and nothing else on a read-only root, its user, no
capabilities, no new privileges, process 1 of its own namespace, under the memory limit. Needs root."""

from __future__ import annotations

import ctypes
import json
import os
import pathlib
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from quantity import in_bytes

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWPID, CLONE_NEWNET = 0x00020000, 0x08000000, 0x20000000, 0x40000000
PR_SET_NO_NEW_PRIVS, PR_CAPBSET_DROP, PR_SET_PDEATHSIG = 38, 24, 1
_libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), what)


def unshare(flags: int) -> None:
    check(_libc.unshare(flags), "unshare")


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def memory_group(name: str, limit: int) -> pathlib.Path | None:
    """A control group with a memory limit; None where this machine lets nobody make one."""
    for parent, file in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        group = pathlib.Path(parent) / name
        try:
            group.mkdir()
            (group / file).write_text(str(limit))
            return group
        except OSError:
            if group.is_dir():
                group.rmdir()
    return None


@dataclass
class Container:
    """What the sandbox needs to know of a container, from its manifest."""

    root: str  # where the root is put together; empty
    program: str  # of this machine, that stands for the image's
    command: list[str]  # the entry point and its arguments
    environment: dict[str, str]
    user: int
    group: int
    volumes: dict[str, str]  # mount path -> directory of this machine that is bound there, read-only
    memory: dict[str, int]  # mount path -> bytes of a file system in memory
    shared: dict[str, str]  # mount path -> directory that containers of the pod share


def of_manifest(pod: dict[str, Any], container: dict[str, Any], entry: list[str], environment: dict[str, str],
                program: str, directories: dict[str, str], root: str) -> Container:
    """`directories`: what stands for volumes that are no memory of one container's, by name."""
    volumes, memory, shared = {}, {}, {}
    by_name = {volume["name"]: volume for volume in pod["volumes"]}
    for each in container["volumeMounts"]:
        volume = by_name[each["name"]]
        if each["name"] not in directories:
            memory[each["mountPath"]] = in_bytes(volume["emptyDir"]["sizeLimit"])
        elif each.get("readOnly"):
            volumes[each["mountPath"]] = directories[each["name"]]
        else:
            shared[each["mountPath"]] = directories[each["name"]]
    context = pod["securityContext"]
    return Container(root, program, [*entry, *container.get("args", [])], environment, context["runAsUser"],
                     context["runAsGroup"], volumes, memory, shared)


def assemble(container: Container) -> None:
    """The image: the program and the libraries, with the container's mounts. In a mount namespace of its own."""
    root = container.root
    mount("-t", "tmpfs", "-o", "size=512m,mode=755", "pod", root)
    program = root + container.command[0]
    for directory in ("usr/bin", "usr/lib", "usr/lib64", "proc", "dev", "tmp", "etc"):
        os.makedirs(f"{root}/{directory}", exist_ok=True)
    pathlib.Path(program).touch()
    mount("--bind", container.program, program)
    for directory in ("lib", "lib64"):
        mount("--rbind", "-o", "ro", f"/usr/{directory}", f"{root}/usr/{directory}")
        os.symlink(f"usr/{directory}", f"{root}/{directory}")
    mount("-t", "proc", "proc", f"{root}/proc")
    for device in ("null", "zero", "urandom", "random"):
        pathlib.Path(f"{root}/dev/{device}").touch()
        mount("--bind", f"/dev/{device}", f"{root}/dev/{device}")
    for at in (*container.volumes, *container.memory, *container.shared):
        os.makedirs(root + at, exist_ok=True)
    for at, size in container.memory.items():
        mount("-t", "tmpfs", "-o", f"size={size},mode=1777,nosuid,nodev", "memory", root + at)
    for at, directory in container.shared.items():
        mount("--bind", directory, root + at)
    for at, directory in container.volumes.items():
        mount("--bind", directory, root + at)
        mount("-o", "remount,bind,ro", root + at)
    mount("-o", "remount,ro", root)


def run(container: Container) -> None:
    """Never returns: becomes the container's process."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    assemble(container)
    os.chroot(container.root)
    os.chdir("/")
    for capability in range(64):
        _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    os.setgroups([container.group])
    os.setgid(container.group)
    os.setuid(container.user)
    check(_libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    os.execve(container.command[0], container.command, container.environment)


def main() -> None:
    """The runtime's part: `pod_sandbox.py GROUP`, with the container as JSON on standard input. Prints the process'
    id, waits for it, and ends as it did (128 and the signal's number where a signal ended it)."""
    container = Container(**json.load(sys.stdin))
    if sys.argv[1]:
        # What the process takes from now on is counted.
        (pathlib.Path(sys.argv[1]) / "cgroup.procs").write_text(str(os.getpid()))
    unshare(CLONE_NEWNS | CLONE_NEWIPC)
    mount("--make-rprivate", "/")
    unshare(CLONE_NEWPID)  # the next child is process 1
    child = os.fork()
    if child == 0:
        try:
            run(container)
        except BaseException as error:  # noqa: BLE001: nothing of this process may go on
            print(f"pod_sandbox: {error}", file=sys.stderr)
            os._exit(125)
    print(child, flush=True)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
