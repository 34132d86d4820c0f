"""ADM's reference batches: files of their layout, and files that only look like it."""

import numpy as np
import pytest
import torch

from hf_fae.evaluation.inputs.extractors import load_extractors
from hf_fae.evaluation.inputs.references import Reference, ReferenceBatch, write_batch
from hf_fae.evaluation.resumable import Parts


IMAGES = np.random.default_rng(0).integers(0, 256, (70, 32, 32, 3), dtype=np.uint8)


def statistics(width, **changes):
    values = np.random.default_rng(1).normal(size=(width, width))
    return {"mean": values[0], "covariance": values @ values.T, **changes}


@pytest.fixture(scope="module")
def adm(tmp_path_factory):
    """All five arrays, as in `VIRTUAL_imagenet256_labeled.npz`."""
    path = tmp_path_factory.mktemp("adm") / "VIRTUAL.npz"
    pool, spatial = statistics(2048), statistics(2023)
    np.savez(
        path,
        arr_0=IMAGES,
        mu=pool["mean"],
        sigma=pool["covariance"],
        mu_s=spatial["mean"],
        sigma_s=spatial["covariance"],
    )
    return str(path)


def test_statistics_are_those_of_the_file(adm):
    batch = ReferenceBatch(adm)
    for feature, width in (("features", 2048), ("spatial", 2023)):
        expected, found = statistics(width), batch.statistics(feature)
        assert np.array_equal(found.mean, expected["mean"])
        assert np.array_equal(found.covariance, expected["covariance"])
    assert len(batch.sha256) == 64


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_pictures_are_read_in_pieces_and_in_any_order(tmp_path, save):
    save(tmp_path / "batch.npz", arr_0=IMAGES)
    batch = ReferenceBatch(str(tmp_path / "batch.npz"))
    assert len(batch) == 70 and batch.shape == IMAGES.shape
    for numbers in (range(0, 32), range(32, 64), range(64, 70), range(0, 2)):
        images = batch.read(numbers)["images"]
        assert images.dtype == torch.uint8
        assert np.array_equal(images.permute(0, 2, 3, 1), IMAGES[numbers.start : numbers.stop])


def test_a_file_of_statistics_alone(tmp_path):
    pool = statistics(2048)
    np.savez(tmp_path / "stats.npz", mu=pool["mean"], sigma=pool["covariance"])
    batch = ReferenceBatch(str(tmp_path / "stats.npz"))
    assert len(batch) == 0 and batch.statistics("spatial") is None


def test_other_judges_see_the_pictures_themselves(adm, judge_folder, tmp_path):
    """The statistics in the file are of Inception's features: they say nothing to a judge of another kind."""
    extractors = load_extractors([f"effnet={judge_folder}"])
    reference = Reference(ReferenceBatch(adm), extractors, tmp_path, batch_size=32)
    reference.compute()
    features = extractors[0](torch.from_numpy(IMAGES).permute(0, 3, 1, 2))["features"].double()
    found = reference.statistics("features", extractors[0])
    torch.testing.assert_close(found.mean, features.mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.covariance, features.T.cov(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(reference.features(extractors[0]), features.float(), atol=1e-4, rtol=1e-4)


def test_batches_of_ours_are_what_numpy_reads(tmp_path):
    parts = Parts(tmp_path / "parts", 70, 32)
    parts.compute(lambda numbers: {"images": torch.from_numpy(IMAGES[numbers.start : numbers.stop])}, "pictures")
    write_batch(tmp_path / "samples.npz", parts, "images")
    with np.load(tmp_path / "samples.npz") as arrays:
        assert np.array_equal(arrays["arr_0"], IMAGES)


def cut_short(path, values, keep):
    np.savez(path, **values)
    path.write_bytes(path.read_bytes()[:keep])


def test_damaged_pictures(tmp_path):
    """The archive's directory is at its end, and whole: only reading finds the damage."""
    path = tmp_path / "batch.npz"
    np.savez_compressed(path, arr_0=IMAGES)
    data = bytearray(path.read_bytes())
    data[5000:5100] = bytes(100)
    path.write_bytes(data)
    batch = ReferenceBatch(str(path))
    with pytest.raises(ValueError, match="arr_0 of reference .* is corrupt"):
        batch.read(range(70))


ERRORS = {
    "there is no file": (lambda path: None, "cannot be read as an npz: .*No such file"),
    "no archive": (lambda path: path.write_text("mu = 0"), "cannot be read as an npz: File is not a zip file"),
    "empty file": (lambda path: path.write_bytes(b""), "cannot be read as an npz"),
    "broken off": (lambda path: cut_short(path, {"arr_0": IMAGES}, 9000), "cannot be read as an npz"),
    "pickled": (lambda path: np.savez(path, arr_0=np.array([{}])), r"must hold images \(N, H, W, 3\) of uint8"),
    "floats": (lambda path: np.savez(path, arr_0=IMAGES / 255), r"of uint8 as arr_0, got .* of float64"),
    "channels first": (lambda path: np.savez(path, arr_0=IMAGES.transpose(0, 3, 1, 2)), "got .70, 3, 32, 32."),
    "one picture": (lambda path: np.savez(path, arr_0=IMAGES[:1]), "reference must have at least 2 images, got 1"),
    "other arrays": (lambda path: np.savez(path, x=IMAGES), r"must hold arr_0, or mu and sigma, got \['x'\]"),
    "half of the statistics": (lambda path: np.savez(path, mu=np.zeros(3)), "must hold arr_0, or mu and sigma"),
    "another judge's statistics": (
        lambda path: np.savez(path, arr_0=IMAGES, mu=np.zeros(768), sigma=np.eye(768)),
        "mu and sigma of reference .* Inception's have 2048 dimensions, these 768",
    ),
    "shapes that do not fit": (
        lambda path: np.savez(path, arr_0=IMAGES, mu=np.zeros(2048), sigma=np.eye(2023)),
        "mu and sigma of reference .* cannot be used: covariance must have shape",
    ),
    "statistics that are not finite": (
        lambda path: np.savez(path, arr_0=IMAGES, mu=np.full(2048, np.nan), sigma=np.eye(2048)),
        "mean must be finite, got 2048 NaN",
    ),
    "no covariance": (
        lambda path: np.savez(path, arr_0=IMAGES, mu=np.zeros(2048), sigma=-np.eye(2048)),
        "mu and sigma of reference .* the covariance must be symmetric",
    ),
    "the order of Fortran": (
        lambda path: np.savez(path, arr_0=np.asfortranarray(IMAGES)),
        "arr_0 must be in C order, got Fortran's",
    ),
    "no pictures to judge": (
        lambda path: np.savez(path, mu=np.zeros(2048), sigma=np.eye(2048)),
        "reference must have images for effnet to read",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(tmp_path, judge_folder, case):
    make, message = ERRORS[case]
    make(tmp_path / "reference.npz")
    with pytest.raises(ValueError, match=message):
        extractors = load_extractors([f"effnet={judge_folder}"])
        Reference(ReferenceBatch(str(tmp_path / "reference.npz")), extractors, tmp_path / "parts", 32)
    assert not (tmp_path / "parts").exists()
