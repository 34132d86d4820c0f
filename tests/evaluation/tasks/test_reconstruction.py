"""rFID and its companions of tiny tokenizers."""

import numpy as np
import pytest
import torch
from evaluations import read_report, run, run_in_two_processes
from factories import tiny_fae, tiny_kl
from safetensors.torch import save_file

from hf_fae.evaluation.inputs.extractors import load_extractors
from hf_fae.evaluation.metrics.distances import GaussianStatistics, frechet_distance
from hf_fae.evaluation.resumable import Parts
from hf_fae.evaluation.tasks.reconstruction import choose_partners
from hf_fae.images import to_uint8
from hf_fae.utils.image_metrics import border_gradients, feature_cosine, psnr, ssim


@pytest.fixture
def options(tokenizer_folder, judge_folder, data_folder, tmp_path):
    """A run that works."""
    return {
        "model": tokenizer_folder,
        "output_dir": tmp_path / "out",
        "extractors": [f"effnet={judge_folder}"],
        "dataset_name": data_folder,
        "metrics": ["rfid", "psnr", "ssim", "feature_cosine"],
        "batch_size": 16,
    }


@pytest.fixture(scope="module")
def vgg16_file(tmp_path_factory):
    from torchvision.models import vgg

    torch.manual_seed(0)
    state = vgg.vgg16(weights=None).features.state_dict(prefix="features.")
    path = tmp_path_factory.mktemp("vgg16") / "vgg16.safetensors"
    save_file({name: values.contiguous() for name, values in state.items()}, path)
    return path


@pytest.mark.filterwarnings("ignore")  # so few samples
def test_the_numbers_are_those_of_the_pictures(options, judge_folder, data_folder, vgg16_file, tmp_path):
    metrics = [*options["metrics"], "lpips", "seam_ratio"]
    changes = {"metrics": metrics, "vgg16": vgg16_file, "split": "validation[30:50]"}
    result = run("reconstruction", **options | changes)

    from datasets import Image, load_dataset

    from hf_fae.losses.perceptual import LPIPS

    rows = load_dataset(str(data_folder), split="validation").cast_column("image", Image(decode=False))
    good = rows.select([number for number in range(30, 50) if number != 40]).cast_column("image", Image())
    images = torch.stack([torch.from_numpy(np.array(row["image"])) for row in good]).permute(0, 3, 1, 2)
    pixel_values, vae = images / 127.5 - 1, tiny_fae()
    with torch.no_grad():
        latents = vae.encode(pixel_values).latent_dist.mode()
        given_back = to_uint8(vae.decode(latents).sample)
        (extractor,) = load_extractors([str(judge_folder)])
        statistics = [GaussianStatistics.of([extractor(batch)["features"]]) for batch in (given_back, images)]
        sample = given_back / 127.5 - 1
        expected = {
            "rfid_effnet": frechet_distance(*statistics),
            "psnr": psnr(sample, pixel_values).item(),
            "ssim": ssim(sample, pixel_values).item(),
            "seam_ratio": (lambda means: means[0] / means[1])(
                border_gradients(sample, pixel_values, 8).mean(0)
            ).item(),
            "lpips": LPIPS.from_pretrained(str(vgg16_file))(sample, pixel_values).item(),
            "feature_cosine": feature_cosine(
                vae.decode_features(latents), vae.extract_features(pixel_values)[0]
            ).item(),
        }
    assert result.metrics == pytest.approx(expected, rel=1e-4)
    report = read_report(tmp_path / "out")
    assert report["details"] == {"damaged": 1} and report["settings"]["pictures"]["count"] == 20


@pytest.mark.filterwarnings("ignore")
def test_ifid_is_that_of_images_halfway_between_latents(options, judge_folder, data_folder, tmp_path):
    """Partners lie in other parts, and in other batches."""
    changes = {"metrics": ["ifid"], "split": "train"}
    result = run("reconstruction", **options | changes)

    from datasets import load_dataset

    pictures = load_dataset(str(data_folder), split="train")["image"]
    images = torch.stack([torch.from_numpy(np.array(picture)) for picture in pictures]).permute(0, 3, 1, 2)
    partners, vae = choose_partners(len(images), 0), tiny_fae()
    assert sorted(partners) == list(range(90)) and all(one != other for one, other in enumerate(partners))
    (extractor,) = load_extractors([str(judge_folder)])
    with torch.no_grad():
        latents = vae.encode(images / 127.5 - 1).latent_dist.mode()
        halfway = to_uint8(vae.decode((latents + latents[partners]) / 2).sample)
        statistics = [GaussianStatistics.of([extractor(batch)["features"]]) for batch in (halfway, images)]
    assert result.metrics == pytest.approx({"ifid_effnet": frechet_distance(*statistics)}, rel=1e-3)

    run("reconstruction", **options | changes | {"output_dir": tmp_path / "cut"})
    (tmp_path / "cut" / "report.json").unlink()
    next((tmp_path / "cut" / "parts").rglob("*.safetensors")).unlink()
    again = run("reconstruction", **options | changes | {"output_dir": tmp_path / "cut"})
    assert again.metrics == result.metrics


@pytest.mark.filterwarnings("ignore")
def test_ifid_leaves_out_images_with_a_corrupt_partner(options, tmp_path):
    run("reconstruction", **options | {"metrics": ["rfid", "ifid"]})
    parts = Parts(tmp_path / "out" / "parts" / "images", 70, 16)
    counts = [len(parts.stack(f"{kind}.effnet.features")) for kind in ("original", "reconstruction", "interpolation")]
    assert counts == [69, 69, 68]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_processes_write_the_report_of_one(processes, options, tmp_path):
    run("reconstruction", **options)
    run_in_two_processes(processes, "reconstruction", **options | {"output_dir": tmp_path / "two"})
    assert (tmp_path / "two" / "report.json").read_bytes() == (tmp_path / "out" / "report.json").read_bytes()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_the_batch_size_moves_no_more_than_rounding(options, tmp_path, batch_size):
    """A few 8-bit values of what is given back by 1; all else is the same."""
    one = run("reconstruction", **options)
    other = run("reconstruction", **options | {"batch_size": batch_size, "output_dir": tmp_path / "other"})
    assert other.metrics == pytest.approx(one.metrics, rel=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_tokenizers_of_diffusers_and_of_pipelines(options, pipeline_folder, tmp_path):
    tiny_kl().save_pretrained(tmp_path / "kl")
    found = run("reconstruction", **options | {"model": tmp_path / "kl"}).metrics
    assert found.keys() == {"rfid_effnet", "psnr", "ssim"}


@pytest.mark.filterwarnings("ignore")
def test_larger_pictures(options, tmp_path):
    result = run("reconstruction", **options | {"resolution": 48, "max_samples": 10, "metrics": ["psnr"]})
    assert result.settings["resolution"] == 48 and result.settings["pictures"]["count"] == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": ["fid"]}, "metrics must be among rfid, .*, got 'fid'"),
        ({"resolution": 30}, "resolution must be a positive multiple of 8, got 30"),
        ({"resolution": 8, "metrics": ["seam_ratio"]}, "resolution must be above 8 for seam_ratio, .* got 8"),
        ({"dataset_name": "VIRTUAL.npz"}, "an npz is a reference for generated images"),
        ({"split": "validation[:1]"}, "must have at least 2 images, got 1"),
        ({"metrics": ["lpips"], "vgg16": "nowhere.pth"}, "vgg16='nowhere.pth' must be a file of weights"),
        ({"metrics": ["lpips"], "vgg16": __file__}, "vgg16 .* cannot be loaded"),
        ({"model": "JUDGE"}, "--model .* cannot be loaded"),
    ],
)
def test_errors_come_before_anything_is_written(options, judge_folder, tmp_path, changes, message):
    changes = {name: judge_folder if value == "JUDGE" else value for name, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        run("reconstruction", **options | changes)
    assert not (tmp_path / "out").exists()
