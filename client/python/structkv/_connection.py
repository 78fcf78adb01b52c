"""How a server is reached, from a plain mapping as engines' configurations have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .options import ClientOptions, Tls


def _text(extra: dict[str, Any], name: str) -> str | None:
    """What the file says that `name`, taken out of the mapping, names; None without one."""
    path = extra.pop(name, None)
    if path is None:
        return None
    text = Path(path).read_text()
    if not text.strip():
        raise ValueError(f"{name}: {path} is empty")
    return text


def connection_options(extra: dict[str, Any]) -> ClientOptions:
    """Takes `tls_authorities`, `tls_certificate`, `tls_key` and `token_file`, paths of files, and
    `tls`, a bool, out of `extra`. The files are read once. OSError for those that cannot be read,
    ValueError for those that are empty."""
    tls = Tls(
        root_certificates=_text(extra, "tls_authorities"),
        private_key=_text(extra, "tls_key"),
        certificate_chain=_text(extra, "tls_certificate"),
    )
    if (tls.private_key is None) != (tls.certificate_chain is None):
        raise ValueError("tls_certificate and tls_key: one of them alone; they go together")
    token = _text(extra, "token_file")
    wanted = extra.pop("tls", False) or tls != Tls()
    return ClientOptions(tls=tls if wanted else None, token=token.split()[0] if token else None)
