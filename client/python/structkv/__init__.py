"""StructKV: KV-cache compression for LLM inference. docs/python.md says how to use it.

    client = structkv.Client("localhost:7411")
    compressed = client.compress(open, lambda layer: structkv.LayerTensors(keys=..., values=...))
"""

from ._core import Arena, Lease, Region, Tensor, __version__
from .aio import AsyncClient, AsyncEngine
from .client import Client, Engine
from .errors import (
    Aborted,
    AlreadyExists,
    Cancelled,
    DataLoss,
    DeadlineExceeded,
    Error,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    OutOfRange,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Unimplemented,
    Unknown,
)
from .messages import (
    Budget,
    FastKvMethod,
    FullMethod,
    GemFilterMethod,
    H2oMethod,
    HeadRange,
    Hold,
    ModelGeometry,
    Open,
    Opened,
    PagedLayout,
    Pivot,
    PyramidKvMethod,
    RotaryParameters,
    ShardGroup,
    SnapKvMethod,
    StreamingLlmMethod,
    StructKvMethod,
    Summary,
)
from .options import (
    BatchPrompt,
    ClientOptions,
    FetchOptions,
    HeldCallOptions,
    LayerTensors,
    PromptOptions,
    RetryPolicy,
    SessionOptions,
    StreamOptions,
    Tls,
)
from .results import Compressed, Event, FetchedCache, LayerResult, PivotResult, RowPull
from .session import AsyncSession, Session

__all__ = [name for name in dir() if not name.startswith("_")]
