"""The metrics as modules of `evaluate`: each loads offline from its folder and gives what the function gives."""

import sys
from pathlib import Path

import pytest
import torch

import hf_fae.evaluation
from hf_fae.evaluation.metrics.distances import (
    GaussianStatistics,
    clip_score,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from hf_fae.utils.image_metrics import feature_cosine, psnr, ssim


FOLDER = Path(hf_fae.evaluation.__file__).parent / "hf_metrics"


def features(seed):
    return torch.randn(40, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(seed):
    return features(seed).view(4, 10, 6)


def pictures(seed):
    return torch.randint(256, (4, 16, 24, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def in_range(images):
    return images.permute(0, 3, 1, 2) / 127.5 - 1


# Module -> what makes its inputs, its options, and its results by the functions.
MODULES = {
    "frechet_distance": (
        features,
        {},
        lambda a, b: [frechet_distance(GaussianStatistics.of([a]), GaussianStatistics.of([b]))],
    ),
    "kernel_distance": (features, {"subset_size": 20, "subsets": 5}, lambda a, b: kernel_distance(a, b, 5, 20)),
    "inception_score": (features, {"splits": 4}, lambda a: inception_score(a, 4)),
    "precision_recall": (features, {"neighbours": 2}, lambda a, b: precision_recall(a, b, 2)),
    "clip_score": (features, {}, lambda a, b: [clip_score(a, b)]),
    "feature_cosine": (tokens, {}, lambda a, b: [feature_cosine(a, b).item()]),
    "psnr": (pictures, {}, lambda a, b: [psnr(in_range(a), in_range(b)).item()]),
    "ssim": (pictures, {}, lambda a, b: [ssim(in_range(a), in_range(b)).item()]),
}


def forget_modules(package):
    """A package that is imported looks for its modules in the cache that it was imported from."""
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """`evaluate.load` that reaches no network and writes to a temporary folder only."""
    import evaluate

    folder = tmp_path_factory.mktemp("evaluate")
    package = evaluate.config.MODULE_NAME_FOR_DYNAMIC_MODULES
    other_paths = [path for path in sys.path if not (Path(path) / package).is_dir()]  # whoever loaded here before
    forget_modules(package)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", folder / "modules")
        patch.setattr(sys, "path", other_paths)  # evaluate appends its cache
        yield lambda name: evaluate.load(str(FOLDER / name), cache_dir=str(folder / "data"))
    forget_modules(package)


def test_every_module_is_tested():
    assert sorted(folder.name for folder in FOLDER.iterdir()) == sorted(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_module(load, name):
    inputs, options, function = MODULES[name]
    module = load(name)
    given = [inputs(seed) for seed, _ in enumerate(module.features)]
    named = dict(zip(module.features, given))
    expected = pytest.approx(function(*given), rel=1e-6)
    assert [*module.compute(**named, **options).values()] == expected
    # As rows of numbers, and in batches.
    assert [*module.compute(**{key: value.tolist() for key, value in named.items()}, **options).values()] == expected
    for part in range(0, len(given[0]), 2):
        module.add_batch(**{key: value[part : part + 2].numpy() for key, value in named.items()})
    assert [*module.compute(**options).values()] == expected


@pytest.mark.parametrize("name", MODULES)
def test_module_describes_itself(load, name):
    module = load(name)
    assert module.name == name
    assert module.description and module.citation.startswith("@") and module.reference_urls
    assert all(f"    {argument}: " in module.inputs_description for argument in module.features)
    inputs, options, _ = MODULES[name]
    assert all(f"    {argument}: " in module.inputs_description for argument in options)
    results = module.compute(**dict(zip(module.features, map(inputs, range(2)))), **options)
    assert all(result.removesuffix("_std") in module.inputs_description for result in results)
