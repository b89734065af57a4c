"""`rediss://`: a real Redis with a certificate for one name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
import trio
import trustme

from inference_trio import redis_link, redis_store
from inference_trio.access import Owner
from inference_trio.redis_store import open_redis_store
from inference_trio.variables import Secret

from . import fakes
from .fakes import FakeModel
from .processes import reserved_port
from .redis_server import running_redis
from .test_connection import HELLO, text_of, transcript
from .test_store_contract import in_redis


@attrs.frozen
class Encrypted:
    port: int
    authority: Path

    @property
    def url(self) -> str:
        return f"rediss://localhost:{self.port}/0"


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Encrypted]:
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    certificate = authority.issue_cert("localhost")
    certificate.private_key_pem.write_to_path(folder / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    files = {"tls-cert-file": "cert.pem", "tls-key-file": "key.pem", "tls-ca-cert-file": "ca.pem"}
    options = [part for name, file in files.items() for part in (f"--{name}", str(folder / file))]
    with reserved_port() as port:
        options += ["--tls-port", str(port), "--tls-auth-clients", "no"]
        with running_redis(*options):
            yield Encrypted(port, folder / "ca.pem")


async def test_sessions_are_kept_over_tls_where_the_certificate_is_good(
    redis: Encrypted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(redis.authority))
    async with in_redis(redis.url, HELLO) as it:
        socket = await it.connect(1, await it.create(0))
        socket.call("generate", {"message": "hi"})
        assert text_of(await transcript(socket)) == "Hello"


@pytest.mark.parametrize("flaw", ["its name is another one", "nobody vouches for it"])
async def test_a_certificate_that_is_not_good_is_never_trusted(
    redis: Encrypted, flaw: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(redis_store, "PATIENCE", 0.5)
    url = redis.url
    if flaw.startswith("its name"):
        monkeypatch.setenv("SSL_CERT_FILE", str(redis.authority))
        url = url.replace("localhost", "127.0.0.1")
    else:
        monkeypatch.setenv("SSL_CERT_FILE", "/dev/null")
    settings = fakes.settings(store=Secret(url))
    with trio.fail_after(20):
        async with open_redis_store(settings, FakeModel(HELLO), lambda _: Owner(None)) as store:
            assert not store.is_ready.is_set()
    assert "certificate" in caplog.text.lower()
    assert redis_link.logger.name in caplog.text
