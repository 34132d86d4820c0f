"""Recall against brute force, ridge regression against scikit-learn."""

import pytest
import torch
from torch.nn import functional as F

from hf_fae.evaluation.metrics.image_text import LinearTextAlignment, pair_up, recall_at_k


def test_recall_is_that_of_a_sorted_list():
    similarity = torch.randn(2500, 40)
    queries, items = torch.randint(10, (2500,)), torch.arange(40) % 10
    found = recall_at_k(similarity, queries, items, k=(1, 3, 40))
    for k, recall in found.items():
        hits = 0
        for scores, group in zip(similarity, queries, strict=True):
            hits += group in items[scores.argsort(descending=True)[:k]]
        assert recall == hits / 2500
    assert found[40] == 1
    assert found[1] == pytest.approx(0.1, abs=0.03)


def test_recall_of_captions():
    """Five captions a picture, as in COCO: one of them is enough, and every one of them looks for its picture."""
    pictures, captions = F.one_hot(torch.arange(4)).float(), torch.zeros(20, 4)
    groups = torch.arange(20) // 5
    captions[::5] = 2 * pictures  # the first caption is right
    captions[1::5] = pictures.roll(1, 0)  # the second is that of another picture
    assert recall_at_k(pictures @ captions.T, torch.arange(4), groups, k=(1,)) == {1: 1.0}
    # All others are as close to every picture, which counts as last.
    assert recall_at_k(captions @ pictures.T, groups, torch.arange(4), k=(1, 3, 4)) == {1: 0.2, 3: 0.2, 4: 1.0}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"similarity": torch.zeros(3, 2)}, r"similarity must be of \(2, 3\) queries and items, got \(3, 2\)"),
        ({"k": (0,)}, r"k must be positive numbers, got \[0\]"),
        ({"similarity": torch.full((2, 3), torch.nan)}, "similarity must be finite"),
        ({"query_groups": torch.tensor([0, 7])}, "query_groups must be among item_groups, got 7"),
    ],
)
def test_recall_refuses(changed, message):
    values = {"similarity": torch.zeros(2, 3), "query_groups": torch.arange(2), "item_groups": torch.arange(3)}
    with pytest.raises(ValueError, match=message):
        recall_at_k(**values | changed)


def test_equal_pictures_and_captions_are_one():
    # Picture 5 with three captions, one of which (20) is that of picture 9 as well; picture 7 alone, twice.
    pictures = torch.tensor([5, 7, 5, 9, 5, 7])
    captions = torch.tensor([20, 30, 21, 20, 22, 30])
    (picture_rows, picture_groups), (caption_rows, caption_groups) = pair_up(pictures, captions)
    assert pictures[picture_rows].tolist() == [5, 7, 9] and picture_rows.tolist() == [0, 1, 3]
    assert captions[caption_rows].tolist() == [20, 21, 22, 30] and caption_rows.tolist() == [0, 2, 4, 1]
    assert picture_groups[0] == picture_groups[2] != picture_groups[1]
    assert caption_groups.tolist() == [picture_groups[0]] * 3 + [picture_groups[1]]
    # Without repetition, a row is a group.
    (rows, first), (_, second) = pair_up(torch.arange(6) * 11, torch.arange(6))
    assert rows.tolist() == list(range(6)) and torch.equal(first, second) and len(first.unique()) == 6


def test_alignment_is_ridge_regression():
    from sklearn.linear_model import Ridge
    from sklearn.preprocessing import StandardScaler

    features = torch.randn(100, 12) @ torch.randn(12, 12) + 3
    texts = F.normalize(features[:, :5] @ torch.randn(5, 7) + torch.randn(100, 7), dim=1)
    new = torch.randn(20, 12) @ torch.randn(12, 12) + 3
    scaler = StandardScaler().fit(features.double().numpy())
    ridge = Ridge(alpha=0.3 * 100).fit(scaler.transform(features.double().numpy()), texts.double().numpy())
    expected = torch.from_numpy(ridge.predict(scaler.transform(new.double().numpy()))) - texts.double().mean(0)
    alignment = LinearTextAlignment(features, texts, penalty=0.3)
    torch.testing.assert_close(alignment.image_embeds(new), F.normalize(expected, dim=1).float(), atol=1e-6, rtol=1e-5)
    deviations = F.normalize(texts - texts.mean(0), dim=1)
    torch.testing.assert_close(alignment.text_embeds(texts), deviations, atol=1e-6, rtol=1e-5)


def test_alignment_chooses_its_penalty():
    """By the error that the formula of cross-validation gives with the whole hat matrix."""
    features, noise = torch.randn(60, 40), torch.randn(60, 7)
    texts = features[:, :7] + 2 * noise
    inputs = ((features - features.mean(0)) / features.std(0, correction=0)).double()
    targets = (texts - texts.mean(0)).double()

    def validation_error(penalty):
        ones = torch.full((60, 60), 1 / 60, dtype=torch.float64)
        hat = inputs @ torch.linalg.solve(inputs.T @ inputs + 60 * penalty * torch.eye(40).double(), inputs.T) + ones
        return ((targets - hat @ targets).square().sum() / (1 - hat.trace() / 60) ** 2).item()

    best = min(LinearTextAlignment.PENALTIES, key=validation_error)
    assert LinearTextAlignment(features, texts).penalty == best
    # What is a linear map is found; where there is no relation, the penalty is large.
    exact = LinearTextAlignment(features, features @ torch.eye(40)[:, :9] + 1)
    new = torch.randn(5, 40)
    expected = F.normalize(new[:, :9] - features[:, :9].mean(0), dim=1)
    torch.testing.assert_close(exact.image_embeds(new), expected, atol=1e-2, rtol=1e-2)
    assert exact.penalty == min(LinearTextAlignment.PENALTIES)
    assert LinearTextAlignment(features, torch.randn(60, 7)).penalty > 10


def test_alignment_of_few_pictures():
    features, texts = torch.randn(10, 40), torch.randn(10, 7)
    features[:, 3] = 1
    assert torch.isfinite(LinearTextAlignment(features, texts).image_embeds(torch.randn(5, 40))).all()


@pytest.mark.parametrize(
    ("features", "texts", "message"),
    [
        (torch.zeros(5, 3), torch.zeros(4, 2), r"got \(5, 3\) and \(4, 2\)"),
        (torch.zeros(1, 3), torch.zeros(1, 2), "N > 1"),
        (torch.zeros(5, 2, 3), torch.zeros(5, 2), r"got \(5, 2, 3\)"),
        (torch.full((5, 3), torch.inf), torch.zeros(5, 2), "features must be finite"),
        (torch.zeros(5, 3), torch.full((5, 2), torch.nan), "text_embeds must be finite"),
    ],
)
def test_alignment_refuses(features, texts, message):
    with pytest.raises(ValueError, match=message):
        LinearTextAlignment(features, texts)
