"""The CLIP score of embeddings, for `evaluate.load`."""

import evaluate

from hf_fae.evaluation.metric_interface import metric_info, to_features
from hf_fae.evaluation.metrics.distances import clip_score


_DESCRIPTION = """\
The CLIP score: 100 times the cosine of the embeddings of images and of their texts, where it is positive.
"""

_CITATION = """\
@article{hessel2021clipscore,
  title = {{CLIPScore}: A Reference-free Evaluation Metric for Image Captioning},
  author = {Hessel, Jack and Holtzman, Ari and Forbes, Maxwell and Le Bras, Ronan and Choi, Yejin},
  journal = {arXiv preprint arXiv:2104.08718},
  year = {2021}
}
"""

_INPUTS = """
Args:
    predictions: projected embeddings of the images, a list of D numbers each.
    references: those of their texts.
Returns:
    clip_score: from 0 to 100, higher is better.
"""


class ClipScore(evaluate.Metric):
    def _info(self):
        return metric_info(_DESCRIPTION, _CITATION, _INPUTS, "https://arxiv.org/abs/2104.08718")

    def _compute(self, predictions, references):
        return {"clip_score": clip_score(*to_features(predictions, references))}
