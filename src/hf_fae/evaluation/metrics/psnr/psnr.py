"""The peak signal-to-noise ratio of pictures, for `evaluate.load`."""

import datasets
import evaluate
import torch

from hf_fae.evaluation.reconstruction import psnr


_DESCRIPTION = """\
The peak signal-to-noise ratio of pictures in dB: the mean over the pictures.
"""

_CITATION = """\
@inproceedings{hore2010image,
  title = {Image Quality Metrics: {PSNR} vs. {SSIM}},
  author = {Hor{\\'e}, Alain and Ziou, Djemel},
  booktitle = {International Conference on Pattern Recognition},
  year = {2010}
}
"""

_INPUTS = """
Args:
    predictions: reconstructed pictures, each (H, W, 3) of 8 bits; all of one size.
    references: the originals.
Returns:
    psnr: higher is better.
"""


class PSNR(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.List(datasets.List(datasets.List(datasets.Value("uint8")))),
                    "references": datasets.List(datasets.List(datasets.List(datasets.Value("uint8")))),
                }
            ),
            reference_urls=["https://en.wikipedia.org/wiki/Peak_signal-to-noise_ratio"],
        )

    def _compute(self, predictions, references):
        reconstruction, images = (
            torch.tensor(pictures).permute(0, 3, 1, 2) / 127.5 - 1 for pictures in (predictions, references)
        )
        return {"psnr": psnr(reconstruction, images).item()}
