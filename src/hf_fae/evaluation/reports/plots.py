"""Plots that compare latent spaces: mixture likelihoods, spectra, channel statistics, denoising loss."""

import torch

from ..metrics.latent_space import ReducedSpaces


__all__ = ["plot_channels", "plot_denoising", "plot_likelihoods", "plot_spectra"]

TITLES = {"latents": "latents", "pixels": "pixels, downsampled", "features_pca": "features, PCA"}
COLOURS = {"latents": "#0072B2", "pixels": "#E69F00", "features_pca": "#009E73"}


def plot_likelihoods(curves: dict[str, list[dict]], dimension: int):
    """Negative log-likelihood of mixtures by number of components, on training and held-out images.

    Like all functions here, it returns a matplotlib `Figure`.

    Args:
        curves: space -> result of `mode_count_curve`.
        dimension: of the spaces.
    """
    figure, axes = _figure(1, 2)
    for axis, kind, title in zip(axes, ("nll", "held_out_nll"), ("training images", "held-out images")):
        for name, curve in curves.items():
            counts = [point["components"] for point in curve]
            values = [point[kind] / dimension for point in curve]
            axis.plot(counts, values, "o-", color=COLOURS[name], label=TITLES[name])
        axis.set(xscale="log", xticks=counts, xlabel="components of the mixture", title=title)
        axis.set_xticks([], minor=True)
        axis.set_xticklabels(counts)
        if max(point[kind] for curve in curves.values() for point in curve) > 10 * dimension:  # too many components
            axis.set_yscale("symlog", linthresh=10)
    axes[0].set_ylabel(f"negative log-likelihood\nin nats per dimension ({dimension} dimensions)")
    axes[0].legend()
    return figure


def plot_spectra(spectra: dict[str, dict], reduced: ReducedSpaces):
    """Power by spatial frequency (relative to the mean square), and the variance that principal components explain.

    Args:
        spectra: space -> result of `power_spectrum`.
    """
    figure, axes = _figure(1, 2)
    for name, spectrum in spectra.items():
        power = torch.tensor(spectrum["power"])
        mean_square = (power * torch.tensor(spectrum["cells"])).sum() / sum(spectrum["cells"])
        axes[0].plot(spectrum["frequency"], power / mean_square, "o-", color=COLOURS[name], label=TITLES[name])
        variances = reduced.variances[name]
        left = 1 - variances.cumsum(0) / variances.sum()
        axes[1].plot(range(1, len(left)), left[:-1].clamp_min(1e-6), color=COLOURS[name], label=TITLES[name])
    axes[0].axhline(1, color="grey", linestyle=":", linewidth=1)
    axes[0].set(yscale="log", xlabel="spatial frequency, cycles per cell", ylabel="power / mean power")
    axes[0].set_title("spatial spectrum (dotted: white noise)")
    axes[1].axhline(0.1, color="grey", linestyle=":", linewidth=1)
    axes[1].axvline(reduced.dimension, color="grey", linestyle=":", linewidth=1)
    axes[1].set(xscale="log", yscale="log", ylim=(1e-3, 1), xlabel="principal components of whole images")
    axes[1].set(ylabel="unexplained variance", title=f"for mixtures: {reduced.dimension} components")
    axes[0].legend()
    return figure


def plot_channels(spaces: dict[str, torch.Tensor], moments: dict[str, dict]):
    """The distribution of all channels next to a Gaussian, their standard deviations, and their higher moments.

    Args:
        spaces: space -> (N, C, h, w).
        moments: space -> result of `channel_moments`.
    """
    figure, axes = _figure(1, 3)
    edges = torch.linspace(-6, 6, 121)
    middle, width = (edges[1:] + edges[:-1]) / 2, (edges[1] - edges[0]).item()
    for name, latents in spaces.items():
        found = moments[name]
        mean, std = (torch.tensor(found[kind]).view(-1, 1, 1) for kind in ("mean", "std"))
        values = ((latents - mean) / std.clamp_min(1e-12)).flatten()
        density = torch.histc(values, 120, -6, 6) / (len(values) * width)
        style = {"color": COLOURS[name], "label": TITLES[name]}
        axes[0].plot(middle, density.clamp_min(1e-6), **style)
        spread = sorted(found["std"], reverse=True)
        style["label"] += f" (effective rank {found['effective_rank']:.1f} of {len(spread)})"
        axes[1].plot(range(1, len(spread) + 1), torch.tensor(spread) / spread[0], "o-", markersize=3, **style)
        axes[2].scatter(found["skewness"], found["excess_kurtosis"], s=14, **style)
    axes[0].plot(middle, (-middle.square() / 2).exp() / (2 * torch.pi) ** 0.5, color="grey", linestyle=":")
    axes[0].set(yscale="log", ylim=(1e-5, 10), xlabel="standardised value", ylabel="density")
    axes[0].set_title("all channels (dotted: Gaussian)")
    axes[1].set(xlabel="channel, by standard deviation", ylabel="standard deviation / largest", ylim=(0, 1.05))
    axes[2].axhline(0, color="grey", linestyle=":", linewidth=1)
    axes[2].axvline(0, color="grey", linestyle=":", linewidth=1)
    axes[2].set(xlabel="skewness", ylabel="excess kurtosis", yscale="symlog", title="each channel (0, 0: Gaussian)")
    axes[0].legend()
    axes[1].legend(fontsize=8)
    return figure


def plot_denoising(losses: dict[str, dict]):
    """Held-out loss by noise time, and the training loss.

    Args:
        losses: space -> `DenoisingLoss` as a dict.
    """
    figure, axes = _figure(1, 2)
    for name, result in losses.items():
        count = len(result["by_time"])
        times = [(index + 0.5) / count for index in range(count)]
        label = f"{TITLES[name]}: {result['loss']:.3f}"
        axes[0].plot(times, result["by_time"], "o-", color=COLOURS[name], label=label)
        axes[1].plot(range(1, len(result["training"]) + 1), result["training"], "o-", color=COLOURS[name])
    axes[0].set(xlabel="noise time (0: data, 1: noise)", ylabel="squared error of the velocity", title="held out")
    axes[1].set(xlabel="tenth of the training steps", title="training")
    axes[0].legend()
    return figure


def _figure(rows, columns):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * columns, 4 * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes
