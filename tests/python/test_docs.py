"""What README.md shows runs as it stands."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy
import structkv
from conftest import ROOT, Server


def test_the_readme(server: Server) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert "localhost:7411" in code and len(code.splitlines()) <= 13
    random = numpy.random.default_rng(1)

    def prefill(layer: int) -> Any:
        shapes = ((8, 300, 128), (8, 300, 128), (32, 8, 128))
        return [random.standard_normal(shape).astype(ml_dtypes.bfloat16) for shape in shapes]

    names: dict[str, Any] = {"prefill": prefill, "tokens": 300}
    names["torch"] = SimpleNamespace(from_dlpack=structkv.Tensor.numpy)
    code = code.replace("import structkv, torch", "import structkv")
    exec(code.replace("localhost:7411", server.target), names)
    assert len(names["keys"]) == 32 and names["keys"][31].shape == (8, 30, 128)
