"""Numbers in a config that comes with a download are refused before they cost time or memory."""

import json
import time

import pytest
from diffusers import DiffusionPipeline
from factories import tiny_encoder, tiny_fae, tiny_fae_dit_pipeline

from hf_fae import AutoencoderFAE, LightningDiTTransformer2DModel, STARFlowTransformer2DModel
from hf_fae.encoders import VisionEncoder
from hf_fae.loading import open_pipeline
from hf_fae.utils.config_bounds import check_numbers


ABSURD = {
    "layers": (LightningDiTTransformer2DModel, {"num_layers": 10**9}, "num_layers .* must be from 0 to 1024"),
    "heads": (LightningDiTTransformer2DModel, {"num_attention_heads": 10**6}, "num_attention_heads .* to 1024"),
    "no heads": (LightningDiTTransformer2DModel, {"num_attention_heads": 0}, "num_attention_heads .* from 1 to"),
    "width": (AutoencoderFAE, {"feature_dim": 10**8}, "feature_dim .* must be from 1 to 65536, got 100000000"),
    "grid": (LightningDiTTransformer2DModel, {"sample_size": 8192}, "must give at most 262144 tokens, got 67108864"),
    "classes": (LightningDiTTransformer2DModel, {"num_classes": 10**12}, "num_classes .* at most"),
    "many blocks": (STARFlowTransformer2DModel, {"num_layers": [64] * 99}, "num_layers .* to 1024, got 6336"),
    "text": (LightningDiTTransformer2DModel, {"num_layers": "many"}, "num_layers .* must be int, got 'many'"),
    "null": (LightningDiTTransformer2DModel, {"in_channels": None}, "in_channels .* must be int, got None"),
    "real": (LightningDiTTransformer2DModel, {"num_layers": 2.5}, "num_layers .* must be int, got 2.5"),
    "truth": (LightningDiTTransformer2DModel, {"qk_norm": "no"}, "qk_norm .* must be bool, got 'no'"),
    "infinite": (STARFlowTransformer2DModel, {"noise_sigma": float("inf")}, "noise_sigma .* must be finite, got inf"),
    "encoder": (
        AutoencoderFAE,
        {"image_encoder_config": {"model": {"num_hidden_layers": 10**9}}},
        "num_hidden_layers .* must be from 0 to 1024",
    ),
}


@pytest.mark.parametrize("model_class, config, message", ABSURD.values(), ids=ABSURD)
@pytest.mark.parametrize("way", ["__init__", "from_config"])
def test_absurd_configs(model_class, config, message, way):
    start = time.monotonic()
    with pytest.raises(ValueError, match=message):
        model_class(**config) if way == "__init__" else model_class.from_config(config)
    assert time.monotonic() - start < 2


def change(path, **changed):
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


@pytest.fixture
def folder(tmp_path):
    tiny_fae_dit_pipeline(with_encoder=True).save_pretrained(tmp_path)
    return tmp_path


def test_absurd_configs_of_a_pipelines_parts(folder):
    change(folder / "scheduler" / "scheduler_config.json", num_train_timesteps=10**12)
    with pytest.raises(ValueError, match="num_train_timesteps in .* must be from 1 to 1000000"):
        open_pipeline("--model", str(folder))


def test_absurd_transformer_in_a_pipeline(folder):
    change(folder / "transformer" / "config.json", num_layers=10**9)
    with pytest.raises(ValueError, match="num_layers .* must be from 0 to 1024"):
        DiffusionPipeline.from_pretrained(folder)


def test_absurd_encoders(tmp_path):
    tiny_encoder().save_pretrained(tmp_path)
    change(tmp_path / "config.json", num_hidden_layers=10**9)
    with pytest.raises(ValueError, match="num_hidden_layers .* must be from 0 to 1024"):
        VisionEncoder.from_pretrained(tmp_path)


def test_what_is_published_is_in_bounds():
    check_numbers(tiny_fae().config, "a config")
    check_numbers({"num_layers": [2, 2, 18], "vocab_size": 256_000, "sample_size": [1, 128]}, "a config")
