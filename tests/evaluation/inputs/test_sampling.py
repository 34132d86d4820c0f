"""What is drawn for which number, whatever is drawn beside it."""

from collections import Counter

import numpy as np
import pytest
import torch
from factories import tiny_fae_dit_pipeline

from hf_fae.evaluation.inputs.numbered_images import ImageArguments
from hf_fae.evaluation.inputs.sampling import Sampler, SamplingArguments, SavedSamples


def sampler(folder, **options):
    args = SamplingArguments(**{"model": str(folder), "output_dir": "nowhere", "num_samples": 500, **options})
    return Sampler(args, ImageArguments(), torch.device("cpu"))


def test_balanced_labels_are_as_many_of_each_class_in_any_run(pipeline_folder):
    labels = sampler(pipeline_folder).labels(range(500))
    assert set(Counter(labels).values()) == {50}
    assert set(Counter(labels[130:180]).values()) == {5}  # as the runs of the inception score want it


def test_random_labels_are_of_all_classes_and_belong_to_numbers(pipeline_folder):
    drawing = sampler(pipeline_folder, labels="random")
    labels = drawing.labels(range(500))
    assert drawing.labels(range(100, 110)) == labels[100:110]
    assert len(set(labels)) == 10 and max(Counter(labels).values()) > 50 > min(Counter(labels).values())
    assert sampler(pipeline_folder, labels="random", seed=1).labels(range(500)) != labels


def test_a_picture_is_the_same_in_any_company(pipeline_folder):
    one, other = sampler(pipeline_folder, batch_size=3), sampler(pipeline_folder, batch_size=5)
    pictures = one.sample_images(range(10, 20)).int()
    assert pictures.shape == (10, 3, 32, 32)
    for found in (other.sample_images(range(10, 20)), one.sample_images(range(12, 16))):
        start = 0 if len(found) == 10 else 2
        assert (pictures[start : start + len(found)] - found.int()).abs().max() <= 1
    assert (pictures[0] - one.sample_images(range(20, 21))[0].int()).abs().max() > 10  # the same class, other noise


def test_pictures_that_are_not_finite_are_an_error(tmp_path):
    tiny_fae_dit_pipeline(num_inference_steps=2).save_pretrained(tmp_path)
    broken = sampler(tmp_path)
    next(broken.pipe.vae.pixel_decoder.parameters()).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="must be finite"):
        broken.sample_images(range(2))


def test_saved_samples_are_read_as_they_are(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "samples.npz", arr_0=images)
    args = SamplingArguments(model=str(tmp_path / "samples.npz"), output_dir="nowhere", num_samples=11)
    saved = SavedSamples(args, ImageArguments(), torch.device("cpu"))
    assert (saved.count, saved.resolution) == (11, 8)
    assert np.array_equal(saved.sample_images(range(3, 9)).permute(0, 2, 3, 1), images[3:9])
