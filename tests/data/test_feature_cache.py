"""Vision features on disk: read as written, in slices too, and refused if they are not those of the key."""

import json

import ml_dtypes
import numpy as np
import pytest

from reverie_jax.data.feature_cache import FeatureCache, is_complete, write_features
from reverie_jax.errors import DataError
from tests.data.fakes import assert_one_line

KEY, SHAPE = "tower", (2, 3)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_features_are_read_as_written(tmp_path, dtype):
    features = [np.full(SHAPE, n, dtype) for n in range(3)]
    features.insert(1, np.zeros((0, 3), dtype))  # a record without an image
    assert not is_complete(tmp_path / "cache")
    write_features(tmp_path / "cache", KEY, SHAPE, features)
    assert is_complete(tmp_path / "cache")
    cache = FeatureCache(tmp_path / "cache", KEY)
    assert (len(cache), cache.shape, cache.dtype) == (4, SHAPE, dtype)
    for array, expected in zip([*cache[:2], cache[2], cache[-1]], features, strict=True):
        np.testing.assert_array_equal(array, expected)
    assert repr(cache) == repr(FeatureCache(tmp_path / "cache", KEY))


@pytest.mark.parametrize("case", ["missing", "interrupted", "other key", "not JSON", "not metadata", "incomplete"])
def test_other_features_are_refused(tmp_path, case):
    def features():
        yield np.zeros(SHAPE, np.float32)
        if case == "interrupted":
            raise KeyboardInterrupt

    if case == "interrupted":
        with pytest.raises(KeyboardInterrupt):
            write_features(tmp_path, KEY, SHAPE, features())
    elif case != "missing":
        write_features(tmp_path, KEY, SHAPE, features())
        metadata = tmp_path / "features.json"
        if case == "not JSON":
            metadata.write_text("{")
        elif case == "not metadata":
            metadata.write_text("[]")
        elif case == "incomplete":
            metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"records": 2}))
    with pytest.raises(DataError) as error:
        FeatureCache(tmp_path, "other" if case == "other key" else KEY)
    assert_one_line(error, tmp_path)
