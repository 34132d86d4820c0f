"""The structural similarity of images, for `evaluate.load`."""

import evaluate

from hf_fae.evaluation.metric_interface import metric_info, to_images
from hf_fae.utils.image_metrics import ssim


_DESCRIPTION = """\
The structural similarity of images: the mean over the images.
"""

_CITATION = """\
@article{wang2004image,
  title = {Image Quality Assessment: From Error Visibility to Structural Similarity},
  author = {Wang, Zhou and Bovik, Alan C. and Sheikh, Hamid R. and Simoncelli, Eero P.},
  journal = {IEEE Transactions on Image Processing},
  year = {2004}
}
"""

_INPUTS = """
Args:
    predictions: reconstructed images, each (H, W, 3) of 8 bits; all of one size.
    references: the originals.
Returns:
    ssim: up to 1, higher is better.
"""


class SSIM(evaluate.Metric):
    def _info(self):
        return metric_info(_DESCRIPTION, _CITATION, _INPUTS, "https://doi.org/10.1109/TIP.2003.819861", "images")

    def _compute(self, predictions, references):
        return {"ssim": ssim(*to_images(predictions, references)).item()}
