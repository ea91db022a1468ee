from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lalm_patch.storage.netcdf import clean_text, from_bytes, sanitise, to_bytes

anything = st.text(st.characters(exclude_categories=()), max_size=8)
storable = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)


def plain(dataset: xr.Dataset) -> xr.Dataset:
    """Written by us, opened as a stranger opens it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "result.nc")
        path.write_bytes(to_bytes(sanitise(dataset)))
        with xr.open_dataset(path) as found:
            return found.load()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(storable | st.none() | st.just(float("nan")), max_size=4),
    hnp.arrays(st.sampled_from(["f4", "f8", "i4", "i8", "u1", "?"]), hnp.array_shapes(min_dims=0, min_side=0)),
    st.dictionaries(st.from_regex(r"\A[a-z]{1,5}\Z").filter(lambda name: name not in {"units"}), storable, max_size=3),
)
def test_what_netcdf_can_hold_comes_back(texts: list[Any], numbers: np.ndarray, attributes: dict[str, str]) -> None:
    dataset = xr.Dataset(
        {"text": ("sample", np.array(texts, object)), "number": ([f"d{n}" for n in range(numbers.ndim)], numbers)},
        attrs=attributes,
    )
    found = plain(dataset)
    assert found["text"].values.tolist() == [text if isinstance(text, str) else "" for text in texts]
    assert found["text"].dtype.kind == "U"
    assert found["number"].dtype == numbers.dtype
    np.testing.assert_array_equal(found["number"].values, numbers)
    assert found.attrs == attributes


@given(anything)
def test_cleaned_text_is_what_utf8_can_hold_and_nothing_is_hidden(text: str) -> None:
    cleaned = clean_text(text)
    assert "\0" not in cleaned
    cleaned.encode("utf-8")
    if "\\" not in text:  # undo it by another road
        assert cleaned.encode("latin-1", "backslashreplace").decode("unicode_escape") == text


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        ("é\n", "é\n"),
        (np.str_("x"), "x"),
        ("a\0\ud800", "a\\x00\\ud800"),
        (3, 3),
        (-(2**63), -(2**63)),
        (2**70, str(2**70)),
        (1.5, 1.5),
        (float("-inf"), float("-inf")),
        (np.float32(0.5), 0.5),
        ([1, 2], [1, 2]),
        (np.array([1.5, 2.0]), [1.5, 2.0]),
        (("a", np.str_("b")), ["a", "b"]),
        (np.array(["a", "b"]), ["a", "b"]),
        ([1], "[1]"),
        ([], "[]"),
        (["a"], '["a"]'),
        ([1, "a"], '[1, "a"]'),
        ([True, False], "[true, false]"),
        ([[1, 2], [3, 4]], "[[1, 2], [3, 4]]"),
        (True, "true"),
        (np.False_, "false"),
        (None, "null"),
        ({"a": [None, "é"]}, '{"a": [null, "é"]}'),
    ],
)
def test_attributes(value: object, stored: object) -> None:
    found = plain(xr.Dataset({"v": ("d", [1.0], {"x": value})}, attrs={"x": value}))
    for owner in (found, found["v"]):
        read = owner.attrs["x"]
        assert (read.tolist() if isinstance(read, np.ndarray | np.generic) else read) == stored


def test_text_of_every_kind_and_coordinates_stay_where_they_are() -> None:
    dataset = xr.Dataset(
        {
            "half": ("sample", np.array([1.0, np.nan], np.float16)),
            "mixed": ("sample", np.array(["a", np.str_("b")], object)),
            # As objects, pandas with pyarrow refuses surrogates while the dataset is made.
            "cut": ("sample", np.array(["\ud83d", "\ude00."])),
            "bytes": ("sample", np.array([b"a", b"bc"])),
            "nothing": (("sample", "empty"), np.empty((2, 0), object)),
        },
        coords={
            "sample": np.array(["né\0", "b"], object),
            "label": ("sample", np.array(["cat", "dog"])),
            "fixed": "silence",
        },
    )
    given_values = dataset.copy(deep=True)
    found = plain(dataset)
    assert dataset.identical(given_values), "sanitise must not change what it is given"
    assert set(found.coords) == {"sample", "label", "fixed"}
    assert found.sel(sample="né\\x00")["label"].item() == "cat"
    assert found["fixed"].item() == "silence"
    assert found["mixed"].values.tolist() == ["a", "b"]
    assert found["cut"].values.tolist() == ["\\ud83d", "\\ude00."]
    assert found["bytes"].values.tolist() == [b"a", b"bc"]
    assert (found["nothing"].shape, found["nothing"].dtype.kind) == ((2, 0), "U")
    assert found["half"].dtype == np.float32
    xr.testing.assert_identical(plain(found), found)
    stored, own = sanitise(dataset), io.BytesIO()
    stored.to_netcdf(own, engine="h5netcdf")
    assert to_bytes(stored) == own.getvalue()


def test_what_has_no_form_in_netcdf_is_named() -> None:
    with pytest.raises(TypeError, match=r"variable 'v' holds 3 at \(1,\)"):
        sanitise(xr.Dataset({"v": ("d", np.array(["a", 3], object))}))
    with pytest.raises(TypeError, match=r"attribute 'where' of variable 'v': .*PosixPath"):
        sanitise(xr.Dataset({"v": ("d", [1.0], {"where": Path("x")})}))
    with pytest.raises(TypeError, match=r"attribute 'z' of the dataset: .*complex"):
        sanitise(xr.Dataset(attrs={"z": 1j}))


def test_a_dataset_that_would_change_is_refused() -> None:
    dates = xr.Dataset({"v": ("d", [1.0, 2.0], {"units": "days since 2000-01-01"})})
    with pytest.raises(ValueError, match="v: float64 became datetime64"):
        to_bytes(sanitise(dates))


@pytest.mark.parametrize(
    "dataset",
    [xr.Dataset(attrs={"": 1}), xr.Dataset({"": ("d", [1.0])}), xr.Dataset({"v": ("d", [1.0], {"": 1})})],
)
def test_an_empty_name_is_refused(dataset: xr.Dataset) -> None:
    with pytest.raises(ValueError, match="empty name"):
        to_bytes(sanitise(dataset))


def test_a_config_survives_as_json() -> None:
    config = {"model": {"name": "tiny"}, "layers": [0, 1], "cache": None}
    assert json.loads(plain(xr.Dataset(attrs={"config": config})).attrs["config"]) == config
    assert from_bytes(to_bytes(sanitise(xr.Dataset()))).sizes == {}
