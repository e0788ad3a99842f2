"""Signatures of artefacts: `card.json.minisig`, as `minisign -Sm card.json` writes it.

The card states the sha256 of `model.onnx`, and another one is refused: a signature of the card is one of both files.
Loaded where signatures are required, since a server without them needs no cryptography.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minisign import Error, PublicKey, Signature

from service.artefact.files import read_file
from service.errors import ArtefactError, SettingsError

_SUFFIX = ".minisig"


@dataclass(frozen=True)
class Signers:
    """The public keys that an operator trusts."""

    keys: Sequence[PublicKey]

    @classmethod
    def of(cls, setting: str) -> Signers:
        """Return the keys of `LIPCERT_REQUIRE_SIGNATURE`: one in base64, or those of a file.

        Raises:
            SettingsError: it is neither, or a key is not valid.
        """
        try:
            return cls([PublicKey.from_base64(setting.strip())])
        except Error:
            lines = _lines(setting)
        try:
            keys = [PublicKey.from_base64(line) for line in lines]
        except Error as error:
            raise _wrong(setting, f"a key in the file is not valid ({error})") from error
        if not keys:
            raise _wrong(setting, "the file holds no key")
        return cls(keys)

    def check(self, path: Path, content: bytes) -> None:
        """Refuse a file that no key of these has signed.

        Args:
            path: of the file; its signature is beside it.
            content: bytes of the file.

        Raises:
            ArtefactError: the signature is missing, cannot be read, or is of other bytes or another key.
        """
        beside = path.with_name(path.name + _SUFFIX)
        try:
            signature = Signature.from_bytes(read_file(beside))
        except ArtefactError as error:
            reason = f"it is required (LIPCERT_REQUIRE_SIGNATURE), and {error.reason}"
            raise ArtefactError(beside, f"{reason} Sign it: minisign -Sm {path.name}") from error
        except Error as error:
            raise ArtefactError(beside, f"it is no signature of minisign ({error}). Sign {path.name} again.") from error
        for key in self.keys:
            try:
                key.verify(content, signature)
            except Error:
                continue
            return
        raise ArtefactError(
            beside,
            f"it is the signature of another {path.name} or of a key that LIPCERT_REQUIRE_SIGNATURE does not name. A "
            "card that was changed, for example by an evaluation, has to be signed again.",
        )


def _lines(file: str) -> list[str]:
    """Return the lines of a file of keys, without comments."""
    try:
        lines = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise _wrong(file, f"it is no key, and no file that can be read ({reason})") from error
    return [line for line in lines if line and not line.startswith(("untrusted comment:", "#"))]


def _wrong(setting: str, reason: str) -> SettingsError:
    return SettingsError(
        f"LIPCERT_REQUIRE_SIGNATURE={setting!r}: {reason}; set a public key of minisign, the second line of "
        "minisign.pub, or a file of such keys"
    )
