"""Fixtures for tests that read data sets and start Accelerate: what other tests did does not show."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory):
    """`datasets` keeps what it prepares here rather than in the user's cache."""
    import datasets

    previous, datasets.config.HF_DATASETS_CACHE = (
        datasets.config.HF_DATASETS_CACHE,
        tmp_path_factory.mktemp("datasets-cache"),
    )
    yield
    datasets.config.HF_DATASETS_CACHE = previous


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate allows one precision a process; every test may choose its own."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)  # fixtures of the next module come before its tests
