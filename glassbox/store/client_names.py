"""Who asked: a name for each client of a server, from which nobody learns its key.

Owns the names, and the server's secret that makes them: 32 random bytes in the run directory, so that all API servers
of a server name a client alike, and that a name can't be looked up in a table of hashed keys. What a client sent is
never kept, logged or exported. Where the headers come from is `adapter/http_request.py`'s, and who may see what
`web/viewers.py`'s.
"""

import contextlib
import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Final

from glassbox.core.trace_options import ANONYMOUS, CLIENT_DIGITS

AUTHORIZATION: Final = "authorization"
_NAME: Final = "client-secret"
_SECRET_BYTES: Final = 32


class ClientNames:
    """The names of a server's clients.

    A client is who its header says, where a gateway sets one; else the key by which vLLM let it in; else `ANONYMOUS`.

    Args:
        run_dir: of the server; it need not exist yet.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = Path(run_dir) / _NAME
        self._secret: bytes | None = None

    def of(
        self, values: Callable[[str], Sequence[str]], header: str | None, api_keys: Collection[str] | None = ()
    ) -> str:
        """The name of whoever sent a request: `CLIENT_DIGITS` hexadecimal digits, or `ANONYMOUS`.

        Args:
            values: returns what the request's headers of a name (in any case) say, one for each time it is there.
            header: name of the one that tells the client; None: its key does.
            api_keys: vLLM's. A bearer token that is none of them says nothing: whoever is let in without one could make
                up a new one for each request. None: there are some, which aren't known; any token is one.

        Raises:
            OSError: the secret can't be read or made.
        """
        if header is not None:
            # A header that is there twice is another client than either: a gateway that adds its own to a client's
            # must not make the one the other.
            sent = values(header.lower())
            return self._name("header", header.lower(), *sent) if any(sent) else ANONYMOUS
        token = _bearer(values(AUTHORIZATION))
        if token is None or not (api_keys is None or _is_one_of(token, api_keys)):
            return ANONYMOUS
        return self._name("key", token)

    def _name(self, *parts: str) -> str:
        if self._secret is None:
            self._secret = _secret(self._path)
        message = b"".join(len(data).to_bytes(4, "big") + data for data in map(_encoded, parts))
        return hmac.new(self._secret, message, hashlib.sha256).hexdigest()[:CLIENT_DIGITS]


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _bearer(values: Sequence[str]) -> str | None:
    """The token, read as vLLM's own middleware reads it: of the first header."""
    scheme, _, token = (values[0] if values else "").partition(" ")
    return token if scheme.lower() == "bearer" and token else None


def _is_one_of(token: str, keys: Collection[str]) -> bool:
    digest, found = hashlib.sha256(_encoded(token)).digest(), False
    for key in keys:  # all of them: how long it takes tells nothing
        found |= hmac.compare_digest(digest, hashlib.sha256(_encoded(key)).digest())
    return found


def _secret(path: Path) -> bytes:
    """The server's secret; whichever of its processes needs it first makes it.

    Raises:
        OSError: it can't be read or made, or others than this user could have.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        return _read(path)
    # Linked into its place whole: nobody reads a part of it, and of two that make one the first one's stays.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(_SECRET_BYTES))
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return _read(path)


def _read(path: Path) -> bytes:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise PermissionError(
                f"{path} must be a file of user {os.geteuid()} that no other may read, got mode "
                f"{stat.S_IMODE(found.st_mode):04o} of user {found.st_uid}; remove it, and the server makes another"
            )
        secret = file.read(_SECRET_BYTES + 1)
    if len(secret) != _SECRET_BYTES:
        raise OSError(f"{path} must hold {_SECRET_BYTES} bytes, got {len(secret)}; remove it, and restart the server")
    return secret
