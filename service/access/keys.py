"""API keys: the key that a client sends, the line that the operator stores, and the comparison of both.

::

    key    lipcert.NAME.SECRET                                SECRET: 256 random bits
    line   NAME SCOPE[,SCOPE] scrypt:14:8:1:TAG:SALT:HASH     parameters of scrypt (RFC 7914): log2(N), r, p

TAG is the first 8 bytes of the SHA-256 of the secret. A wrong key fails there, in microseconds, whether or not its name
exists, so nobody makes the server run scrypt without a secret that took 2^64 tries. A key that scrypt has accepted is
remembered by a keyed hash. The 192 bits that the tag does not tell are out of reach of any search.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from service.access.scopes import ADMIN, SCOPES
from service.access.watch import Watch
from service.errors import SettingsError

_LOG2_N, _R, _P = 14, 8, 1
_MAX_MEMORY_BYTES = 72 * 1024 * 1024
_TAG_BYTES = 8
_KEY = re.compile(rb"lipcert\.([A-Za-z0-9_-]{1,64})\.([A-Za-z0-9_-]{43})")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_HASH = re.compile(r"scrypt:(\d{1,2}):(\d{1,2}):(\d{1,2}):([0-9a-f]{16}):([0-9a-f]{32}):([0-9a-f]{64})")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Key:
    """A stored key."""

    name: str
    scopes: frozenset[str]
    stored: str
    """The hash of the line."""

    def allows(self, scope: str) -> bool:
        """Return whether the key has a scope; `admin` includes all."""
        return scope in self.scopes or ADMIN in self.scopes


def new_key(name: str, scopes: Iterable[str]) -> tuple[str, str]:
    """Return a new key and the line to store.

    Raises:
        SettingsError: the name is not valid.
    """
    if not _NAME.fullmatch(name):
        raise SettingsError(f"{name!r} cannot name a key; use 1 to 64 letters, digits, - and _")
    secret = secrets.token_urlsafe(32)
    return f"lipcert.{name}.{secret}", f"{name} {','.join(dict.fromkeys(scopes))} {_hash_of(secret.encode())}"


def read_lines(text: str, place: str) -> dict[str, Key]:
    """Return the keys of a text by name; lines end with a newline or `;`, and `#` starts a comment.

    Args:
        text: see the module.
        place: file or variable, for messages.

    Raises:
        SettingsError: a line is damaged, or a name is used twice.
    """
    keys: dict[str, Key] = {}
    for number, line in enumerate(re.split(r"[\n;]", text), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        fault = _fault_of(words, keys)
        if fault:
            raise SettingsError(
                f"{place}, line {number}: {fault}; store lines as `lipcert keys new NAME --scope SCOPE` prints them"
            )
        name, scopes, stored = words
        keys[name] = Key(name, frozenset(scopes.split(",")), stored)
    return keys


class KeyRing:
    """The keys of the settings. A file that has changed is read again within a second."""

    def __init__(self, text: str, file: Path | None) -> None:
        """Read the keys.

        Args:
            text: value of LIPCERT_API_KEYS.
            file: value of LIPCERT_API_KEYS_FILE.

        Raises:
            SettingsError: see `read_lines`; the file cannot be read; there is no key.
        """
        self._text = text
        self._file = file
        self._pepper = secrets.token_bytes(32)
        self._known: dict[bytes, Key] = {}
        """Accepted keys by their keyed hash."""
        self._scrypt = ThreadPoolExecutor(1, "scrypt")
        self._watch = Watch([] if file is None else [file])
        self._keys = self._read()
        if not self._keys:
            raise SettingsError(
                f"{file or 'LIPCERT_API_KEYS'} has no key; `lipcert keys new NAME --scope predict` makes one"
            )

    def refresh(self) -> None:
        """Read the file again if it has changed, at most once a second.

        The parent of several processes calls it, too: a process that it starts while the file is damaged then has the
        keys of the last undamaged one.
        """
        if self._watch.has_changed():
            self._read_again()

    async def find(self, sent: bytes) -> Key | None:
        """Return the stored key to which a key that a client sent belongs; null if it belongs to no key."""
        self.refresh()
        digest = hashlib.blake2b(sent, key=self._pepper, digest_size=32).digest()
        # An attacker cannot choose or foresee the hash, so the time of the lookup tells nothing about a key.
        key = self._known.get(digest)
        if key is not None:
            return key
        candidate = self._candidate(sent)
        if candidate is None:
            return None
        # One at a time: many first requests with one key take scrypt's memory and time once.
        loop = asyncio.get_running_loop()
        if not await loop.run_in_executor(self._scrypt, self._accept, digest, sent, candidate):
            return None
        # The file may have been read again meanwhile.
        return self._known.get(digest)

    def _candidate(self, sent: bytes) -> Key | None:
        """Return the key of that name if the tag of the secret is right."""
        found = _KEY.fullmatch(sent)
        if found is None:
            return None
        tag = hashlib.sha256(found[2]).hexdigest()[: 2 * _TAG_BYTES]
        key = self._keys.get(found[1].decode("ascii"))
        # Compared for an unknown name, too.
        right = hmac.compare_digest(tag, "" if key is None else key.stored.split(":")[4])
        return key if right else None

    def _accept(self, digest: bytes, sent: bytes, key: Key) -> bool:
        if digest in self._known:
            return True
        log2_n, r, p, _, salt, _ = key.stored.split(":")[1:]
        secret = sent.rpartition(b".")[2]
        if not hmac.compare_digest(_hash_of(secret, int(log2_n), int(r), int(p), bytes.fromhex(salt)), key.stored):
            return False
        current = self._keys.get(key.name)
        if current is None or current.stored != key.stored:
            return False
        self._known[digest] = current
        return True

    def _read_again(self) -> None:
        """Take the keys of the changed file; a damaged one changes nothing."""
        try:
            keys = self._read()
        except SettingsError as error:
            _log.error("the API keys stay as they were: %s", error)
            return
        self._keys = keys
        self._known = {
            digest: keys[key.name]
            for digest, key in self._known.items()
            if key.name in keys and keys[key.name].stored == key.stored
        }
        _log.warning("read the API keys again: %s", ", ".join(sorted(keys)) or "every key is revoked")

    def _read(self) -> dict[str, Key]:
        text = self._text
        if self._file is None:
            return read_lines(text, "LIPCERT_API_KEYS")
        try:
            of_file = read_lines(self._file.read_text(encoding="utf-8"), str(self._file))
        except (OSError, UnicodeError) as error:
            raise SettingsError(f"LIPCERT_API_KEYS_FILE={str(self._file)!r} cannot be read: {error}") from error
        of_text = read_lines(text, "LIPCERT_API_KEYS")
        twice = sorted(of_file.keys() & of_text.keys())
        if twice:
            raise SettingsError(f"{self._file} and LIPCERT_API_KEYS both have a key {twice[0]!r}; rename one")
        return of_file | of_text


def _fault_of(words: list[str], keys: dict[str, Key]) -> str | None:
    """Return the fault of a line, without its hash."""
    if len(words) != 3:
        return f"it has {len(words)} words instead of name, scopes and hash"
    name, scopes, stored = words
    if not _NAME.fullmatch(name):
        return f"{name[:100]!r} is no name of a key"
    if name in keys:
        return f"the name {name!r} is used twice"
    unknown = sorted(set(scopes.split(",")) - set(SCOPES))
    if unknown:
        return f"{unknown[0][:100]!r} is no scope (scopes are {', '.join(SCOPES)})"
    found = _HASH.fullmatch(stored)
    if found is None:
        return f"the hash of {name!r} is damaged"
    log2_n, r, p = (int(number) for number in found.groups()[:3])
    if not (log2_n and r and p and 128 * r * 2**log2_n <= _MAX_MEMORY_BYTES // 2):
        return f"the parameters of scrypt of {name!r} are zero, or take too much memory"
    return None


def _hash_of(secret: bytes, log2_n: int = _LOG2_N, r: int = _R, p: int = _P, salt: bytes | None = None) -> str:
    salt = secrets.token_bytes(16) if salt is None else salt
    tag = hashlib.sha256(secret).digest()[:_TAG_BYTES]
    found = hashlib.scrypt(secret, salt=salt, n=2**log2_n, r=r, p=p, maxmem=_MAX_MEMORY_BYTES, dklen=32)
    return f"scrypt:{log2_n}:{r}:{p}:{tag.hex()}:{salt.hex()}:{found.hex()}"
