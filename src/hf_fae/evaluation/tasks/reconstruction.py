"""Reconstruction quality of a tokenizer: rFID, PSNR, SSIM, LPIPS, feature cosine, and seams between patches."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...images import from_uint8, to_uint8
from ...latents import check_finite, compression_ratio, decode_latents, encode_images
from ...loading import loading, open_tokenizer
from ...utils.digests import hash_file
from ...utils.image_metrics import border_gradients, psnr, ssim, token_cosine
from ..inputs.extractors import INCEPTION, extract_features, load_extractors, metric_name
from ..inputs.numbered_images import ImageArguments, NumberedImages
from ..metrics.distances import GaussianStatistics, frechet_distance
from ..options import TokenizerArguments
from ..provenance import describe_run
from ..reports.report import Evaluation
from ..resumable import Parts, check_settings, process_state


__all__ = ["ReconstructionArguments", "evaluate_reconstruction"]

DEFAULT_METRICS = ("rfid", "psnr", "ssim", "lpips", "feature_cosine", "seam_ratio")
METRICS = (*DEFAULT_METRICS, "ifid")
MAX_PSNR = 100.0  # of an identical image


@dataclass
class ReconstructionArguments(TokenizerArguments):
    """The tokenizer, and the metrics of its reconstructions."""

    extractors: list[str] = field(
        default_factory=lambda: [INCEPTION],
        metadata={
            "help": "Feature extractors of rFID and iFID: inception, inception=FILE, or [NAME=]PATH of a timm or "
            "transformers model."
        },
    )
    metrics: list[str] = field(
        default_factory=lambda: list(DEFAULT_METRICS), metadata={"help": f"What to measure: {', '.join(METRICS)}."}
    )
    vgg16: str | None = field(
        default=None, metadata={"help": "File of VGG16 for LPIPS (default: torchvision's, downloaded)."}
    )
    resolution: int | None = field(
        default=None, metadata={"help": "Side of the images (default: the tokenizer's own)."}
    )

    def __post_init__(self):
        super().__post_init__()
        if unknown := sorted(set(self.metrics) - set(METRICS)):
            raise ValueError(f"metrics must be among {', '.join(METRICS)}, got {unknown[0]!r}")


def evaluate_reconstruction(args: ReconstructionArguments, image_args: ImageArguments) -> Evaluation | None:
    """Compare the images of a data set, cropped as in ADM, with their reconstructions by a tokenizer.

    All metrics are of 8-bit images, decoded from the mode of their latents; PSNR (at most 100 dB), SSIM and LPIPS are
    means over the images. `seam_ratio` is the gradient of the error across the borders of patches over that elsewhere,
    1 without seams; patches have the tokenizer's compression ratio as their side. The reference of rFID is the same
    images, never ADM's reference batch (which would turn an rFID of 0.57 into 1.9).

    `ifid` is the Fréchet distance of the same images to those that are decoded halfway between the latents of an image
    and of another one, at random. A tokenizer whose space has gaps between images, which a generator cannot avoid,
    shows it here without a generator; rFID does not.

    Returns:
        The result on the main process, whose report is written to `output_dir`; None on the others.

    Raises:
        ValueError: an invalid argument, before anything is written.
    """
    state = process_state()
    vae = open_tokenizer(args.model, args.encoder, getattr(torch, args.dtype)).eval().to(state.device)
    resolution, unit = args.resolution or vae.config.sample_size, compression_ratio(vae)
    if resolution < unit or resolution % unit:
        raise ValueError(f"resolution must be a positive multiple of {unit}, got {resolution}")
    if "seam_ratio" in args.metrics and resolution == unit:
        raise ValueError(f"resolution must be above {unit} for seam_ratio, as there is one patch, got {resolution}")
    uses_extractors = {"rfid", "ifid"} & set(args.metrics)
    extractors = load_extractors(args.extractors, state.device) if uses_extractors else []
    data = NumberedImages(image_args.open(resolution, args.seed))
    if len(data) < 2:
        raise ValueError(f"dataset_name {image_args.dataset_name!r} must have at least 2 images, got {len(data)}")
    if not hasattr(vae, "decode_features") and args.metrics == ["feature_cosine"]:
        raise ValueError(
            f"metrics must have one for a {type(vae).__name__}, which has no features, got feature_cosine"
        )
    compare = _Comparison(args, vae, extractors)
    settings = {
        **describe_run(args, resolution, state.device),
        "pictures": data.describe(),
        "extractors": {extractor.name: extractor.settings for extractor in extractors},
        "vgg16": hash_file(args.vgg16) if args.vgg16 and "lpips" in args.metrics else None,
        "metrics": sorted(args.metrics),
    }
    check_settings(args.output_dir, {"task": "reconstruction", **settings})

    parts = Parts(Path(args.output_dir) / "parts" / "images", len(data), args.batch_size)
    partners = choose_partners(len(data), args.seed)

    def make_part(numbers):
        batch = data.read(numbers)
        if "ifid" in args.metrics:
            others = data.read([partners[number] for number in numbers])
            batch |= {"others": others["images"], "both_good": batch["is_good"] & others["is_good"]}
        return compare(**batch)

    parts.compute(make_part, "reconstructing")
    if not state.is_main_process:
        return None
    good = parts.stack("is_good")
    metrics = {name: parts.stack(name)[good].double().mean().item() for name in parts.names() if name in METRICS}
    if "seam_ratio" in args.metrics:
        across, elsewhere = parts.stack("border_gradients")[good].double().mean(0).tolist()
        metrics["seam_ratio"] = across / elsewhere if elsewhere else 1.0
    for extractor in extractors:
        kinds = {"rfid": "reconstruction", "ifid": "interpolation"}
        original = GaussianStatistics.of(parts.iterate(f"original.{extractor.name}.features"), "images")
        for metric in (name for name in kinds if name in args.metrics):
            decoded = parts.iterate(f"{kinds[metric]}.{extractor.name}.features")
            distance = frechet_distance(GaussianStatistics.of(decoded, "images"), original)
            metrics[metric_name(metric, extractor)] = distance
    details = {"damaged": int((~good).sum())}
    result = Evaluation(
        "reconstruction", metrics, settings, dataset=image_args.dataset_name, split=image_args.split, details=details
    )
    result.save(args.output_dir)
    return result


class _Comparison:
    """The metrics and features of one part of the images."""

    def __init__(self, args, vae, extractors):
        self.args, self.vae, self.extractors = args, vae, extractors
        self.pairwise = {name: metric for name, metric in (("psnr", psnr), ("ssim", ssim)) if name in args.metrics}
        if "lpips" in args.metrics:
            from ...losses.perceptual import LPIPS

            with loading("vgg16", str(args.vgg16)):
                self.pairwise["lpips"] = LPIPS.from_pretrained(args.vgg16).to(vae.device).distances

    @torch.no_grad()
    def __call__(self, images, is_good, others=None, both_good=None, **_):
        if others is None:
            others = images
        batches = [
            self._compare(*pair) for pair in zip(*(part.split(self.args.batch_size) for part in (images, others)))
        ]
        part = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        shown = {"reconstruction": (part.pop("reconstruction"), is_good), "original": (images, is_good)}
        if "ifid" in self.args.metrics:
            shown["interpolation"] = part.pop("interpolation"), both_good
        for kind, (decoded, kept) in shown.items():
            judged = extract_features(self.extractors, decoded, kept)
            part |= {f"{kind}.{name}": values for name, values in judged.items()}
        return {**part, "is_good": is_good}

    def _compare(self, images, others):
        original = from_uint8(images.to(self.vae.device))
        pixel_values = original.to(self.vae.dtype)
        found = {}
        if "feature_cosine" in self.args.metrics and hasattr(self.vae, "decode_features"):
            features, grid = self.vae.extract_features(pixel_values)
            latents = self.vae.encode_features(features, grid).latent_dist.mode()
            decoded = self.vae.decode_features(latents)
            found["feature_cosine"] = token_cosine(decoded, self.vae.last_features(features)).mean(1).cpu()
        else:
            latents = encode_images(self.vae, pixel_values).mode()
        found["reconstruction"] = self._decode(latents)
        if "ifid" in self.args.metrics:
            ends = encode_images(self.vae, from_uint8(others.to(self.vae.device)).to(self.vae.dtype)).mode()
            found["interpolation"] = self._decode(torch.lerp(latents, ends, 0.5))
        reconstruction = from_uint8(found["reconstruction"].to(self.vae.device))
        if "seam_ratio" in self.args.metrics:
            patch_size = compression_ratio(self.vae)
            found["border_gradients"] = border_gradients(reconstruction, original, patch_size).cpu()
        for name, metric in self.pairwise.items():
            pairs = zip(reconstruction.split(1), original.split(1), strict=True)
            values = torch.stack([metric(*pair).squeeze() for pair in pairs]).cpu()
            found[name] = values.clamp_max(MAX_PSNR) if name == "psnr" else values
        return found

    def _decode(self, latents):
        sample = decode_latents(self.vae, latents)
        check_finite(f"images that {self.args.model!r} reconstructs", sample)
        return to_uint8(sample).cpu()


def choose_partners(count: int, seed: int) -> list[int]:
    """Another image for each of `count` images: the next one in a random circle, so that each is chosen once."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    partners = torch.empty_like(order)
    partners[order] = order.roll(-1)
    return partners.tolist()
