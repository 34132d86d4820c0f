"""The inception score of logits, for `evaluate.load`."""

import datasets
import evaluate
import torch

from hf_fae.evaluation.distances import inception_score


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
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.List(datasets.Value("float64"))}),
            reference_urls=["https://arxiv.org/abs/1606.03498"],
        )

    def _compute(self, predictions, splits=10):
        mean, std = inception_score(torch.tensor(predictions, dtype=torch.float64), splits)
        return {"inception_score": mean, "inception_score_std": std}
