"""Fixtures that all tests share, and what must be set before torch is imported."""

import importlib
import os
from pathlib import Path


# Results equal those of every other run to the bit only if nothing that a run does not choose changes the order of
# sums. Several threads share them out anew. And on some CPUs (AMD's) MKL takes another order for matrices that are not
# aligned to 64 bytes, as weights are not where safetensors maps them; in its mode of "conditional numerical
# reproducibility" it does not. A CPU without AVX2 takes the best that it has. Child processes inherit all of this.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
import torch  # noqa: E402
from diffusers.models.attention_dispatch import attention_backend  # noqa: E402
from hub_server import hub, processes  # noqa: E402, F401 - fixtures
from published import published_files  # noqa: E402, F401 - a fixture


SHARED = Path(__file__).parents[2] / "shared"


def pytest_collection_modifyitems(config, items):
    if "network" not in config.option.markexpr:
        for item in items:
            if "network" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="downloads gigabytes: runs with -m network"))


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of offline weights and data; tests that need it are skipped where it is not."""
    path = Path(os.environ.get("HF_FAE_ASSETS", SHARED / "assets"))
    if not path.is_dir():
        pytest.skip(f"needs the offline assets: set HF_FAE_ASSETS to their folder ({path} does not exist)")
    return path


@pytest.fixture(scope="session")
def oracle():
    """Finds the folder of a tiny published checkpoint and what the reference code computes with it, by its name.

    All are in `HF_FAE_ORACLES`, a selection in tests/oracles; tests of others are skipped without that variable.
    """
    folders = [Path(os.environ.get("HF_FAE_ORACLES", SHARED / "oracles")), Path(__file__).parent / "oracles"]

    def find(name: str) -> Path:
        for folder in folders:
            if (folder / name).exists():
                return folder / name
        pytest.skip(f"needs the oracle {name}: set HF_FAE_ORACLES to their folder ({folders[0]} does not have it)")

    return find


@pytest.fixture
def script(monkeypatch):
    """Imports a training script or a benchmark by its name."""
    for folder in ("training_scripts", "benchmarks", "experiments", "experiments/emoji"):
        monkeypatch.syspath_prepend(Path(__file__).parents[1] / folder)
    return importlib.import_module


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random state, alone or among others."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def default_attention():
    """A model's `set_attention_backend` also changes the default of the process: undo that after each test."""
    with attention_backend("native"):
        yield
