"""The inception score of logits, for `evaluate.load`."""

import evaluate

from hf_fae.evaluation.metric_interface import metric_info, to_features
from hf_fae.evaluation.metrics.distances import inception_score


_DESCRIPTION = """\
The inception score: how surely samples belong to one class each, and how evenly they spread over the classes.
"""

_CITATION = """\
@article{salimans2016improved,
  title = {Improved Techniques for Training {GANs}},
  author = {Salimans, Tim and Goodfellow, Ian and Zaremba, Wojciech and Cheung, Vicki and Radford, Alec and Chen, Xi},
  journal = {arXiv preprint arXiv:1606.03498},
  year = {2016}
}
"""

_INPUTS = """
Args:
    predictions: logits of the samples, a list of K numbers each, in mixed order.
    splits: runs of samples whose scores are averaged.
Returns:
    inception_score: mean over the runs, from 1 to K, higher is better.
    inception_score_std: their standard deviation.
"""


class InceptionScore(evaluate.Metric):
    def _info(self):
        return metric_info(_DESCRIPTION, _CITATION, _INPUTS, "https://arxiv.org/abs/1606.03498", has_references=False)

    def _compute(self, predictions, splits=10):
        mean, std = inception_score(*to_features(predictions), splits)
        return {"inception_score": mean, "inception_score_std": std}
