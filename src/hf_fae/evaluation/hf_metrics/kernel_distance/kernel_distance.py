"""The kernel distance of features, for `evaluate.load`."""

import evaluate

from hf_fae.evaluation.metric_interface import metric_info, to_features
from hf_fae.evaluation.metrics.distances import kernel_distance


_DESCRIPTION = """\
The kernel distance of two sets of features: the squared maximum mean discrepancy of a cubic kernel, over random
subsets. With features of Inception's last pooling layer it is the KID.
"""

_CITATION = """\
@article{binkowski2018demystifying,
  title = {Demystifying {MMD} {GANs}},
  author = {Bi{\\'n}kowski, Miko{\\l}aj and Sutherland, Danica J. and Arbel, Michael and Gretton, Arthur},
  journal = {arXiv preprint arXiv:1801.01401},
  year = {2018}
}
"""

_INPUTS = """
Args:
    predictions: features of the samples, a list of D numbers each.
    references: features of the reference, a list of D numbers each.
    subsets: number of random subsets.
    subset_size: samples per subset.
Returns:
    kernel_distance: mean over the subsets, lower is better.
    kernel_distance_std: their standard deviation.
"""


class KernelDistance(evaluate.Metric):
    def _info(self):
        return metric_info(_DESCRIPTION, _CITATION, _INPUTS, "https://arxiv.org/abs/1801.01401")

    def _compute(self, predictions, references, subsets=100, subset_size=1000):
        mean, std = kernel_distance(*to_features(predictions, references), subsets, subset_size)
        return {"kernel_distance": mean, "kernel_distance_std": std}
