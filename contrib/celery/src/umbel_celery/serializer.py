"""Signed bodies: the signature is checked before anything of the body is read.

``base64(SEP.join([base64(signer), base64(signature), content type, content encoding, body]))``, with an RSA-PSS signature
over the inner body, whose signer is the issuer and serial number of a certificate. Celery calls it ``auth``.
"""

from __future__ import annotations

import base64
import binascii
import glob
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Final

from attrs import field, frozen
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from kombu.utils import json

from umbel.errors import ContentRefused, DecodeError, EncodeError, SettingsError
from umbel.ports.serializer import Serializer

_SEPARATOR: Final = b"\x00\x01"
_INNER: Final = "application/json"
_DIGESTS: Final[Mapping[str, type[hashes.HashAlgorithm]]] = {
    "sha256": hashes.SHA256,
    "sha384": hashes.SHA384,
    "sha512": hashes.SHA512,
}
_TABLE: Final = "[plugins.options.auth]"


@frozen(kw_only=True)
class AuthOptions:
    """Who signs, and whose signatures count."""

    key: str | None = None
    """File of the private RSA key with which messages are signed (Celery: ``security_key``)."""
    key_password: str | None = field(default=None, repr=False)
    """Its password, if it has one (``security_key_password``)."""
    certificate: str | None = None
    """File of the certificate that belongs to the key (``security_certificate``)."""
    store: str | None = None
    """Folder or glob of the certificates whose messages are read (``security_cert_store``)."""
    digest: str = "sha256"
    """sha256, sha384 or sha512, the same for all (``security_digest``)."""


class AuthSerializer(Serializer):
    """JSON, signed. Without ``key`` and ``certificate`` it only reads, without ``store`` it only writes."""

    api_version: ClassVar[tuple[int, int]] = (1, 0)
    Options: ClassVar[type] = AuthOptions
    name: ClassVar[str] = "auth"
    content_type: ClassVar[str] = "application/data"
    content_encoding: ClassVar[str] = "utf-8"

    def __init__(self, options: AuthOptions | None = None) -> None:
        """Read key and certificates. Raises ``SettingsError`` with all that is wrong with them."""
        chosen = AuthOptions() if options is None else options
        problems: list[str] = []
        self._digest = _DIGESTS.get(chosen.digest, hashes.SHA256)
        if chosen.digest not in _DIGESTS:
            problems.append(f"{_TABLE} digest must be one of {', '.join(_DIGESTS)}, not {chosen.digest!r}")
        self._key: rsa.RSAPrivateKey | None = None
        self._signer = ""
        self._trusted: Mapping[str, _Certificate] = {}
        if (chosen.key is None) != (chosen.certificate is None):
            problems.append(f"{_TABLE} key and certificate belong together: give both, or neither to only read")
        elif chosen.key is not None and chosen.certificate is not None:
            try:
                self._key = _read_key(chosen.key, chosen.key_password)
                certificate = _Certificate.read(chosen.certificate)
                if certificate.key != self._key.public_key():
                    raise ValueError(f"{chosen.certificate} is not the certificate of that key")
                self._signer = certificate.signer
            except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as exc:
                problems.append(f"{_TABLE} key and certificate cannot be used: {exc}")
        if chosen.store is not None:
            try:
                self._trusted = _read_store(chosen.store)
            except (OSError, ValueError, UnsupportedAlgorithm) as exc:
                problems.append(f"{_TABLE} store cannot be used: {exc}")
        if problems:
            raise SettingsError(problems)

    def dumps(self, value: Any) -> bytes:
        """Encode as JSON, and sign. Raises ``EncodeError``."""
        if self._key is None:
            raise EncodeError(f"a message cannot be signed: set key and certificate in {_TABLE}")
        try:
            body: bytes = json.dumps(value).encode("utf-8")  # type: ignore[no-untyped-call]  # kombu does not say
        except (TypeError, ValueError, RecursionError) as exc:
            raise EncodeError(f"a value cannot be encoded as JSON: {exc}") from exc
        digest = self._digest()
        scheme = padding.PSS(mgf=padding.MGF1(digest), salt_length=padding.PSS.MAX_LENGTH)
        parts = (
            base64.b64encode(self._signer.encode("utf-8")),
            base64.b64encode(self._key.sign(body, scheme, digest)),
            _INNER.encode("ascii"),
            b"utf-8",
            body,
        )
        return base64.b64encode(_SEPARATOR.join(parts))

    def loads(self, data: bytes) -> Any:
        """Check the signature, then decode. Raises ``DecodeError`` for every other message, ``ContentRefused`` for a signer
        who is not trusted, a bad signature, an expired certificate, or a body that is not JSON."""
        try:
            signer, signature, content_type, _, body = base64.b64decode(data, validate=True).split(_SEPARATOR, 4)
            name = base64.b64decode(signer).decode("utf-8")
            self._verify(name, base64.b64decode(signature), body)
        except (binascii.Error, ValueError) as exc:
            raise DecodeError(f"this is no signed message: {exc}") from exc
        if content_type != _INNER.encode("ascii"):
            raise ContentRefused(f"a signed message holds {content_type[:100]!r}; only {_INNER} is read")
        try:
            return json.loads(body)  # type: ignore[no-untyped-call]  # likewise
        except Exception as exc:  # the body may name any type of kombu's JSON, whose constructors raise what they like
            raise DecodeError(f"a signed message holds no JSON: {exc}") from exc

    def _verify(self, signer: str, signature: bytes, body: bytes) -> None:
        certificate = self._trusted.get(signer)
        if certificate is None:
            raise ContentRefused(f"signer {signer[:200]!r} is not trusted: its certificate is not in {_TABLE} store")
        if certificate.expired:
            raise ContentRefused(f"the certificate of {signer!r} has expired: replace it in {_TABLE} store")
        digest = self._digest()
        scheme = padding.PSS(mgf=padding.MGF1(digest), salt_length=padding.PSS.MAX_LENGTH)
        try:
            certificate.key.verify(signature, body, scheme, digest)
        except InvalidSignature:
            raise ContentRefused(
                f"the signature of {signer!r} is wrong: the message was changed, or digests differ"
            ) from None


@frozen
class _Certificate:
    signer: str
    key: rsa.RSAPublicKey
    ends: datetime

    @classmethod
    def read(cls, file: str) -> _Certificate:
        """Raises ``ValueError`` for what is no valid RSA certificate."""
        found = x509.load_pem_x509_certificate(Path(file).read_bytes())
        key = found.public_key()
        if not isinstance(key, rsa.RSAPublicKey):
            raise ValueError(f"{file} holds no RSA certificate")
        issuer = " ".join(str(attribute.value) for attribute in found.issuer)
        certificate = cls(f"{issuer} {found.serial_number}", key, found.not_valid_after_utc)
        if certificate.expired:
            raise ValueError(f"the certificate {file} has expired")
        return certificate

    @property
    def expired(self) -> bool:
        return datetime.now(UTC) >= self.ends


def _read_key(file: str, password: str | None) -> rsa.RSAPrivateKey:
    secret = password.encode() if password else None
    key = serialization.load_pem_private_key(Path(file).read_bytes(), secret)
    if not isinstance(key, rsa.RSAPrivateKey):
        raise ValueError(f"{file} holds no RSA key")
    return key


def _read_store(place: str) -> Mapping[str, _Certificate]:
    trusted: dict[str, _Certificate] = {}
    for file in sorted(glob.glob(os.path.join(place, "*") if os.path.isdir(place) else place)):
        certificate = _Certificate.read(file)
        if trusted.setdefault(certificate.signer, certificate) is not certificate:
            raise ValueError(f"{file} has the issuer and serial number of another certificate")
    if not trusted:
        raise ValueError(f"there is no certificate at {place}")
    return trusted
