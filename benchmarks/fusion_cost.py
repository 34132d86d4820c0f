"""Operations of DRoRAE's fusion, relative to its encoder and decoder, counted on torch's meta device.

    python benchmarks/fusion_cost.py

Operations of matrix products, convolutions and attention for one image of 256 px.
"""

import torch

from hf_fae import AutoencoderDRoRAE, VisionEncoder
from hf_fae.presets import PRESETS
from hf_fae.training.flops import FlopMeter


WIDTHS = (128, 512, 1024, 1536, 3072, 6144)


def count(expert_hidden_size: int) -> dict[str, int]:
    """Operations of each part of the preset `drorae-dinov2-b`, with experts of this width."""
    _, config = PRESETS["drorae-dinov2-b"]
    with torch.device("meta"):
        model = AutoencoderDRoRAE(**{**config, "expert_hidden_size": expert_hidden_size})
        model.attach_encoder(VisionEncoder.from_config(config["image_encoder_config"]))
        images = torch.empty(1, 3, 256, 256)
    flops = {}
    with torch.no_grad():
        with FlopMeter() as meter:
            features, _ = model.extract_features(images)
        flops["encoder"] = meter.flops
        with FlopMeter() as meter:
            tokens = model.fuse(features)
        flops["fusion"] = meter.flops
        with FlopMeter() as meter:
            model.decode_tokens(tokens)
        flops["decoder"] = meter.flops
    return flops


def main() -> None:
    print("| width of the experts | encoder | fusion | decoder | fusion / encoder | fusion / encoder and decoder |")
    print("|---|---|---|---|---|---|")
    for width in WIDTHS:
        flops = count(width)
        encoder, fusion, decoder = (flops[name] for name in ("encoder", "fusion", "decoder"))
        parts = " | ".join(f"{value / 1e9:.1f} G" for value in (encoder, fusion, decoder))
        print(f"| {width} | {parts} | {fusion / encoder:.1%} | {fusion / (encoder + decoder):.1%} |")


if __name__ == "__main__":
    main()
