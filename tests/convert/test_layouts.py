import pytest
import torch

from hf_fae.convert.keys import KeyTable
from hf_fae.convert.layouts import check_family, count_layers, square_side, vit_block_rules


def test_rules_of_a_vit_block():
    shapes = {"attn.qkv": (9, 3), "attn.proj": (3, 3), "mlp.fc1": (12, 3), "mlp.fc2": (3, 12)}
    state = {f"layer.0.{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    state |= {f"layer.0.{name}.bias": torch.randn(shape[0]) for name, shape in shapes.items()}
    table = KeyTable(vit_block_rules("layer.{i}", "blocks.{i}"))
    ours = table.to_ours(state)
    assert torch.equal(ours["blocks.0.attn.to_v.bias"], state["layer.0.attn.qkv.bias"][6:])
    assert torch.equal(ours["blocks.0.ff.net.2.weight"], state["layer.0.mlp.fc2.weight"])
    back = table.to_published(ours)
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


def test_layers_are_counted_in_their_own_stack():
    state = dict.fromkeys(["blocks.0.a", "blocks.10.a", "other.blocks.11.a", "blocks_2.12.a"])
    assert count_layers(state, "blocks") == 11 and count_layers(state, "layers") == 0


def test_grids():
    assert square_side(256) == 16
    with pytest.raises(ValueError, match="checkpoint must have positions for a square grid, got 128"):
        square_side(128)


def test_families():
    state = {"a": torch.zeros(1), "b": torch.zeros(1)}
    check_family(state, "this family", ["a", "b"])
    with pytest.raises(ValueError, match=r"must be of this family with the key 'c', got keys such as \['a', 'b'\]"):
        check_family(state, "this family", ["a", "c"])
