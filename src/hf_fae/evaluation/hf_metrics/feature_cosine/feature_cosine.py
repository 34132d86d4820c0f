"""The cosine of reconstructed features, for `evaluate.load`."""

import evaluate

from hf_fae.evaluation.metric_interface import metric_info, to_features
from hf_fae.utils.image_metrics import feature_cosine


_DESCRIPTION = """\
Cosine of reconstructed features with those of the frozen encoder, over the channels: the mean over tokens and samples.
"""

_CITATION = """\
@article{gao2025fae,
  title   = {One Layer Is Enough: Adapting Pretrained Visual Encoders for Image Generation},
  author  = {Yuan Gao and Chen Chen and Tianrong Chen and Jiatao Gu},
  journal = {arXiv preprint arXiv:2512.07829},
  year    = {2025}
}
"""

_INPUTS = """
Args:
    predictions: reconstructed features, a list of tokens each, a token being a list of D numbers.
    references: the encoder's features, of the same shapes.
Returns:
    feature_cosine: from -1 to 1, higher is better.
"""


class FeatureCosine(evaluate.Metric):
    def _info(self):
        return metric_info(_DESCRIPTION, _CITATION, _INPUTS, "https://arxiv.org/abs/2512.07829", "tokens")

    def _compute(self, predictions, references):
        return {"feature_cosine": feature_cosine(*to_features(predictions, references)).item()}
