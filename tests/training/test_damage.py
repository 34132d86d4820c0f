"""One of each kind of corrupt file; all: `python tests/reliability damaged_files`."""

import pytest
from reliability.damaged_files import CASES


NAMES = [
    *("checkpoint-model.safetensors-flipped", "checkpoint-checksums.json-deleted", "checkpoint-empty-folder"),
    *("all-checkpoints-truncated", "named-checkpoint-empty", "log-NUL-line-2", "log-not-UTF-8-line-0"),
    *("part-safetensors-flipped", "settings-truncated", "cache-train/00001.parquet-flipped", "cache-index-empty"),
]


@pytest.mark.parametrize("name", NAMES)
def test_corrupt_files(tmp_path, datasets_cache, name):
    dict(CASES)[name](tmp_path)
