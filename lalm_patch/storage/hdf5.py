"""HDF5 files whose objects are looked up once: h5netcdf asks for each of them by its path dozens of times."""

from __future__ import annotations

import io
from typing import Any

import h5py


class KnownObjects(h5py.File):  # type: ignore[misc]
    """An HDF5 file in memory that hands out an object it has opened before again, until something is deleted.

    Args:
        buffer: the file.
        mode: "r" to read it, "w" to write it.
    """

    def __init__(self, buffer: io.BytesIO, mode: str) -> None:
        # As netCDF asks for: what is in a file keeps the order in which it was made.
        super().__init__(buffer, mode, **({"track_order": True} if mode == "w" else {}))
        self._known: dict[str, Any] = {}

    def __getitem__(self, name: Any) -> Any:
        if not isinstance(name, str):
            return super().__getitem__(name)  # a reference
        found = self._known.get(name)
        if found is None:
            found = super().__getitem__(name)
            if name == "/":
                found = _Root(found.id, self._known)
            self._known[name] = found
        return found

    def close(self) -> None:
        """See `h5py.File`."""
        self._known.clear()
        super().close()


class _Root(h5py.Group):  # type: ignore[misc]
    """The file's root group, where h5netcdf deletes: a dimension's place is taken by the variable of its name."""

    def __init__(self, identifier: Any, known: dict[str, Any]) -> None:
        super().__init__(identifier)
        self._known = known

    def __delitem__(self, name: str) -> None:
        self._known.clear()
        super().__delitem__(name)
