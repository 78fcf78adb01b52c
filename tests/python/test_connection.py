"""Options of a connection from an engine's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from structkv import ClientOptions, Tls
from structkv._connection import connection_options


def test_nothing_said_is_plain() -> None:
    extra: dict[str, Any] = {"method": "structkv"}
    assert connection_options(extra) == ClientOptions()
    assert extra == {"method": "structkv"}


def test_files_are_read_and_taken_out(tmp_path: Path) -> None:
    for name in ("ca", "crt", "key"):
        (tmp_path / name).write_text(f"-----{name}-----\n")
    (tmp_path / "token").write_text("0123456789abcdef spare\n")
    extra = {
        "tls_authorities": str(tmp_path / "ca"),
        "tls_certificate": str(tmp_path / "crt"),
        "tls_key": str(tmp_path / "key"),
        "token_file": str(tmp_path / "token"),
    }
    assert connection_options(extra) == ClientOptions(
        tls=Tls(root_certificates="-----ca-----\n", private_key="-----key-----\n", certificate_chain="-----crt-----\n"),
        token="0123456789abcdef",
    )
    assert extra == {}


def test_the_systems_authorities() -> None:
    assert connection_options({"tls": True}) == ClientOptions(tls=Tls())


def test_a_certificate_without_its_key(tmp_path: Path) -> None:
    (tmp_path / "crt").write_text("x")
    with pytest.raises(ValueError, match="tls_certificate and tls_key"):
        connection_options({"tls_certificate": str(tmp_path / "crt")})


def test_files_that_are_not_there_or_empty(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        connection_options({"tls_authorities": str(tmp_path / "none")})
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ValueError, match="token_file"):
        connection_options({"token_file": str(tmp_path / "empty")})
