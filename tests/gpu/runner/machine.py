"""What the machine has: its GPUs, compute-sanitizer and NCCL."""
import importlib.util
import os
import shutil
import subprocess

TOOLKIT = "/usr/local/cuda"


def gpus():
    """(a line for each GPU, or why there is none; whether there is one)"""
    query = ["timeout", "20", "nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error), False
    said = (done.stdout + done.stderr).strip()
    return (said, True) if done.returncode == 0 and said else (said or "nvidia-smi is not there", False)


def find_sanitizer():
    """compute-sanitizer: on the PATH, or in the toolkit. None: there is none."""
    at = (os.environ.get("PATH", ""), f"{TOOLKIT}/bin", f"{TOOLKIT}/compute-sanitizer")
    return shutil.which("compute-sanitizer", path=os.pathsep.join(at))


def _of_python():
    """That of the package nvidia-nccl, which comes with PyTorch."""
    try:
        package = importlib.util.find_spec("nvidia.nccl")
    except ImportError:
        return []
    folders = package.submodule_search_locations if package else None
    return [os.path.join(folder, "lib/libnccl.so.2") for folder in folders or ()]


def _of_loader():
    try:
        done = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=False)
    except OSError:
        return []
    return [line.split()[-1] for line in done.stdout.splitlines() if line.split()[:1] == ["libnccl.so.2"]]


def find_nccl():
    """libnccl.so.2: that of STRUCTKV_NCCL, the loader's, Python's or the toolkit's. None: there is none."""
    candidates = [os.environ.get("STRUCTKV_NCCL", ""), *_of_loader(), *_of_python(),
                  f"{TOOLKIT}/lib/libnccl.so.2", f"{TOOLKIT}/lib64/libnccl.so.2"]
    return next((os.path.realpath(path) for path in candidates if path and os.path.exists(path)), None)
