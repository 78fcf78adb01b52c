"""CUDA without a GPU (tests/kernels/cuda), and a DLPack producer and consumer of its memory. The
host's touch of that memory is a segmentation fault, so a test that ends has made none."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy
from conftest import BIN, Array

LIBRARY = BIN / "libfake_cuda.so"
SERVER = BIN / "structkv_gpu_server"
CUDA, CUDA_MANAGED = 2, 13  # DLDeviceType
CODES = {"int": 0, "uint": 1, "float": 2, "bfloat": 4}  # DLDataTypeCode


class Held(NamedTuple):
    """What this process holds of the GPUs (FakeHeld), and what it freed too early."""

    device_bytes: int = 0
    pinned_bytes: int = 0
    streams: int = 0
    events: int = 0
    imports: int = 0
    contexts: int = 0
    freed_while_open: int = 0


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class DLManagedTensor(ctypes.Structure):
    _fields_ = [("tensor", DLTensor), ("context", ctypes.c_void_p), ("deleter", Deleter)]


def _new_capsule(pointer: int) -> Any:
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return new(pointer, b"dltensor", None)


def described(capsule: Any) -> DLTensor:
    """What a capsule says, as long as it lives."""
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    tensor: DLTensor = DLManagedTensor.from_address(get(capsule, b"dltensor")).tensor
    return tensor


class FakeCuda:
    """The loaded library, with two GPUs."""

    def __init__(self) -> None:
        self._call = ctypes.CDLL(str(LIBRARY))
        assert self.held == Held(), "a test before this one, which may have failed, holds memory"
        self._call.structkv_fake_cuda_reset(2)

    @property
    def held(self) -> Held:
        values = (ctypes.c_int64 * len(Held._fields))()
        self._call.structkv_fake_cuda_held(values)
        return Held(*values)

    def wait_until(self, held: Held) -> None:
        """What is dropped is freed once the server has closed it, by a thread."""
        end = time.monotonic() + 20
        while self.held != held:
            gc.collect()
            assert time.monotonic() < end, self.held
            time.sleep(0.01)

    def _done(self, result: int) -> None:
        assert result == 0, f"CUDA's error {result}"

    def alloc(self, nbytes: int, gpu: int = 0) -> int:
        context, outer = ctypes.c_void_p(), ctypes.c_void_p()
        data = ctypes.c_uint64()
        self._done(self._call.cuDevicePrimaryCtxRetain(ctypes.byref(context), gpu))
        self._done(self._call.cuCtxPushCurrent_v2(context))
        self._done(self._call.cuMemAlloc_v2(ctypes.byref(data), ctypes.c_size_t(nbytes)))
        self._done(self._call.cuCtxPopCurrent_v2(ctypes.byref(outer)))
        self._done(self._call.cuDevicePrimaryCtxRelease_v2(gpu))
        return data.value

    def free(self, data: int) -> None:
        self._done(self._call.cuMemFree_v2(ctypes.c_uint64(data)))

    def new_stream(self) -> int:
        stream = ctypes.c_void_p()
        self._done(self._call.cuStreamCreate(ctypes.byref(stream), 1))
        assert stream.value is not None
        return stream.value

    def end_stream(self, stream: int) -> None:
        self._done(self._call.cuStreamDestroy_v2(ctypes.c_void_p(stream)))

    def write(self, to: int, data: Array, stream: int | None = None) -> None:
        """At once or, on a stream, when somebody waits for that."""
        bytes, at = data.tobytes(), ctypes.c_void_p(to)
        size = ctypes.c_uint64(len(bytes))
        if stream is None:
            self._call.structkv_fake_cuda_copy(at, bytes, size)
        else:
            call = self._call.structkv_fake_cuda_write
            self._done(call(at, bytes, size, ctypes.c_void_p(stream)))

    def read(self, tensor: Any) -> bytes:
        """The bytes of what has DLPack, on a GPU or not."""
        capsule = tensor.__dlpack__()
        what = described(capsule)
        count = what.bits // 8
        for axis in range(what.ndim):
            count *= what.shape[axis]
        data = ctypes.create_string_buffer(count)
        at = ctypes.c_void_p(what.data + what.byte_offset)
        self._call.structkv_fake_cuda_copy(data, at, ctypes.c_uint64(count))
        return data.raw


class CudaArray:
    """An allocation of the program's own, or a part of one, with DLPack alone. Every `__dlpack__`
    keeps it alive until what took it is done."""

    _exported: dict[int, tuple[Any, ...]] = {}

    def __init__(
        self, cuda: FakeCuda, shape: Sequence[int], dtype: Any = numpy.float32, *, gpu: int = 0
    ) -> None:
        self.shape, self.dtype, self.gpu = tuple(shape), numpy.dtype(dtype), gpu
        self.nbytes = int(numpy.prod(shape)) * self.dtype.itemsize
        self.streams: list[Any] = []  # that consumers gave
        self.device_type = CUDA
        self.strides: Sequence[int] | None = None
        self.byte_offset = 0
        self._cuda: FakeCuda | None = cuda
        self.data = cuda.alloc(self.nbytes, gpu)

    @classmethod
    def of(cls, cuda: FakeCuda, array: Array, *, gpu: int = 0) -> CudaArray:
        made = cls(cuda, array.shape, array.dtype, gpu=gpu)
        cuda.write(made.data, array)
        return made

    def __del__(self) -> None:
        if self._cuda is not None:
            self._cuda.free(self.data)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device_type, self.gpu

    def __dlpack__(self, *, stream: int | None = None, **_: Any) -> Any:
        self.streams.append(stream)
        managed = DLManagedTensor()
        shape = (ctypes.c_int64 * len(self.shape))(*self.shape)
        tensor = managed.tensor
        tensor.data, tensor.byte_offset = self.data, self.byte_offset
        tensor.device_type, tensor.device_id = self.device_type, self.gpu
        tensor.ndim, tensor.shape = len(self.shape), shape
        strides = None if self.strides is None else (ctypes.c_int64 * len(self.shape))(*self.strides)
        if strides is not None:
            tensor.strides = strides
        kind = "bfloat" if self.dtype == ml_dtypes.bfloat16 else self.dtype.name.rstrip("0123456789")
        tensor.code, tensor.bits, tensor.lanes = CODES[kind], self.dtype.itemsize * 8, 1
        managed.deleter = _forget
        address = ctypes.addressof(managed)
        self._exported[address] = (self, managed, shape, strides)
        return _new_capsule(address)


def _forgotten(address: int) -> None:
    del CudaArray._exported[address]


_forget = Deleter(_forgotten)
