"""The task `retrieval` on tiny models."""

import io
import json

import numpy as np
import pytest
import torch
from factories import tiny_fae, tiny_kl
from PIL import Image
from text_models import save_image_text_model, save_sentence_encoder
from torch.nn import functional as F

from hf_fae import AutoencoderFAE
from hf_fae.encoders import VisionEncoder
from hf_fae.evaluation.inputs.numbered_images import ImageArguments, NumberedImages
from hf_fae.evaluation.inputs.spaces import token_spaces
from hf_fae.evaluation.inputs.text_models import SentenceEncoder
from hf_fae.evaluation.metrics.image_text import LinearTextAlignment
from hf_fae.evaluation.tasks.retrieval import RetrievalArguments, evaluate_retrieval


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A sentence encoder, a SigLIP, a CLIP, and an FAE on the vision tower of that SigLIP."""
    folder = tmp_path_factory.mktemp("saved")
    save_sentence_encoder(folder / "sentences")
    save_image_text_model(folder / "siglip")
    save_image_text_model(folder / "clip", "clip")
    sizes = {"patch_size": 8, "encoder_attention_head_dim": 32, "decoder_num_layers": 2}
    sizes |= {"decoder_attention_head_dim": 16, "pixel_hidden_size": 32, "pixel_num_layers": 2}
    sizes |= {"latent_channels": 4, "sample_size": 32, "pixel_num_attention_heads": 2}
    torch.manual_seed(0)
    for name in ("siglip", "clip"):
        encoder = VisionEncoder.from_pretrained(folder / name, dtype=torch.float32)
        AutoencoderFAE.from_encoder(encoder, **sizes).save_pretrained(folder / f"fae-{name}")
    tiny_kl().save_pretrained(folder / "kl")
    return folder


@pytest.fixture
def options(tokenizer_folder, saved, tmp_path):
    """A run that works."""
    text_model = str(saved / "sentences")
    return {
        "model": str(tokenizer_folder),
        "text_model": text_model,
        "output_dir": str(tmp_path / "out"),
        "batch_size": 16,
    }


@pytest.fixture
def pictures(data_folder):
    return ImageArguments(dataset_name=str(data_folder), caption_column="caption")


def read(pictures, split="validation"):
    """The good pictures and their captions."""
    source = NumberedImages(pictures.open(32, 0, "train"), split)
    batch = source.read(range(len(source)))
    captions = [caption for caption, is_good in zip(batch["captions"], batch["is_good"]) if is_good]
    return batch["images"][batch["is_good"]], captions


def recalls(texts, images, name):
    """Of pairs that are all different."""
    found = {}
    for way, similarity in (("text_to_image", texts @ images.T), ("image_to_text", images @ texts.T)):
        ranks = (similarity >= similarity.diag()[:, None]).sum(1)
        found |= {f"{way}_r{k}_{name}": (ranks <= k).double().mean().item() for k in (1, 5, 10)}
    return found


def test_a_linear_map_to_a_sentence_encoder(options, pictures, tmp_path):
    result = evaluate_retrieval(RetrievalArguments(**options), pictures)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["metrics"] == result.metrics and len(result.metrics) == 18
    details = result.details
    assert details["pictures"] == details["captions"] == details["groups"] == 69
    assert details["damaged"] == {"validation": 1, "train": 0}
    assert details["penalties"]["features"] == details["penalties"]["reconstruction"]

    vae, sentences = tiny_fae(), SentenceEncoder.from_pretrained(options["text_model"])
    (images, captions), (shown, wanted) = read(pictures, "train"), read(pictures)
    train, validation = ({n: t.mean(1) for n, t in token_spaces(vae, batch)[0].items()} for batch in (images, shown))
    targets, texts = sentences.text_embeds(captions), sentences.text_embeds(wanted)
    maps = {name: LinearTextAlignment(train[name], targets) for name in ("features", "latents")}
    for name, fitted in (("features", "features"), ("reconstruction", "features"), ("latents", "latents")):
        embeds = maps[fitted].text_embeds(texts), maps[fitted].image_embeds(validation[name])
        for metric, value in recalls(*embeds, name).items():
            assert result.metrics[metric] == pytest.approx(value, abs=1.1 / 69)
            error = (result.metrics[metric] * (1 - result.metrics[metric]) / 69) ** 0.5
            assert details["standard_errors"][metric] == pytest.approx(error)
    assert result.metrics["image_to_text_r10_features"] > 2 * 10 / 69  # the captions name the colours


def test_siglip_reads_the_features_of_its_own_tower(options, saved, pictures):
    models = {"model": str(saved / "fae-siglip"), "text_model": str(saved / "siglip")}
    result = evaluate_retrieval(RetrievalArguments(**options | models), pictures)
    assert len(result.metrics) == 12 and not any(name.endswith("latents") for name in result.metrics)
    assert result.details["penalties"] == {} and result.settings["train_pictures"] is None

    from transformers import AutoModel

    model = AutoModel.from_pretrained(saved / "siglip")
    vae = AutoencoderFAE.from_pretrained(saved / "fae-siglip")
    images, captions = read(pictures)
    spaces = token_spaces(vae, images)[0]
    alphabet = {letter: index for index, letter in enumerate("abcdefghijklmnopqrstuvwxyz ", start=2)}
    ids = torch.tensor([([alphabet[letter] for letter in text] + [0] * 16)[:16] for text in captions])
    with torch.no_grad():
        pixel_values = vae.image_encoder.preprocess(images / 127.5 - 1, (32, 32))
        texts = F.normalize(model.get_text_features(ids).pooler_output, dim=1)
        embeds = {"features": model.get_image_features(pixel_values).pooler_output}
        embeds["reconstruction"] = model.vision_model.head(spaces["reconstruction"])
    for name, values in embeds.items():
        for metric, value in recalls(texts, F.normalize(values, dim=1), name).items():
            assert result.metrics[metric] == pytest.approx(value, abs=1.1 / 69)


def test_coco_with_one_caption_a_row(options, saved, tmp_path):
    """Every picture is there five times: as often as it has captions."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    random, rows = np.random.default_rng(0), []
    for number in range(12):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
        for letter in "abcde":
            caption = f"{letter} {chr(97 + number)}"
            rows.append({"image": {"bytes": file.getvalue(), "path": None}, "caption": caption})
    features = Features({"image": ImageFeature(), "caption": Value("string")})
    (tmp_path / "coco").mkdir()
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "coco" / "validation-00000-of-00001.parquet")
    pictures = ImageArguments(dataset_name=str(tmp_path / "coco"), caption_column="caption")
    models = {"model": str(saved / "fae-siglip"), "text_model": str(saved / "siglip")}
    result = evaluate_retrieval(RetrievalArguments(**options | models), pictures)
    counts = [result.details[name] for name in ("pictures", "captions", "groups")]
    assert counts == [12, 60, 12]
    assert result.metrics["text_to_image_r1_features"] * 60 == pytest.approx(
        round(result.metrics["text_to_image_r1_features"] * 60)
    )
    assert result.metrics["text_to_image_r10_features"] > 0.5  # ten of twelve pictures


def test_interrupted_runs_go_on_to_the_same_result(options, pictures, tmp_path):
    first = evaluate_retrieval(RetrievalArguments(**options), pictures)
    report = (tmp_path / "out" / "report.json").read_bytes()
    sorted((tmp_path / "out" / "parts" / "validation").iterdir())[1].unlink()
    assert evaluate_retrieval(RetrievalArguments(**options), pictures).metrics == first.metrics
    assert (tmp_path / "out" / "report.json").read_bytes() == report
    with pytest.raises(ValueError, match="another seed, 0, got 1"):
        evaluate_retrieval(RetrievalArguments(**options, seed=1), pictures)


@pytest.mark.parametrize(
    ("changed", "of_pictures", "message"),
    [
        ({}, {"caption_column": None}, "caption_column must name the captions to find, got None"),
        ({}, {"caption_column": "absent"}, "has no column 'absent'"),
        ({}, {"max_samples": 1}, "at least 2 images in each split, got 1 in validation"),
        ({"train_split": "validation"}, {}, "train_split .* must be disjoint from split, got 'validation'"),
        ({"text_model": "absent/folder/here"}, {}, "text_model 'absent/folder/here' is not a local folder"),
        ({"text_model": "siglip"}, {}, "must have the tokenizer's encoder as its vision tower"),
        ({"text_model": "clip", "model": "fae-clip"}, {}, "a CLIPModel has a class token for the image"),
        ({"text_model": "siglip", "model": "fae-clip"}, {}, "must have the tokenizer's encoder as its vision tower"),
        ({"model": "kl"}, {}, "must reconstruct features, got a AutoencoderKL, which does not"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    options, saved, pictures, tmp_path, changed, of_pictures, message
):
    folders = {name: str(saved / value) for name, value in changed.items() if (saved / value).exists()}
    for name, value in of_pictures.items():
        setattr(pictures, name, value)
    with pytest.raises(ValueError, match=message):
        evaluate_retrieval(RetrievalArguments(**options | changed | folders), pictures)
    assert not (tmp_path / "out").exists()
