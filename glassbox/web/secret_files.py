"""Files that decide who gets in at `export.http`, and what is said of those that can't be used.

Owns the wording; what makes a file trustworthy is `core/secret_file.py`'s.
"""

import os
from pathlib import Path

from glassbox.core.secret_file import SecretFileError, read_secret_file


class AccessError(ValueError):
    """A file of `export.http` that can't be used; one line with key, path, rule and remedy."""

    def __init__(self, key: str, path: Path, text: str) -> None:
        super().__init__(f"export.http.{key} ({path}) {text}")


def expanded(path: str) -> Path:
    """The path with ~ replaced, where there is a home directory."""
    return Path(os.path.expanduser(path))


def read_trusted(key: str, path: Path, *, secret: bool) -> bytes:
    """Content of such a file, as `read_secret_file` gives it.

    Args:
        key: of the setting below `export.http`, for errors.
        path: of the file.
        secret: others may not read it.

    Raises:
        AccessError: it can't be read, is no regular file, too large, or not safe.
    """
    try:
        return read_secret_file(path, secret=secret)
    except SecretFileError as error:
        raise AccessError(key, path, str(error)) from None
