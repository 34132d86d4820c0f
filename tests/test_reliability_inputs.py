"""`python tests/reliability inputs` and `data_folders`, and representatives of `hub_faults`."""

import pytest
from reliability.data_folders import CASES as DATA_FOLDERS
from reliability.hub_faults import CASES as HUB_FAULTS
from reliability.inputs import CASES as INPUTS


@pytest.mark.parametrize("case", INPUTS, ids=lambda case: case.name)
def test_odd_input(case, tmp_path):
    case.run(tmp_path)


@pytest.mark.parametrize("case", DATA_FOLDERS, ids=lambda case: case.name)
def test_odd_folder(case, tmp_path):
    case.run(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", HUB_FAULTS[::4], ids=lambda case: case.name)
def test_fault_of_the_hub(case, tmp_path):
    case.run(tmp_path)
