"""How well does a tokenizer give pictures back? rFID, PSNR, SSIM, LPIPS, and the cosine of features."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...images import from_uint8, to_uint8
from ...latents import check_finite, compression_ratio, decode_latents, encode_images
from ...loading import loading, open_tokenizer
from ...utils.image_metrics import psnr, ssim, token_cosine
from ..inputs.extractors import INCEPTION, judge, load_extractors, metric_name
from ..inputs.numbered_images import NumberedPictures, PictureArguments
from ..metrics.distances import GaussianStatistics, frechet_distance
from ..options import DTYPES, TokenizerArguments
from ..parts import Parts, check_settings, process_state
from ..reports.report import Evaluation, describe_run, hash_file


__all__ = ["ReconstructionArguments", "evaluate_reconstruction"]

METRICS = ("rfid", "psnr", "ssim", "lpips", "feature_cosine")
MAX_PSNR = 100.0  # of a picture that is the same to the bit


@dataclass
class ReconstructionArguments(TokenizerArguments):
    """Which tokenizer to judge by what it gives back, and who judges."""

    extractors: list[str] = field(
        default_factory=lambda: [INCEPTION],
        metadata={
            "help": "Judges of rFID: inception, inception=FILE, or [NAME=]PATH of a timm or transformers model."
        },
    )
    metrics: list[str] = field(
        default_factory=lambda: list(METRICS), metadata={"help": f"What to measure: {', '.join(METRICS)}."}
    )
    vgg16: str | None = field(
        default=None, metadata={"help": "File of VGG16 for LPIPS; none: torchvision's, which is downloaded."}
    )
    resolution: int | None = field(default=None, metadata={"help": "Side of the pictures; none: the tokenizer's own."})

    def __post_init__(self):
        super().__post_init__()
        if unknown := sorted(set(self.metrics) - set(METRICS)):
            raise ValueError(f"metrics must be among {', '.join(METRICS)}, got {unknown[0]!r}")


def evaluate_reconstruction(args: ReconstructionArguments, pictures: PictureArguments) -> Evaluation | None:
    """Compare the pictures of a data set, cropped as ADM does it, with what a tokenizer makes of them.

    All metrics are of 8-bit pictures, decoded from the mode of their latents; PSNR (at most 100 dB), SSIM and LPIPS
    are means over the pictures. The reference of rFID are the same pictures: ADM's reference batch has no place here
    (it would make 1.9 of an rFID of 0.57).

    Returns:
        On the main process the result, whose report lies in `output_dir`; None on others.

    Raises:
        ValueError: an argument that does not fit, before anything is written.
    """
    state = process_state()
    vae = open_tokenizer(args.model, args.encoder, DTYPES[args.dtype]).eval().to(state.device)
    resolution, unit = args.resolution or vae.config.sample_size, compression_ratio(vae)
    if resolution < unit or resolution % unit:
        raise ValueError(f"resolution must be a positive multiple of {unit}, got {resolution}")
    extractors = load_extractors(args.extractors, state.device) if "rfid" in args.metrics else []
    data = NumberedPictures(pictures.open(resolution, args.seed))
    if len(data) < 2:
        raise ValueError(f"dataset_name {pictures.dataset_name!r} must have at least 2 pictures, got {len(data)}")
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

    parts = Parts(Path(args.output_dir) / "parts" / "pictures", len(data), args.batch_size)
    parts.compute(lambda numbers: compare(**data.read(numbers)), "reconstructing")
    if not state.is_main_process:
        return None
    good = parts.stack("is_good")
    metrics = {name: parts.stack(name)[good].double().mean().item() for name in parts.names() if name in METRICS}
    for extractor in extractors:
        both = (f"{kind}.{extractor.name}.features" for kind in ("reconstruction", "original"))
        statistics = [GaussianStatistics.of(parts.iterate(name), "pictures") for name in both]
        metrics[metric_name("rfid", extractor)] = frechet_distance(*statistics)
    details = {"damaged": int((~good).sum())}
    result = Evaluation("reconstruction", metrics, settings, pictures.dataset_name, pictures.split, details)
    result.save(args.output_dir)
    return result


class _Comparison:
    """What is measured on a part of the pictures."""

    def __init__(self, args, vae, extractors):
        self.args, self.vae, self.extractors = args, vae, extractors
        self.pairwise = {name: metric for name, metric in (("psnr", psnr), ("ssim", ssim)) if name in args.metrics}
        if "lpips" in args.metrics:
            from ...losses.perceptual import LPIPS

            with loading("vgg16", str(args.vgg16)):
                self.pairwise["lpips"] = LPIPS.from_pretrained(args.vgg16).to(vae.device).distances

    @torch.no_grad()
    def __call__(self, images, is_good, **_):
        batches = [self._compare(batch) for batch in images.split(self.args.batch_size)]
        part = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        for kind, shown in (("reconstruction", part.pop("reconstruction")), ("original", images)):
            judged = judge(self.extractors, shown, is_good)
            part |= {f"{kind}.{name}": values for name, values in judged.items()}
        return {**part, "is_good": is_good}

    def _compare(self, images):
        original = from_uint8(images.to(self.vae.device))
        pixel_values = original.to(self.vae.dtype)
        found = {}
        if "feature_cosine" in self.args.metrics and hasattr(self.vae, "decode_features"):
            features, grid = self.vae.extract_features(pixel_values)
            latents = self.vae.encode_features(features, grid).latent_dist.mode()
            given_back = self.vae.decode_features(latents)
            found["feature_cosine"] = token_cosine(given_back, self.vae.last_features(features)).mean(1).cpu()
        else:
            latents = encode_images(self.vae, pixel_values).mode()
        sample = decode_latents(self.vae, latents)
        check_finite(f"pictures that {self.args.model!r} gives back", sample)
        found["reconstruction"] = to_uint8(sample).cpu()
        given_back = from_uint8(found["reconstruction"].to(self.vae.device))
        for name, metric in self.pairwise.items():
            pairs = zip(given_back.split(1), original.split(1), strict=True)
            values = torch.stack([metric(*pair).squeeze() for pair in pairs]).cpu()
            found[name] = values.clamp_max(MAX_PSNR) if name == "psnr" else values
        return found
