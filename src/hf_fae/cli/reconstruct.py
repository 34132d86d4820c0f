"""`hf-fae reconstruct`: images next to their reconstructions, with PSNR and feature cosine."""

import argparse
from pathlib import Path

from ..evaluation.options import DTYPES
from .argument_types import device, image_file
from .image_records import write_image


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        metavar="PATH_OR_ID",
        help="folder or Hub id of a tokenizer, or of a pipeline with one",
    )
    parser.add_argument(
        "--output", required=True, type=image_file, metavar="FILE", help="PNG, WebP or JPEG by its ending"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="precision (default: float32)")
    parser.add_argument("--device", type=device, default="auto", help="where to compute (default: an accelerator)")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files of any mode and size")
    parser.add_argument(
        "--encoder", metavar="PATH_OR_ID", help="the frozen encoder, for a tokenizer that was saved without it"
    )


def run(args: argparse.Namespace) -> None:
    import torch
    from diffusers.image_processor import VaeImageProcessor
    from tqdm import tqdm

    from ..data.decoding import center_crop
    from ..images import make_grid, to_pil
    from ..latents import LatentAutoencoderMixin, check_finite
    from ..layers.positions import grid_size
    from ..loading import open_tokenizer
    from ..utils.image_metrics import psnr

    images = [_read_image(path) for path in args.images]
    vae = open_tokenizer(args.model, args.encoder, getattr(torch, args.dtype)).to(args.device)
    if not isinstance(vae, LatentAutoencoderMixin):
        raise ValueError(f"--model {args.model!r} must be a tokenizer of hf_fae, got a {type(vae).__name__}")
    size = min(grid_size(vae.config.sample_size))
    processor = VaeImageProcessor(do_resize=False)
    sheet, captions, scores = [], [], []
    for path, image in zip(tqdm(args.images, unit="image"), images, strict=True):
        pixel_values = processor.preprocess(center_crop(image, size)).to(args.device, vae.dtype)
        with torch.no_grad():
            sample, cosines = _reconstruct(vae, pixel_values)
        check_finite(f"reconstruction of {str(path)!r}", sample)
        scores.append((psnr(sample, pixel_values), *cosines))
        sheet += to_pil(pixel_values) + to_pil(sample)
        captions += [path.stem, f"{scores[-1][0]:.2f} dB"]
    write_image(make_grid(sheet, columns=2 * min(len(images), 4), labels=captions), args.output)

    rows = [(str(path), *score) for path, score in zip(args.images, scores, strict=True)]
    if len(rows) > 1:
        rows.append(("mean", *torch.tensor(scores).mean(dim=0)))
    width = max(len(name) for name, *_ in rows)
    for name, decibel, *cosines in rows:
        print(f"{name:{width}}  PSNR {decibel:6.2f} dB", *(f" feature cosine {cosine:.4f}" for cosine in cosines))
    print(f"wrote {args.output}")


def _reconstruct(vae, pixel_values):
    """The reconstruction, and the feature cosine where the tokenizer decodes features: a list of one, else empty."""
    from ..utils.image_metrics import feature_cosine

    if not hasattr(vae, "decode_features"):
        return vae.decode(vae.encode(pixel_values).latent_dist.mode()).sample, []
    features, grid = vae.extract_features(pixel_values)
    latents = vae.encode_features(features, grid).latent_dist.mode()
    cosine = feature_cosine(vae.decode_features(latents), vae.last_features(features))
    return vae.decode(latents).sample, [cosine]


def _read_image(path):
    from ..data.decoding import decode_image

    try:
        return decode_image(path)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"IMAGE {str(path)!r} cannot be read: {getattr(error, 'strerror', None) or error}") from error
