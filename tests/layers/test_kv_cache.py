"""A cache against one pass over the whole sequence."""

import pytest
import torch

from hf_fae.layers.blocks import TransformerBlock
from hf_fae.layers.kv_cache import KVCache
from hf_fae.layers.positions import axial_angles


LENGTH, DIM, HEADS = 150, 32, 2


@pytest.fixture
def layers():
    return [TransformerBlock(DIM, HEADS, "layer_norm", "gelu", is_causal=True) for _ in range(2)]


def run(layers, hidden_states, rotary_emb, caches=(None, None)):
    for layer, cache in zip(layers, caches, strict=True):
        hidden_states = layer(hidden_states, rotary_emb, cache=cache)
    return hidden_states


def make_cache(static, batch_size=3):
    return KVCache(2, batch_size, LENGTH, HEADS, DIM // HEADS, torch.device("cpu"), torch.float32, static)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("parts", [[1] * LENGTH, [5] + [1] * 145, [64, 64, 22], [150]])
def test_parts_are_the_whole(layers, parts, static):
    tokens = torch.randn(3, LENGTH, DIM)
    angles = axial_angles([(torch.arange(LENGTH), DIM // HEADS)])
    with torch.no_grad():
        expected, cache, found = run(layers, tokens, angles), make_cache(static), []
        for part in tokens.split(parts, dim=1):
            rotary_emb = tuple(table[cache.length : cache.length + part.shape[1]] for table in angles)
            found.append(run(layers, part, rotary_emb, cache.extend(part.shape[1])))
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("static", [False, True])
def test_set_back_and_written_anew(layers, static):
    first, wrong, right = torch.randn(3, 3, 70, DIM).unbind()
    angles = axial_angles([(torch.arange(140), DIM // HEADS)])
    start, end = (tuple(table[part] for table in angles) for part in (slice(0, 70), slice(70, 140)))
    with torch.no_grad():
        cache = make_cache(static)
        run(layers, first, start, cache.extend(70))
        run(layers, wrong, end, cache.extend(70))
        cache.length = 70
        found = run(layers, right, end, cache.extend(70))
        expected = run(layers, torch.cat([first, right], 1), tuple(torch.cat(pair) for pair in zip(start, end)))
    torch.testing.assert_close(found, expected[:, 70:], atol=1e-5, rtol=1e-4)


def test_a_static_cache_has_one_shape():
    for static, shapes in ((True, {LENGTH}), (False, {10, 11, 12})):
        cache = make_cache(static)
        cache.extend(9)
        assert {cache.extend(1)[0].keys.shape[2] for _ in range(3)} == shapes
