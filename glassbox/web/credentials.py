"""Proofs of who asks: bearer tokens, and users with passwords.

Owns the comparison, in constant time, and how the files of `export.http` that name them are read. No token or password
is kept: only its hash.
"""

import asyncio
import base64
import binascii
import hashlib
import re
import secrets
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from starlette.concurrency import run_in_threadpool

from glassbox.web.secret_files import AccessError, read_trusted

# A guess of so many characters is not found by trying, whatever makes the requests.
MIN_TOKEN_CHARS: Final = 16
_TOKEN: Final = re.compile(r"[\x21-\x7e]+")
_USER_LINE: Final = re.compile(r"([^:\s][^:]*):(\$2[aby]\$(\d\d)\$[./A-Za-z0-9]{53})")
# 2^16 rounds take seconds of a core for each password that is tried.
_MAX_COST: Final = 16
_REMEMBERED: Final = 128


class Tokens:
    """Bearer tokens, compared as vLLM compares its API keys: SHA-256, each of them, in constant time.

    Args:
        tokens: any of which lets in.
    """

    scheme = "Bearer"

    def __init__(self, tokens: Iterable[str]) -> None:
        self._digests = tuple(_digest(token) for token in tokens)

    async def admits(self, scheme: str, value: str) -> bool:
        """Whether `Authorization: {scheme} {value}` holds one of them."""
        if scheme.lower() != "bearer":
            return False
        given, found = _digest(value), False
        for digest in self._digests:
            found |= secrets.compare_digest(given, digest)
        return found


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


class Users:
    """Users and the bcrypt hashes of their passwords.

    bcrypt takes a good part of a second of a core on purpose: one password is tried at a time, off the loop, and one
    that was right is remembered (by a keyed hash), so that a scrape costs nothing.

    Args:
        hashes: by user.
    """

    scheme = "Basic"

    def __init__(self, hashes: Mapping[str, str]) -> None:
        self._hashes = {user: value.encode() for user, value in hashes.items()}
        self._salt = secrets.token_bytes(32)
        self._known: OrderedDict[bytes, None] = OrderedDict()
        self._one_at_a_time = asyncio.Lock()

    async def admits(self, scheme: str, value: str) -> bool:
        """Whether `Authorization: {scheme} {value}` holds the password of one of them."""
        if scheme.lower() != "basic":
            return False
        try:
            user, colon, password = base64.b64decode(value, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError, ValueError):
            return False
        if not colon:
            return False
        key = hashlib.blake2b(f"{user}:{password}".encode(), key=self._salt).digest()
        if key in self._known:
            self._known.move_to_end(key)
            return True
        async with self._one_at_a_time:
            if not await run_in_threadpool(self._is_right, user, password):
                return False
        self._known[key] = None
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return True

    def _is_right(self, user: str, password: str) -> bool:
        import bcrypt

        known = self._hashes.get(user)
        # An unknown user takes as long as a known one.
        against = next(iter(self._hashes.values())) if known is None else known
        try:
            return bcrypt.checkpw(password.encode(), against) and known is not None
        except ValueError:  # longer than bcrypt takes, or with a NUL
            return False


def _lines(key: str, path: Path) -> list[str]:
    """Lines of a secret file without blank ones and comments.

    Raises:
        AccessError: it can't be read, isn't safe, or says nothing.
    """
    try:
        text = read_trusted(key, path, secret=True).decode()
    except UnicodeDecodeError:
        raise AccessError(key, path, "must be UTF-8 text; is it the right file?") from None
    lines = [line.strip() for line in text.splitlines()]
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise AccessError(key, path, "must have at least one line, got none; delete the key to let in everybody")
    return found


def read_tokens(path: Path) -> Tokens:
    """The tokens of a file: one a line, blank lines and those that begin with # aside.

    Raises:
        AccessError: the file or a line can't be used. What the line holds isn't said.
    """
    tokens = _lines("token_file", path)
    for number, token in enumerate(tokens, start=1):
        if len(token) < MIN_TOKEN_CHARS or not _TOKEN.fullmatch(token):
            raise AccessError(
                "token_file",
                path,
                f"must hold tokens of at least {MIN_TOKEN_CHARS} printable ASCII characters without blanks, one a "
                f"line; token {number} is none; make one with `openssl rand -hex 32`",
            )
    return Tokens(tokens)


def read_users(path: Path) -> Users:
    """The users of a file: lines `name:hash`, as `htpasswd -nB name` prints them.

    Raises:
        AccessError: the file or a line can't be used, or bcrypt is not installed. What the line holds isn't said.
    """
    hashes: dict[str, str] = {}
    for number, line in enumerate(_lines("users_file", path), start=1):
        match = _USER_LINE.fullmatch(line)
        if match is None or not 4 <= int(match[3]) <= _MAX_COST:
            raise AccessError(
                "users_file",
                path,
                f"must hold lines name:hash with bcrypt's hash of cost 4 to {_MAX_COST}; user {number} has none; make "
                "one with `htpasswd -nB NAME`",
            )
        if match[1] in hashes:
            raise AccessError("users_file", path, f"must name each user once; user {number} is there before; delete it")
        hashes[match[1]] = match[2]
    try:
        import bcrypt  # noqa: F401
    except ImportError:
        raise AccessError("users_file", path, "needs the package bcrypt; use pip install bcrypt") from None
    return Users(hashes)
