"""The certificate follows its files, TLS 1.2 is the oldest, and a pair that cannot be used ends the start or changes
nothing."""

from __future__ import annotations

import contextlib
import logging
import ssl
from pathlib import Path

import certificates
import pytest
from fake_clock import Clock

from service.access import watch
from service.access.certificate import Certificate
from service.errors import SettingsError


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock().install(monkeypatch, watch)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    certificate.write_text(certificates.FIRST)
    key.write_text(certificates.FIRST_KEY)
    return certificate, key


def common_name(server: ssl.SSLContext, newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> str:
    """Common name of the certificate that a client sees in a handshake in memory."""
    client = ssl.create_default_context(cadata=certificates.FIRST + certificates.SECOND)
    client.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    client.maximum_version = newest
    client.set_ciphers("DEFAULT:@SECLEVEL=0")
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = client.wrap_bio(to_client, to_server, server_hostname="localhost")
    other = server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for side in (one, other):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
    found = one.getpeercert()
    assert found is not None
    return dict(pair for (pair,) in found["subject"])["commonName"]  # type: ignore[misc]


def test_a_handshake_takes_the_files_as_they_are(files: tuple[Path, Path], clock: Clock) -> None:
    context = Certificate(*files).context()
    assert common_name(context) == "first"
    files[0].write_text(certificates.SECOND)
    files[1].write_text(certificates.SECOND_KEY)
    clock.now_s += 1.0
    assert common_name(context) == "second"


def test_half_a_change_changes_nothing_until_the_other_half(
    files: tuple[Path, Path], clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    context = Certificate(*files).context()
    files[0].write_text(certificates.SECOND)
    for _ in range(3):
        clock.now_s += 1.0
        assert common_name(context) == "first"
    (record,) = (record for record in caplog.records if record.levelno >= logging.ERROR)
    assert "the certificate stays as it was" in record.getMessage()
    files[1].write_text(certificates.SECOND_KEY)
    clock.now_s += 1.0
    assert common_name(context) == "second"


def test_tls_1_2_is_the_oldest_version(files: tuple[Path, Path]) -> None:
    context = Certificate(*files).context()
    assert common_name(context, ssl.TLSVersion.TLSv1_2) == "first"
    with pytest.warns(match="TLSv1_1 is deprecated"), pytest.raises(ssl.SSLError, match=r"(?i)unsupported.protocol"):
        common_name(context, ssl.TLSVersion.TLSv1_1)


@pytest.mark.parametrize(
    ("certificate", "key"),
    [
        (certificates.FIRST, certificates.SECOND_KEY),
        (certificates.FIRST, certificates.FIRST_KEY_ENCRYPTED),
        (certificates.FIRST, ""),
        ("no certificate", certificates.FIRST_KEY),
        (None, certificates.FIRST_KEY),
        (certificates.FIRST, None),
    ],
)
def test_a_pair_that_cannot_be_used_is_refused_with_both_names(
    files: tuple[Path, Path], certificate: str | None, key: str | None
) -> None:
    for file, text in zip(files, (certificate, key), strict=True):
        if text is None:
            file.unlink()
        else:
            file.write_text(text)
    with pytest.raises(SettingsError) as caught:
        Certificate(*files)
    assert all(word in str(caught.value) for word in ("LIPCERT_TLS_CERTIFICATE", "LIPCERT_TLS_KEY", *map(str, files)))
    assert "None" not in str(caught.value)
