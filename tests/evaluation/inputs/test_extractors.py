import shutil

import pytest
import torch
from factories import tiny_encoder
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from hf_fae.evaluation.inputs.extractors import (
    InceptionExtractor,
    TimmExtractor,
    VisionExtractor,
    extract_features,
    load_extractors,
    metric_name,
)
from hf_fae.evaluation.provenance import identify_model


def pictures(count=5, size=32):
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


@pytest.fixture(scope="module")
def inception(inception_file):
    return InceptionExtractor(str(inception_file))


def test_inception_is_that_of_torch_fidelity(inception, inception_file):
    layers = ["2048", "logits_unbiased"]
    reference = FeatureExtractorInceptionV3("reference", layers, feature_extractor_weights_path=inception_file)
    found = inception(images := pictures(2))
    features, logits = reference(images)
    assert torch.equal(found["features"], features) and torch.equal(found["logits"], logits)
    assert found["logits"].shape == (2, 1008)


def test_spatial_features_are_seven_channels_of_mixed_6_conv(inception):
    """TensorFlow's mixed, mixed_1, ... are Mixed_5b, 5c, 5d, 6a, 6b, 6c, 6d here, so that mixed_6 is Mixed_6d."""
    seen = []
    hook = inception.network.Mixed_6d.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    spatial = inception(pictures(2))["spatial"]
    hook.remove()
    maps = inception.network.Mixed_6d.branch1x1(seen[0])
    assert maps.shape == (2, 192, 17, 17)
    assert spatial.shape == (2, 2023)
    torch.testing.assert_close(spatial.view(2, 17, 17, 7), maps[:, :7].permute(0, 2, 3, 1))


def test_inception_without_weights_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # refuses at once
    with pytest.raises(ValueError, match=rf"put https://\S+.pth at {tmp_path}/\S+, or pass a file .*inception=FILE"):
        load_extractors(["inception"])
    with pytest.raises(ValueError, match="inception='nowhere.pth' must be a file of weights"):
        load_extractors(["inception=nowhere.pth"])


def test_inception_unpickles_no_code(tmp_path):
    torch.save({"code": test_inception_unpickles_no_code}, tmp_path / "evil.pth")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        load_extractors([f"inception={tmp_path / 'evil.pth'}"])


def test_timm_gives_what_its_classifier_sees(judge_folder):
    extractor = TimmExtractor(str(judge_folder))
    outputs = extractor(images := pictures(3))
    model = extractor.network.model
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(outputs["logits"], model((images / 255 - mean) / std))
    torch.testing.assert_close(model.get_classifier()(outputs["features"]), outputs["logits"])
    assert extractor.name == "test_efficientnet"


@pytest.mark.parametrize(
    ("model_type", "pooled"), [("dinov2", True), ("clip", True), ("siglip", True), ("vit", False)]
)
def test_transformers_give_their_pooled_output_or_the_mean_of_tokens(tmp_path, model_type, pooled):
    encoder = tiny_encoder(model_type)
    encoder.save_pretrained(tmp_path / "Some Encoder")
    extractor = VisionExtractor(str(tmp_path / "Some Encoder"))
    images = pictures(3)
    outputs = encoder(images / 127.5 - 1)
    expected = outputs.pooler_output if pooled else outputs.last_hidden_state.mean(1)
    torch.testing.assert_close(extractor(images)["features"], expected)
    assert extractor.name == "some-encoder"


def test_names_stand_in_metrics(judge_folder, inception):
    (named,) = load_extractors([f"effnet={judge_folder}"])
    assert metric_name("fid", named) == "fid_effnet"
    assert metric_name("fid", inception) == "fid"


def test_pictures_are_judged_alike_in_any_company(judge_folder):
    extractors = load_extractors([f"effnet={judge_folder}"])
    images = pictures(70)
    together = extract_features(extractors, images)
    assert together["effnet.features"].shape == (70, 256)
    in_chunks = [extract_features(extractors, chunk) for chunk in images.split(32)]
    assert torch.equal(together["effnet.features"], torch.cat([part["effnet.features"] for part in in_chunks]))


def test_features_that_are_not_finite_are_an_error(judge_folder):
    (extractor,) = load_extractors([f"effnet={judge_folder}"])
    extractor.network.model.classifier.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="logits of effnet must be finite, got 30 NaN"):
        extract_features([extractor], pictures(3))


def test_weights_of_judges_are_known_by_their_hash(judge_folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(judge_folder, copy)
    one, other = (load_extractors([f"effnet={folder}"])[0].settings["sha256"] for folder in (judge_folder, copy))
    assert one == other and len(one) == 64
    (copy / "model.safetensors").write_bytes((judge_folder / "model.safetensors").read_bytes() + b" ")
    assert identify_model(str(copy))["sha256"] != one


def test_unwanted_pictures_hold_their_places(judge_folder):
    extractors = load_extractors([f"effnet={judge_folder}"])
    images, is_good = pictures(40), torch.ones(40, dtype=torch.bool)
    is_good[7] = False
    everything = extract_features(extractors, images)["effnet.features"]
    assert torch.equal(extract_features(extractors, images, is_good)["effnet.features"], everything[is_good])


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "extractors must name at least one, got none"),
        (["=x"], "NAME=PATH with a name of a-z, 0-9, - and _, got '=x'"),
        (["My Net=x"], "got 'My Net=x'"),
        (["net="], "got 'net='"),
        (["/nowhere/at/all"], "extractors '/nowhere/at/all' is not a local folder and cannot be loaded"),
        (["JUDGE", "test_efficientnet=JUDGE"], r"extractors must have different names, got \['test_efficientnet'"),
        (["NO_WEIGHTS"], "extractors .*no-weights' cannot be loaded"),
        (["inception=NO_WEIGHTS/config.json"], "extractors 'inception=.* cannot be loaded"),
        (["TOKENIZER"], "its config.json names neither a timm nor a transformers model"),
    ],
)
def test_errors(judge_folder, tokenizer_folder, tmp_path, sources, message):
    no_weights = tmp_path / "no-weights"
    no_weights.mkdir()
    shutil.copy(judge_folder / "config.json", no_weights)
    places = {"NO_WEIGHTS": str(no_weights), "JUDGE": str(judge_folder), "TOKENIZER": str(tokenizer_folder)}
    for name, place in places.items():
        sources = [source.replace(name, place) for source in sources]
    with pytest.raises(ValueError, match=message):
        load_extractors(sources)
