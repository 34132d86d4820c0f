"""The kernel distance of features, for `evaluate.load`."""

import evaluate

from hf_fae.evaluation.metric_modules import metric_info, to_features
from hf_fae.evaluation.metrics.distances import kernel_distance


_DESCRIPTION = """\
The kernel distance of two sets of features: the squared maximum mean discrepancy of a cubic kernel, over random
subsets. It is the KID where the features are those of Inception's last pooling layer.
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
    references: features of as many reference samples.
    subsets: how many subsets are drawn.
    subset_size: samples of a subset.
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
