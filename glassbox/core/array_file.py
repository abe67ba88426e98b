"""Arrays of a file that numpy has written (.npz), read by somebody who doesn't know who wrote it.

`np.load` takes the sizes that a file declares for granted: a megabyte can unpack to gigabytes, and an array's header
can ask for as much as it likes. Here the declared sizes are summed up first, and an array has as many bytes as its
member.
"""

import io
import math
import zipfile
from collections.abc import Iterable
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt

_MOST_MEMBERS: Final = 256
_SUFFIX: Final = ".npy"


class ArrayFile:
    """The arrays of an open file.

    Args:
        file: to read from, seekable; it stays open.
        limit: bytes that all arrays together may declare.

    Raises:
        ValueError: it declares more, or has too many members, or compressed ones (nothing that is read so has).
        zipfile.BadZipFile: it is no archive.
    """

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self._archive = zipfile.ZipFile(file)
        members = self._archive.infolist()
        if len(members) > _MOST_MEMBERS:
            raise ValueError(f"must have at most {_MOST_MEMBERS} members, got {len(members)}")
        size = sum(member.file_size for member in members)
        if size > limit:
            raise ValueError(f"must unpack to at most {limit} bytes, got {size}")
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("must not be compressed")
        self._names = {member.filename for member in members}

    def __contains__(self, name: str) -> bool:
        """Whether it has an array of this name."""
        return name + _SUFFIX in self._names

    def read(self, names: Iterable[str]) -> dict[str, npt.NDArray[Any]]:
        """These arrays, by name.

        Raises:
            ValueError: one is missing, is no array of plain numbers or texts, or has another number of bytes than its
                shape says.
            zipfile.BadZipFile: one is damaged.
        """
        return {name: self._read(name) for name in names}

    def _read(self, name: str) -> npt.NDArray[Any]:
        if name not in self:
            raise ValueError(f"must have an array {name}")
        data = io.BytesIO(self._archive.read(name + _SUFFIX))
        version = np.lib.format.read_magic(data)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(data)
        elif version == (2, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(data)
        else:
            raise ValueError(f"{name} must be of version 1 or 2 of numpy's format, got {version}")
        if dtype.hasobject:
            raise ValueError(f"{name} must hold plain numbers, got {dtype}")
        content = data.getbuffer()[data.tell() :]
        if any(length < 0 for length in shape) or math.prod(shape) * dtype.itemsize != len(content):
            raise ValueError(f"{name} must have the bytes of shape {list(shape)} and type {dtype}, got {len(content)}")
        array = np.frombuffer(content, dtype=dtype, count=math.prod(shape)) if len(content) else np.empty(0, dtype)
        return array.reshape(shape, order="F" if fortran else "C").copy()
