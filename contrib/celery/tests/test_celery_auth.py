"""Signed messages: the laws of the port, both directions against Celery's own serializer, and what is refused."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from celery.security.certificate import Certificate, FSCertStore
from celery.security.key import PrivateKey
from celery.security.serialization import SecureSerializer
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from umbel.errors import ContentRefused, DecodeError, EncodeError, SettingsError
from umbel.testing.contracts import SerializerContract
from umbel_celery.serializer import AuthOptions, AuthSerializer

CORPUS = Path(__file__).parents[3] / "tests/wire/corpus"


def make_identity(folder: Path, name: str, *, days: int = 10, password: bytes | None = None, key: Any = None) -> None:
    """``<name>.key`` and ``store/<name>.pem``."""
    private = key or rsa.generate_private_key(public_exponent=65537, key_size=1024)
    who = x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Kit"), x509.NameAttribute(NameOID.COMMON_NAME, name)]
    )
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(who)
        .issuer_name(who)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=20))
        .not_valid_after(now + timedelta(days=days))
        .sign(private, hashes.SHA256())
    )
    secret = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    pem = serialization.Encoding.PEM
    (folder / f"{name}.key").write_bytes(private.private_bytes(pem, serialization.PrivateFormat.PKCS8, secret))
    (folder / "store").mkdir(exist_ok=True)
    (folder / "store" / f"{name}.pem").write_bytes(certificate.public_bytes(pem))


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("identity")
    make_identity(folder, "alice")
    return folder


def options_of(folder: Path, name: str = "alice", **more: Any) -> AuthOptions:
    store = folder / "store"
    given = {"key": str(folder / f"{name}.key"), "certificate": str(store / f"{name}.pem"), "store": str(store)}
    return AuthOptions(**{**given, **more})


class TestAuthSerializer(SerializerContract):
    @pytest.fixture
    def make_serializer(self, identity: Path) -> Callable[[], AuthSerializer]:
        return lambda: AuthSerializer(options_of(identity))


def celerys(folder: Path, digest: str = "sha256") -> SecureSerializer:
    certificate = folder / "store" / "alice.pem"
    return SecureSerializer(
        PrivateKey((folder / "alice.key").read_text()),
        Certificate(certificate.read_text()),
        FSCertStore(str(folder / "store")),
        digest,
    )


@pytest.mark.parametrize("digest", ["sha256", "sha512"])
def test_celery_reads_what_is_signed_here_and_the_other_way_round(identity: Path, digest: str) -> None:
    ours, theirs = AuthSerializer(options_of(identity, digest=digest)), celerys(identity, digest)
    body = [[1, "ü\x00\x01", b"\xff"], {"when": datetime(2030, 1, 2, tzinfo=UTC)}, {"chain": None}]
    assert theirs.deserialize(ours.dumps(body)) == body
    assert ours.loads(theirs.serialize(body)) == body


def test_a_captured_message_is_read(tmp_path: Path) -> None:
    entries = json.loads((CORPUS / "01-tasks-redis.json").read_text())
    entry = next(entry for entry in entries if entry["name"] == "serializer-auth-signed")
    (tmp_path / "wire.pem").write_text(CERTIFICATE)
    reader = AuthSerializer(AuthOptions(store=str(tmp_path)))
    assert reader.loads(base64.b64decode(entry["body_base64"])) == entry["decoded"]["body"]


def test_a_changed_body_is_refused_before_it_is_decoded(identity: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = AuthSerializer(options_of(identity))
    raw = base64.b64decode(ours.dumps(["pay", 1]))
    changed = base64.b64encode(raw.replace(b'"pay", 1', b'"pay", 9'))
    monkeypatch.setattr("kombu.utils.json.loads", lambda data: pytest.fail("decoded before it was verified"))
    with pytest.raises(ContentRefused, match="signature"):
        ours.loads(changed)


def test_a_stranger_is_refused(identity: Path, tmp_path: Path) -> None:
    make_identity(tmp_path, "mallory")
    with pytest.raises(ContentRefused, match="not trusted"):
        AuthSerializer(options_of(identity)).loads(AuthSerializer(options_of(tmp_path, "mallory")).dumps([1]))


def test_another_content_inside_is_refused(identity: Path) -> None:
    theirs = celerys(identity)
    theirs._serializer = "pickle"
    with pytest.raises(ContentRefused, match="x-python-serialize"):
        AuthSerializer(options_of(identity)).loads(theirs.serialize([1]))


def test_a_key_with_a_password(tmp_path: Path) -> None:
    make_identity(tmp_path, "alice", password=b"open sesame")
    options = options_of(tmp_path, key_password="open sesame")
    assert "sesame" not in repr(options)
    ours = AuthSerializer(options)
    assert ours.loads(ours.dumps([1])) == [1]
    with pytest.raises(SettingsError, match="key"):
        AuthSerializer(options_of(tmp_path))


def test_one_that_only_reads_and_one_that_only_writes(identity: Path) -> None:
    reader = AuthSerializer(AuthOptions(store=str(identity / "store")))
    writer = AuthSerializer(options_of(identity, store=None))
    assert reader.loads(writer.dumps({"a": 1})) == {"a": 1}
    with pytest.raises(EncodeError, match=r"\[plugins.options.auth\]"):
        reader.dumps(1)
    with pytest.raises(DecodeError, match="store"):
        writer.loads(writer.dumps(1))


def test_everything_wrong_with_the_settings_is_told_at_once(identity: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as wrong:
        AuthSerializer(AuthOptions(key="x", store=str(tmp_path / "none"), digest="md5"))
    assert [word in "\n".join(wrong.value.problems) for word in ("digest", "belong together", "no certificate")] == [
        True
    ] * 3
    make_identity(tmp_path, "old", days=-1)
    with pytest.raises(SettingsError, match="expired"):
        AuthSerializer(AuthOptions(store=str(tmp_path / "store")))
    with pytest.raises(SettingsError, match="not the certificate of that key"):
        AuthSerializer(options_of(identity, key=str(tmp_path / "old.key")))
    make_identity(tmp_path, "curve", key=ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(SettingsError, match="RSA"):
        AuthSerializer(options_of(tmp_path, "curve", store=None))


CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIDJzCCAg+gAwIBAgIUbEfcSNS8z9ZHboV6C29PSAuo/0EwDQYJKoZIhvcNAQEL
BQAwIzESMBAGA1UECgwJV2lyZSBUZXN0MQ0wCwYDVQQDDAR3aXJlMB4XDTI2MTEy
MjExMjIzNloXDTM2MTExOTExMjIzNlowIzESMBAGA1UECgwJV2lyZSBUZXN0MQ0w
CwYDVQQDDAR3aXJlMIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8AMIIBCgKCAQEAq1tR
SwrvltHp37kb5LMXRp/HUfeY8K87hCXGaaSzVSVQUvhmiQ10EEu+Xq/KomZipfBh
DdR6BEROsseFNyPTfC6wdzr4w8prM5rRY6U8AwhpU0GLwmiTitXC0E+VAjDskpN3
ZysATKCAq7hghIt8lKtrIH8IYMoVk/O1siXGo54r8zufAsgFeCENV5NFmWQhQQuB
NUbUEgTEGNyVDFh/0cFMKY9P0Vkd1Q7NUUkrxz/lYMIGL+ieFgvKboU4y8BX2Kiw
iwN/i0JbNk+x+Zlc5idPlKxCfJ8B7vhnejhoK0KtSlHSMrgRnsoJXLvHIN2k5iD+
6R6gMjq6e6+zYyvoUQIDAQABo1MwUTAdBgNVHQ4EFgQUP8MZLoznF81a3bbZnQwe
HNeWpq4wHwYDVR0jBBgwFoAUP8MZLoznF81a3bbZnQweHNeWpq4wDwYDVR0TAQH/
BAUwAwEB/zANBgkqhkiG9w0BAQsFAAOCAQEAfQx3mmBkzb3PWv08DZ6LMVMss5DW
JRUBTA+6dh1z8wLx21LaGtyPt2nrD6TvCUyui28NQRLqmnCWxvsDckZ5hBbInipu
bsed+N3IxOl1Do1Sw/knU4O6fWFLAl0Wu97BobKAfEUgkCOxSYzVIKxqr0qo1ksi
C3cxbKVcRiZiVQkCpydqoNHVStuOyeOEVM/kVOAxTn9jQ+d+hrHasKrVDXcOFv4U
ZHVhNfIg/FthrZk1faEcyo3D/dI+sut02bjA9EvXyu6Fx1z1VpYD4MTeO7munJ0H
N3j+CDfLHudRHyLwdxTfXJIz5ZgMfSFBGAVzJjKoe4KPiHkfJqjKcfLJqg==
-----END CERTIFICATE-----
"""
