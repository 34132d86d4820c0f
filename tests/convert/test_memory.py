"""Memory of a conversion at real size, see `benchmarks/convert_memory.py`."""

import sys

import pytest


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["", "bfloat16"])
def test_one_copy(dtype, script, tmp_path):
    """LightningDiT-XL and its tokenizer, 3 GB: at most 1.3 times their size beyond what the imports take.

    Pages of the mapped files count as well.
    """
    results = script("convert_memory").measure(tmp_path, dtype)
    for step in ("convert", "load"):
        assert results[step]["peak"] - results["imports"]["peak"] <= 1.3 * results["size"]
