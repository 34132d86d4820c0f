"""How the tests of pipelines draw: small pictures as tensors, from a seed."""

import torch


# Every pipeline of a test knows these names, and draws 32x32 pictures in 4 guided steps.
SETTINGS = {
    "id2label": {0: "tench, Tinca tinca", 1: "cat", 2: "dog", 3: "golden retriever", 4: "crane"},
    "guidance_scale": 2.0,
}


def draw(pipe, class_labels="cat", seed=0, **kwargs):
    """Images (B, 3, 32, 32), or what `output_type` says."""
    kwargs = {"generator": seeded(seed), "output_type": "pt"} | kwargs
    return pipe(class_labels, **kwargs).images


def seeded(*seeds):
    """A generator, or a list of them."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators[0] if len(seeds) == 1 else generators


def assert_same(pictures, expected):
    """Equal but for the last bits: a product of a matrix and a single row depends on where the matrix lies in memory,
    and that is elsewhere for a model that was loaded."""
    torch.testing.assert_close(pictures, expected, atol=1e-5, rtol=1e-4)


def count_batches(pipe):
    """A list to which every call of the denoiser appends its batch size."""
    batches = []
    pipe.transformer.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])), prepend=True)
    return batches
