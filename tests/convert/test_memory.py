"""Memory of a conversion at real size, see `benchmarks/convert_memory.py`."""

import sys

import pytest


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_copy(script, tmp_path):
    """LightningDiT-XL and its tokenizer, 3 GB: at most 1.3 times their size beyond what the imports take.

    Pages of the mapped files count as well.
    """
    results = script("convert_memory").measure(tmp_path)
    size, base = results.pop("size"), results.pop("imports")["peak"]
    assert results.keys() == {"convert", "convert to bfloat16", "load"}
    assert all(result["peak"] - base <= 1.3 * size for result in results.values())
