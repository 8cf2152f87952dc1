"""The client over https: it asks whom it can trust, and nobody else."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from cluster.api import build_api
from pipelines.client import Client
from pipelines.config import ServeConfig
from pipelines.errors import ServiceError
from tests.local_backend import TEXTS, LocalBackend, served


def write_certificate(folder: Path, address: str) -> tuple[str, str]:
    """Write a certificate for an IP address that is signed by itself; return its path and its key's."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a test")])
    now, owner = datetime.now(UTC), x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(owner, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    kind, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    folder.mkdir()
    (folder / "cert.pem").write_bytes(certificate.public_bytes(kind))
    (folder / "key.pem").write_bytes(key.private_bytes(kind, form, serialization.NoEncryption()))
    return str(folder / "cert.pem"), str(folder / "key.pem")


@pytest.fixture(scope="module")
def backend(local_root: str) -> LocalBackend:
    return LocalBackend(local_root, ["cats"], ServeConfig(access_log=False))


@pytest.fixture(scope="module")
def secured(backend: LocalBackend, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The address of the API over https, and the certificate that vouches for it."""
    certificate, key = write_certificate(tmp_path_factory.mktemp("tls") / "own", "127.0.0.1")
    with served(build_api(lambda: backend, backend.config), ssl_certfile=certificate, ssl_keyfile=key) as url:
        yield url, certificate


def test_a_server_with_a_certificate_that_is_trusted_answers(
    secured: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, certificate = secured
    monkeypatch.setenv("SSL_CERT_FILE", certificate)
    with Client(url) as client:
        assert client.search(TEXTS[3], k=1).hits[0].passage.id == "p3"
        assert [found.hits[0].passage.id for found in client.search_batch(TEXTS[:3], k=1)] == ["p0", "p1", "p2"]  # type: ignore[union-attr]


def test_nobody_else_is_asked(secured: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither a server that signed for itself, nor one whose certificate is trusted but for another address."""
    url, certificate = secured
    with Client(url) as client, pytest.raises(ServiceError, match=r"(?i)certificate") as refused:
        client.search("a private matter")
    assert "SSL_CERT_FILE" in refused.value.hint
    monkeypatch.setenv("SSL_CERT_FILE", certificate)
    with Client(url.replace("127.0.0.1", "localhost")) as client, pytest.raises(ServiceError, match=r"(?i)mismatch"):
        client.search("a private matter")
    other, _ = write_certificate(tmp_path / "other", "127.0.0.1")
    monkeypatch.setenv("SSL_CERT_FILE", other)
    with Client(url) as client, pytest.raises(ServiceError, match=r"(?i)certificate"):
        client.search("a private matter")


def test_plain_http_to_a_secured_port_is_told_as_such(secured: tuple[str, str]) -> None:
    with Client(secured[0].replace("https", "http")) as client, pytest.raises(ServiceError, match="does not answer"):
        client.search("x")
