"""A dataset as the bytes of a netCDF4 file that plain `xarray.open_dataset` reads back unchanged.

The bytes are made in memory. HDF5 writing to a full disk does raise an error, but its library then crashes
when the process exits; and bytes in hand can be checksummed and read back before a disk is touched.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lalm_patch.storage.journal import dump_json

if TYPE_CHECKING:
    import xarray as xr
    from xarray.backends.common import AbstractDataStore


def clean_text(text: str) -> str:
    r"""`text` as a netCDF string: NUL and lone surrogates, which it cannot hold, become visible `\x00` and `\udXXX`."""
    return str(text).replace("\0", "\\x00").encode("utf-8", "backslashreplace").decode("utf-8")


def sanitise(dataset: xr.Dataset) -> xr.Dataset:
    r"""A copy of `dataset` that netCDF can hold and give back as it is.

    Variables: text becomes `str`, with `clean_text`; missing text (None, NaN) becomes "", since a netCDF string
    cannot be missing; float16 is widened to float32; numbers, booleans and bytes stay. How a file it was
    read from had been encoded is forgotten.

    Attributes: text, numbers, and lists of at least two numbers or two strings are kept (lists of numbers read
    back as arrays). Everything else becomes a JSON string: None, booleans, dictionaries, mixed and nested lists,
    lists of fewer than two elements (which would come back as a scalar), integers beyond 64 bits.

    Raises TypeError, naming the variable or attribute, for what has no such form.
    """
    import xarray as xr

    variables = {
        name: (
            variable.dims,
            _values(np.asarray(variable.values), str(name)),
            _attributes(variable.attrs, f"variable {name!r}"),
        )
        for name, variable in dataset.variables.items()
    }
    coords = {name: variables.pop(name) for name in dataset.coords}
    return xr.Dataset(variables, coords, _attributes(dataset.attrs, "the dataset"))


def to_bytes(dataset: xr.Dataset) -> bytes:
    """The netCDF4 file of a sanitised dataset.

    Raises ValueError as `stored_as` does.
    """
    return stored_as(dataset)[0]


def stored_as(dataset: xr.Dataset) -> tuple[bytes, xr.Dataset]:
    """The netCDF4 file of a sanitised dataset, and what was read back from it.

    Raises ValueError if it would not read back as it is, e.g. for units that xarray takes for dates.
    """
    data = _written(dataset)
    found = from_bytes(data)
    changed = [
        f"{name}: {variable.dtype} became {found[name].dtype}"
        for name, variable in dataset.variables.items()
        if name in found.variables and variable.dtype.kind not in "OUT" and variable.dtype != found[name].dtype
    ]
    if changed or not found.identical(dataset):
        raise ValueError(f"the dataset would not read back as it is: {'; '.join(changed) or _compared(dataset, found)}")
    return data, found


def from_bytes(data: bytes) -> xr.Dataset:
    """The dataset in the bytes of a netCDF4 file, in memory."""
    import xarray as xr

    with _store(io.BytesIO(data), "r") as store:
        return xr.load_dataset(store)


def _written(dataset: xr.Dataset) -> bytes:
    """What `dataset.to_netcdf` writes, byte for byte."""
    if any("" in names for names in (dataset.variables, dataset.attrs, *(v.attrs for v in dataset.variables.values()))):
        raise ValueError("a variable or an attribute has an empty name, which netCDF cannot hold")
    buffer = io.BytesIO()
    with _store(buffer, "w") as store:
        dataset.dump_to_store(store)
    return buffer.getvalue()


@contextmanager
def _store(buffer: io.BytesIO, mode: str) -> Iterator[AbstractDataStore]:
    """What xarray reads a netCDF4 file from or writes it to; finding each object of it once saves half of the time."""
    import h5netcdf
    from xarray.backends import H5NetCDFStore

    from lalm_patch.storage.hdf5 import KnownObjects

    with KnownObjects(buffer, mode) as objects, h5netcdf.File(objects, mode, decode_vlen_strings=True) as file:
        yield H5NetCDFStore(file, mode=mode)


def _compared(dataset: xr.Dataset, found: xr.Dataset) -> str:
    import xarray as xr

    try:
        xr.testing.assert_identical(dataset, found)
    except AssertionError as error:
        return str(error)
    return "the two differ"


def _values(values: NDArray[Any], name: str) -> NDArray[Any]:
    if values.dtype == np.float16:
        return values.astype(np.float32)
    if values.dtype.kind not in "OUT":
        return values
    if values.size == 0:
        return np.empty(values.shape, "<U1")  # as objects, the type of nothing would be guessed: float64
    text = np.empty(values.shape, object)
    for index, value in np.ndenumerate(values):
        if not (isinstance(value, str) or value is None or value != value):
            raise TypeError(f"variable {name!r} holds {value!r} at {index}: expected text, or an array of numbers")
        text[index] = clean_text(value) if isinstance(value, str) else ""
    return text


def _attributes(attributes: dict[Any, Any], owner: str) -> dict[str, Any]:
    stored = {}
    for key, value in attributes.items():
        try:
            stored[clean_text(key)] = _attribute(value)
        except TypeError as error:
            raise TypeError(f"attribute {key!r} of {owner}: {error}") from error
    return stored


def _attribute(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, str):
        return clean_text(value)
    if _is_number(value):
        return value
    if isinstance(value, list | tuple) and len(value) > 1:
        if all(isinstance(item, str) for item in value):
            return [clean_text(item) for item in value]
        if all(_is_number(item) for item in value):
            return list(value)
    return clean_text(dump_json(value).decode("utf-8", "surrogatepass"))


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, float) or (isinstance(value, int) and -(2**63) <= value < 2**63)
