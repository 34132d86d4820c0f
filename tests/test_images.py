import numpy as np
import pytest
import torch
from PIL import Image

from hf_fae.images import make_grid, to_pil


def test_to_pil_scales_and_clamps():
    images = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0]).view(1, 1, 1, 5).expand(2, 3, 4, 5)
    pictures = to_pil(images)
    assert len(pictures) == 2 and pictures[0].size == (5, 4) and pictures[0].mode == "RGB"
    assert np.asarray(pictures[0])[0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_to_pil_takes_half_precision_with_gradient():
    assert to_pil(torch.ones(1, 3, 2, 2, dtype=torch.bfloat16, requires_grad=True))[0].getpixel((0, 0)) == (255,) * 3


def test_grid_row_by_row():
    colours = ["red", "green", "blue", "black", "yellow"]
    grid = make_grid([Image.new("RGB", (10, 8), colour) for colour in colours], columns=3, padding=1)
    assert grid.size == (36, 20)
    centres = [(6 + 12 * (i % 3), 5 + 10 * (i // 3)) for i in range(6)]
    expected = [Image.new("RGB", (1, 1), colour).getpixel((0, 0)) for colour in [*colours, "white"]]
    assert [grid.getpixel(centre) for centre in centres] == expected


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (2, 2), (4, 2), (5, 3), (16, 4), (17, 5)])
def test_grid_is_about_square(count, columns):
    assert make_grid([Image.new("RGB", (8, 8))] * count, padding=0).width == 8 * columns


def test_labels_stand_above_and_inside_their_cells():
    pictures = [Image.new("RGB", (64, 64), "red")] * 2
    plain, labelled = make_grid(pictures), make_grid(pictures, labels=["a", "a very long name of a class indeed"])
    header = labelled.height - plain.height
    assert 8 < header < 40 and labelled.width == plain.width
    pixels = np.asarray(labelled)
    assert (pixels[2 + header : -2, 2:66] == (255, 0, 0)).all()
    assert (pixels[:header] < 128).any() and (pixels[:header, -2:] == 255).all()


def test_bad_input():
    with pytest.raises(ValueError, match="images must hold at least one image"):
        make_grid([])
    with pytest.raises(ValueError, match="labels must be as many as the 2 images, got 1"):
        make_grid([Image.new("RGB", (4, 4))] * 2, labels=["one"])


def test_labels_have_one_line():
    pictures = [Image.new("RGB", (64, 64))]
    one, other = (make_grid(pictures, labels=[label]) for label in ("a  cat\n", "a cat"))
    assert one.tobytes() == other.tobytes()
