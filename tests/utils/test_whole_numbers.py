import numpy as np
import pytest
import torch

from hf_fae.utils.whole_numbers import whole_number


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), torch.tensor(3).byte()])
def test_whole_numbers(value):
    number = whole_number(value)
    assert number == 3 and type(number) is int


OTHERS = [True, np.bool_(True), torch.tensor(True), 3.0, np.float32(3), torch.tensor(3.0), "3", None, [3]]


@pytest.mark.parametrize("value", [*OTHERS, np.array([3]), torch.tensor([3])])
def test_anything_else(value):
    assert whole_number(value) is None
