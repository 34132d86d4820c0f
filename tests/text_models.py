"""Tiny models that know texts, with random weights, saved as transformers saves them."""

import shutil
import tempfile
from pathlib import Path

import torch
from factories import TINY_VISION_CONFIGS, tiny_encoder, tiny_text_encoder
from transformers import AutoConfig, AutoModel


TEXT = {
    "vocab_size": 29,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}


def save_image_text_model(folder: Path, kind: str = "siglip", **text):
    """CLIP, SigLIP or SigLIP 2 for 32 px pictures and texts of up to 16 letters; returns the model."""
    vision = {key: value for key, value in TINY_VISION_CONFIGS[kind].items() if key != "model_type"}
    if kind == "clip":
        text = {"bos_token_id": 0, "eos_token_id": 28, **text}  # pooled at the first space, else at the first token
    config = AutoConfig.for_model(kind, text_config={**TEXT, **text}, vision_config=vision, projection_dim=24)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModel.from_config(config).eval()
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    with tempfile.TemporaryDirectory() as tower:
        tiny_encoder(kind).save_pretrained(tower)
        shutil.copy(Path(tower, "preprocessor_config.json"), folder)
    tiny_text_encoder()[1].save_pretrained(folder)
    return model


def save_sentence_encoder(folder: Path) -> None:
    model, tokenizer = tiny_text_encoder()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
