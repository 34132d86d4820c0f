"""The peak signal-to-noise ratio of images, for `evaluate.load`."""

import evaluate

from hf_fae.evaluation.metric_interface import metric_info, to_images
from hf_fae.utils.image_metrics import psnr


_DESCRIPTION = """\
The peak signal-to-noise ratio of images in dB: the mean over the images.
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
    predictions: reconstructed images, each (H, W, 3) of 8 bits; all of one size.
    references: the originals.
Returns:
    psnr: higher is better.
"""


class PSNR(evaluate.Metric):
    def _info(self):
        return metric_info(
            _DESCRIPTION, _CITATION, _INPUTS, "https://en.wikipedia.org/wiki/Peak_signal-to-noise_ratio", "images"
        )

    def _compute(self, predictions, references):
        return {"psnr": psnr(*to_images(predictions, references)).item()}
