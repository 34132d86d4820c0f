"""The structural similarity of pictures, for `evaluate.load`."""

import datasets
import evaluate
import torch

from hf_fae.evaluation.reconstruction import ssim


_DESCRIPTION = """\
The structural similarity of pictures: the mean over the pictures.
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
    predictions: reconstructed pictures, each (H, W, 3) of 8 bits; all of one size.
    references: the originals.
Returns:
    ssim: up to 1, higher is better.
"""


class SSIM(evaluate.Metric):
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
            reference_urls=["https://doi.org/10.1109/TIP.2003.819861"],
        )

    def _compute(self, predictions, references):
        reconstruction, images = (
            torch.tensor(pictures).permute(0, 3, 1, 2) / 127.5 - 1 for pictures in (predictions, references)
        )
        return {"ssim": ssim(reconstruction, images).item()}
