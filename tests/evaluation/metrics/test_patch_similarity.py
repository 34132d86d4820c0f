import pytest
import torch

from hf_fae.evaluation.metrics.patch_similarity import (
    choose_query,
    is_near,
    map_agreement,
    match_patches,
    nearest_patches,
    object_mask,
    similarity_map,
)


EVERYWHERE = torch.ones(16, dtype=torch.bool)


def square_pictures(count=3, side=6, width=8):
    """Tokens (B, side^2, width) of a square of 2 x 2 patches, at another place in each picture, and where it is."""
    ground, thing = torch.eye(width)[0], torch.eye(width)[1]
    inside = torch.zeros(count, side, side, dtype=torch.bool)
    for index in range(count):
        inside[index, 1 + index : 3 + index, 2:4] = True
    inside = inside.flatten(1)
    scale = torch.linspace(1, 20, side**2)[:, None]  # lengths tell nothing
    return scale * torch.where(inside[..., None], thing, ground) + 0.05 * torch.randn(count, side**2, width), inside


def test_similarity_map():
    tokens = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0], [-1.0, 0.0]])
    torch.testing.assert_close(similarity_map(tokens, 0), torch.tensor([1.0, 0.0, 2**-0.5, -1.0]))
    for query in (-1, 4):
        with pytest.raises(ValueError, match=f"query must be from 0 to 3, got {query}"):
            similarity_map(tokens, query)


def test_map_agreement_is_the_correlation_of_maps():
    tokens, reference = torch.randn(2, 7, 5), torch.randn(2, 7, 12)
    agreement = map_agreement(tokens, reference)
    for picture in range(2):
        for patch in range(7):
            others = [index for index in range(7) if index != patch]
            maps = [similarity_map(space[picture], patch)[others] for space in (tokens, reference)]
            expected = torch.corrcoef(torch.stack(maps))[0, 1].item()
            assert agreement[picture, patch].item() == pytest.approx(expected, abs=1e-5)


def test_map_agreement_at_its_ends():
    tokens = torch.randn(1, 9, 6)
    rotation = torch.linalg.qr(torch.randn(6, 6))[0]
    torch.testing.assert_close(map_agreement(3 * tokens @ rotation, tokens), torch.ones(1, 9))
    assert map_agreement(torch.ones(1, 9, 2), tokens).abs().max() < 1e-3


def test_object_mask_finds_a_square():
    tokens, inside = square_pictures()
    assert torch.equal(object_mask(tokens, (6, 6)), inside)
    assert torch.equal(object_mask(tokens, (6, 6), seed=3), inside)
    with pytest.raises(ValueError, match=r"grid must have 36 cells as there are tokens, got \(6, 5\)"):
        object_mask(tokens, (6, 5))


def test_object_mask_does_not_depend_on_the_share_of_the_object():
    tokens, inside = square_pictures()
    larger = inside.clone().view(3, 6, 6)
    larger[:, 1:5, 1:5] = True
    tokens = torch.where(larger.flatten(1)[..., None], tokens[inside][0], tokens[:, :1])
    assert torch.equal(object_mask(tokens, (6, 6)), larger.flatten(1))


def test_query_is_the_part_that_stands_out_within_the_object():
    tokens = torch.eye(4)[[0, 0, 0, 1, 1, 1, 1, 2, 3]]
    mask = torch.tensor([False, False, False, True, True, True, True, True, False])
    assert choose_query(tokens, mask) in (3, 4, 5, 6)
    assert choose_query(torch.randn(9, 4), mask.new_zeros(9).index_fill(0, torch.tensor([5]), True)) == 5
    with pytest.raises(ValueError, match="mask must have at least one patch, got none of 9"):
        choose_query(tokens, torch.zeros(9, dtype=torch.bool))


def test_matches_of_a_permuted_copy_are_the_permutation():
    first, order = torch.randn(16, 8), torch.randperm(16)
    pairs, cosines = match_patches(first, 2 * first[order], EVERYWHERE, EVERYWHERE)
    assert pairs.shape == (16, 2) and sorted(pairs[:, 0].tolist()) == list(range(16))
    assert torch.equal(order[pairs[:, 1]], pairs[:, 0])
    torch.testing.assert_close(cosines, torch.ones(16))


def test_matches_of_a_shifted_picture_are_the_shift():
    grid = torch.randn(4, 4, 8)
    shifted = grid.roll(1, dims=1)
    pairs, _ = match_patches(grid.flatten(0, 1), shifted.flatten(0, 1), EVERYWHERE, EVERYWHERE)
    assert torch.equal(pairs[:, 0] // 4, pairs[:, 1] // 4)
    assert torch.equal((pairs[:, 0] + 1) % 4, pairs[:, 1] % 4)


def test_matches_are_mutual_first_and_inside_the_masks():
    # Patch 0 is nearest to 0 and patch 1 even nearer, but 0 prefers patch 1; patch 2 is far from all, and mutual.
    first = torch.tensor([[1.0, 0.3, 0.0], [1.0, 0.1, 0.0], [0.0, 0.6, 1.0], [1.0, 0.0, 0.0]])
    second = torch.tensor([[1.0, 0.0, 0.0], [0.0, -0.6, 1.0], [1.0, 0.3, 0.0]])
    first_mask, second_mask = torch.tensor([True, True, True, False]), torch.tensor([True, True, False])
    pairs, cosines = match_patches(first, second, first_mask, second_mask)
    assert pairs.tolist() == [[1, 0], [2, 1], [0, 0]]
    assert cosines[1] < cosines[2] < cosines[0]
    assert match_patches(first, second, first_mask, second_mask, count=2)[0].tolist() == [[1, 0], [2, 1]]
    assert nearest_patches(first, second, second_mask)[1].tolist() == [0, 0, 1, 0]


def test_matches_need_objects():
    tokens, nothing = torch.randn(16, 8), torch.zeros(16, dtype=torch.bool)
    with pytest.raises(ValueError, match="first_mask must have at least one patch, got none of 16"):
        match_patches(tokens, tokens, nothing, EVERYWHERE)
    with pytest.raises(ValueError, match="second_mask must have at least one patch, got none of 16"):
        match_patches(tokens, tokens, EVERYWHERE, nothing)
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        match_patches(tokens, tokens, EVERYWHERE, EVERYWHERE, count=0)


def test_neighbours_do_not_reach_over_the_edge():
    patches = torch.arange(12)  # 3 rows of 4
    near = is_near(torch.tensor(5), patches, width=4)
    assert patches[near].tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert patches[is_near(torch.tensor(3), patches, width=4)].tolist() == [2, 3, 6, 7]
