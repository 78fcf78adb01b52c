"""Certificates as cert-manager would make them, by openssl."""

from __future__ import annotations

import pathlib
import subprocess


def openssl(*arguments: str, cwd: pathlib.Path) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, cwd=cwd)


def make_certificates(names: list[str], uri: str, work: pathlib.Path) -> None:
    """What cert-manager would put into the Secrets: work/server and work/client, each with tls.crt, tls.key and ca.crt."""
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.crt", "-days", "2", "-subj", "/CN=authority", cwd=work)
    for role, alternative in (("server", ",".join(f"DNS:{name}" for name in names)), ("client", f"URI:{uri}")):
        directory = work / role
        directory.mkdir()
        (directory / "extensions").write_text(f"subjectAltName={alternative}\nextendedKeyUsage={role}Auth\n")
        openssl("req", *key, "-keyout", "tls.key", "-out", "request", "-subj", "/", cwd=directory)
        openssl("x509", "-req", "-in", "request", "-CA", "../ca.crt", "-CAkey", "../ca.key", "-CAcreateserial", "-days", "2",
                "-extfile", "extensions", "-out", "tls.crt", cwd=directory)
        (directory / "ca.crt").write_bytes((work / "ca.crt").read_bytes())
