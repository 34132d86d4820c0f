import pytest
import torch

from hf_fae.convert.keys import KeyTable
from hf_fae.convert.transforms import SPLIT_QKV, SWAP_HALVES


TABLE = KeyTable(
    [
        ("embed.{weight,bias}", "proj_in.{weight,bias}"),
        ("blocks.{i}.qkv.{weight,bias}", tuple(f"blocks.{{i}}.to_{n}.{{weight,bias}}" for n in "qkv"), SPLIT_QKV),
        ("blocks.{i}.gate.weight", "blocks.{i}.ff.weight", SWAP_HALVES),
        ("late.{i}.weight", "blocks.{i+2}.late.weight"),
    ],
    dropped=("pos_embed", "projectors.*"),
)


def published(**extra):
    names = ["embed.weight", "embed.bias", "late.0.weight", "late.1.weight"]
    names += [f"blocks.{i}.{name}" for i in range(2) for name in ("qkv.weight", "gate.weight")]
    return {name: torch.randn(6, 2) for name in names} | extra


def test_round_trip_is_the_identity():
    state = published(pos_embed=torch.ones(1), **{"projectors.0.weight": torch.ones(1)})
    ours = TABLE.to_ours(state)
    assert torch.equal(ours["blocks.1.to_k.weight"], state["blocks.1.qkv.weight"][2:4])
    assert torch.equal(ours["blocks.0.ff.weight"], state["blocks.0.gate.weight"].roll(3, 0))
    assert torch.equal(ours["blocks.3.late.weight"], state["late.1.weight"])
    assert "blocks.0.to_q.bias" not in ours  # not there, not made up
    back = TABLE.to_published(ours)
    assert back.keys() == published().keys()
    assert all(torch.equal(back[name], state[name]) for name in back)


@pytest.mark.parametrize(
    "extra, message",
    [
        ({"blocks.0.strange": torch.ones(1)}, r"only keys of its family, got 'blocks.0.strange' \(1 unknown\)"),
        ({"blocks.0.qkv.weight": torch.ones(4, 2)}, r"shapes of its family, got 'blocks.0.qkv.weight' \(4, 2\)"),
    ],
)
def test_other_checkpoints_are_refused(extra, message):
    with pytest.raises(ValueError, match=message):
        TABLE.to_ours(published(**extra))


def test_half_of_a_rule_is_refused():
    table = KeyTable([(("table", "null"), "embedding", SPLIT_QKV)])
    with pytest.raises(ValueError, match="must have 'null' beside 'table'"):
        table.to_ours({"table": torch.ones(3)})
