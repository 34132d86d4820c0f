"""Time and memory of the Fréchet distance of 50,000 samples, compared with other libraries.

    OMP_NUM_THREADS=2 python benchmarks/frechet_distance.py

Features arrive in batches, as from a network, and are not kept; peak resident memory includes imports. The other
libraries get the finished statistics. On busy cores, one thread is faster than two that wait for each other.
"""

import argparse
import resource
import time

import torch

from hf_fae.evaluation.metrics.distances import GaussianStatistics, frechet_distance


def features(count: int, width: int, batch_size: int, seed: int):
    """Batches of features with correlated dimensions of different variances, as Inception's.

    Twice as many rows as dimensions repeat: generating all rows would take longer than summing them.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2 * width, 32, generator=generator) @ torch.randn(32, width, generator=generator)
    rows = (rows + torch.randn(2 * width, width, generator=generator)).relu_()
    for start in range(0, count, batch_size):
        yield rows[torch.arange(start, min(start + batch_size, count)) % len(rows)]


def torchmetrics_distance(samples, reference):
    from torchmetrics.image.fid import _compute_fid

    return _compute_fid(samples.mean, samples.covariance, reference.mean, reference.covariance).item()


def torch_fidelity_distance(samples, reference):
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    arrays = [{"mu": each.mean.numpy(), "sigma": each.covariance.numpy()} for each in (samples, reference)]
    return fid_statistics_to_metric(*arrays, verbose=False)[KEY_METRIC_FID]


def call(function, *arguments):
    """The result of a call, and its seconds."""
    start = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--skip_others", action="store_true", help="leave out the other libraries: they take minutes")
    arguments = parser.parse_args()

    def statistics(seed):
        return GaussianStatistics.of(features(arguments.samples, arguments.width, arguments.batch_size, seed))

    reference = statistics(2)
    samples, gathering = call(statistics, 1)
    found, arithmetic = call(frechet_distance, samples, reference)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
    print(f"{torch.get_num_threads()} threads; seconds\n")
    print("| samples | width | statistics | distance | together | peak memory |")
    print("|---|---|---|---|---|---|")
    print(
        f"| {arguments.samples:,} | {arguments.width:,} | {gathering:.1f} | {arithmetic:.1f} "
        f"| {gathering + arithmetic:.1f} | {peak:.2f} GiB |"
    )
    if arguments.skip_others:
        return
    print("\n| distance of the same statistics | value | seconds | ratio |")
    print("|---|---|---|---|")
    print(f"| hf_fae | {found:.9g} | {arithmetic:.1f} | 1 |")
    for name, function in (("torchmetrics", torchmetrics_distance), ("torch-fidelity", torch_fidelity_distance)):
        value, seconds = call(function, samples, reference)
        print(f"| {name} | {value:.9g} | {seconds:.1f} | {seconds / arithmetic:.1f} |")


if __name__ == "__main__":
    main()
