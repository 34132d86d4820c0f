"""The Fréchet distance of features, for `evaluate.load`."""

import evaluate

from hf_fae.evaluation.metric_interface import metric_info, to_features
from hf_fae.evaluation.metrics.distances import GaussianStatistics, frechet_distance


_DESCRIPTION = """\
The Fréchet distance of two sets of features: that of Gaussians with their means and covariances, in fp64. With the
features of Inception's last pooling layer it is the FID.
"""

_CITATION = """\
@article{heusel2017gans,
  title = {{GANs} Trained by a Two Time-Scale Update Rule Converge to a Local {Nash} Equilibrium},
  author = {Heusel, Martin and Ramsauer, Hubert and Unterthiner, Thomas and Nessler, Bernhard and Hochreiter, Sepp},
  journal = {arXiv preprint arXiv:1706.08500},
  year = {2017}
}
"""

_INPUTS = """
Args:
    predictions: features of the samples, a list of D numbers each.
    references: features of the reference, a list of D numbers each.
Returns:
    frechet_distance: from 0 on, lower is better.
"""


class FrechetDistance(evaluate.Metric):
    def _info(self):
        return metric_info(_DESCRIPTION, _CITATION, _INPUTS, "https://arxiv.org/abs/1706.08500")

    def _compute(self, predictions, references):
        samples, reference = (
            GaussianStatistics.of([rows], name)
            for name, rows in zip(("predictions", "references"), to_features(predictions, references))
        )
        return {"frechet_distance": frechet_distance(samples, reference)}
