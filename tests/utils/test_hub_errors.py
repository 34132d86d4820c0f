import pytest
from transformers import AutoConfig

from hf_fae.utils.hub_errors import hub_errors


def test_a_path_that_does_not_exist(tmp_path):
    with pytest.raises(OSError, match="absent/encoder' cannot be loaded: there is no such folder"):
        with hub_errors(str(tmp_path / "absent" / "encoder")):
            AutoConfig.from_pretrained(tmp_path / "absent" / "encoder")
