"""What tests of objectives hand to them, and ask of them."""

import torch

from hf_fae.utils.randomness import ImageRandom


def batch(size=4):
    return {"pixel_values": torch.rand(size, 3, 32, 32) * 2 - 1, "class_labels": torch.arange(size)}


def numbers(seed=0):
    return ImageRandom(seed, first_image=0)


def trained(objective):
    """The parts of the model that are trained, and whether exactly these got gradients."""
    objective.train()(batch(), numbers())["loss"].backward()
    parameters = dict(objective.named_parameters())
    assert all((p.grad is not None) == p.requires_grad for p in parameters.values())
    return {".".join(name.split(".")[:2]) for name, p in parameters.items() if p.requires_grad}


def record_calls(model):
    """The arguments of the model's calls from now on."""
    calls = []
    model.register_forward_pre_hook(lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    return calls
