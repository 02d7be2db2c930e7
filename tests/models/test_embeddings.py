"""Features of time and embeddings of labels."""

import pytest
import torch

from mfd_fast.models.embeddings import HIGHEST_FREQUENCY, LabelEmbedding, TimeFeatures


def test_features_are_sines_and_cosines_of_geometric_frequencies() -> None:
    t = torch.tensor([0.0, 0.3, 1.0])
    features = TimeFeatures(6)(t)
    angles = t[:, None] * torch.tensor([1.0, HIGHEST_FREQUENCY**0.5, HIGHEST_FREQUENCY])
    torch.testing.assert_close(features, torch.cat([angles.sin(), angles.cos()], 1), rtol=0, atol=2e-5)


def test_nearby_times_differ_and_the_derivative_is_bounded() -> None:
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    features = TimeFeatures(64)(t)
    slopes = (features[1:] - features[:-1]) / (t[1:] - t[:-1])[:, None]
    assert slopes.abs().max() <= HIGHEST_FREQUENCY * (1 + 1e-6)
    assert torch.cdist(features[::10], features[::10]).fill_diagonal_(1.0).min() > 0.5


def test_features_stay_float32_in_a_bfloat16_module() -> None:
    t = torch.rand(100)
    module = TimeFeatures(64)
    expected = module(t)
    assert torch.equal(module.to(torch.bfloat16)(t), expected)
    assert expected.dtype == torch.float32
    assert TimeFeatures(64)(t.to(torch.bfloat16)).dtype == torch.float32


def test_features_survive_the_meta_device() -> None:
    with torch.device("meta"):
        module = TimeFeatures(8)
    t = torch.rand(4)
    assert torch.equal(module.to_empty(device="cpu")(t), TimeFeatures(8)(t))


def test_features_are_not_part_of_the_weights() -> None:
    assert TimeFeatures(8).state_dict() == {}


def test_labels_select_rows_and_none_selects_the_last() -> None:
    embedding = LabelEmbedding(3, 4)
    assert torch.equal(embedding(torch.tensor([2, 3])), embedding.weight[2:])
    assert torch.equal(embedding(None), embedding.weight[3:])


@pytest.mark.parametrize("label", [4, -1])
def test_a_label_out_of_range_is_refused(label: int) -> None:
    with pytest.raises(ValueError, match=r"label must be in 0\.\.3 \(3 = no label\)"):
        LabelEmbedding(3, 4)(torch.tensor([0, label]))
