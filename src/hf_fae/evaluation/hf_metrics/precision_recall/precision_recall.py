"""Precision and recall of features, for `evaluate.load`."""

import evaluate

from hf_fae.evaluation.metric_interface import metric_info, to_features
from hf_fae.evaluation.metrics.distances import precision_recall


_DESCRIPTION = """\
Improved precision and recall: the share of samples among the nearest neighbours of the reference, and the share of the
reference among those of the samples.
"""

_CITATION = """\
@article{kynkaanniemi2019improved,
  title = {Improved Precision and Recall Metric for Assessing Generative Models},
  author = {Kynk{\\"a}{\\"a}nniemi, Tuomas and Karras, Tero and Laine, Samuli and Lehtinen, Jaakko and Aila, Timo},
  journal = {arXiv preprint arXiv:1904.06991},
  year = {2019}
}
"""

_INPUTS = """
Args:
    predictions: features of the samples, a list of D numbers each.
    references: features of the reference, a list of D numbers each.
    neighbours: the nearest neighbour that defines the radius around each point.
Returns:
    precision, recall: from 0 to 1, higher is better.
"""


class PrecisionRecall(evaluate.Metric):
    def _info(self):
        return metric_info(_DESCRIPTION, _CITATION, _INPUTS, "https://arxiv.org/abs/1904.06991")

    def _compute(self, predictions, references, neighbours=3):
        precision, recall = precision_recall(*to_features(predictions, references), neighbours)
        return {"precision": precision, "recall": recall}
