"""The kNN monitor on cases counted by hand and against plain loops."""

import math

import pytest
import torch

import simsiam as S


def naive_knn(bank, bank_labels, queries, labels, classes, k, tau):
    right = 0
    for query, label in zip(queries, labels):
        cosine = sorted(((torch.dot(query, b) / query.norm() / b.norm()).item(), c.item()) for b, c in zip(bank, bank_labels))
        votes = [0.0] * classes
        for value, c in cosine[::-1][:k]:
            votes[c] += math.exp(value / tau)
        right += votes.index(max(votes)) == label.item()
    return 100 * right / len(queries)


@pytest.mark.parametrize("k", [1, 3, 10, 200])
@pytest.mark.parametrize("tau", [0.05, 0.1, 1.0])
def test_equals_plain_loops(k, tau):
    draw = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(40, 5, generator=draw), torch.randn(30, 5, generator=draw)
    bank_labels, labels = torch.randint(4, (40,), generator=draw), torch.randint(4, (30,), generator=draw)
    ours = S.knn_accuracy(bank, bank_labels, queries, labels, 4, k, tau)
    assert ours == pytest.approx(naive_knn(bank, bank_labels, queries, labels, 4, k, tau))


def test_counted_by_hand():
    """One near neighbour of class 1 against two further ones of class 0: who wins depends on k and tau."""
    def at(degrees):
        return [math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]
    bank, labels = torch.tensor([at(10), at(40), at(-40)]), torch.tensor([1, 0, 0])
    query = torch.tensor([at(0)])
    for k, tau, winner in ((1, 0.1, 1), (3, 0.1, 1), (3, 10.0, 0)):
        assert S.knn_accuracy(bank, labels, query, torch.tensor([winner]), 2, k, tau) == 100
        assert S.knn_accuracy(bank, labels, query, torch.tensor([1 - winner]), 2, k, tau) == 0


def test_length_of_features_is_no_matter():
    draw = torch.Generator().manual_seed(0)
    bank, labels = torch.randn(50, 8, generator=draw), torch.randint(3, (50,), generator=draw)
    scaled = bank * torch.rand(50, 1, generator=draw) * 1000
    assert S.knn_accuracy(scaled, labels, bank * 3, labels, 3, 1) == 100


def test_chunks_change_nothing(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(64, 8, generator=draw), torch.randn(101, 8, generator=draw)
    bank_labels, labels = torch.randint(3, (64,), generator=draw), torch.randint(3, (101,), generator=draw)
    largest, real = [], torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "topk", lambda self, *a, **k: largest.append(len(self)) or real(self, *a, **k))
    whole = S.knn_accuracy(bank, bank_labels, queries, labels, 3)
    many = torch.randn(2**25 // 40, 8, generator=draw)  # a bank so long that 40 queries fill a chunk
    S.knn_accuracy(many, torch.zeros(len(many), dtype=torch.long), queries, labels, 3, 5)
    assert largest == [101, 40, 40, 21]
    assert whole == pytest.approx(naive_knn(bank, bank_labels, queries, labels, 3, 64, 0.1))


def test_small_temperature_does_not_overflow():
    """Nor underflow: neighbours at a right angle vote too, if they are all there is."""
    bank, labels = torch.eye(4), torch.arange(4)
    assert S.knn_accuracy(bank, labels, bank, labels, 4, 4, 0.001) == 100
    assert S.knn_accuracy(bank[:2], torch.tensor([3, 3]), bank[2:], torch.tensor([3, 3]), 4, 2, 0.001) == 100


def test_features_are_the_backbones_in_evaluation_mode():
    import common
    from functools import partial
    f, images = common.resnet("resnet18", 1 / 4).train(), torch.randint(256, (23, 3, 16, 16), dtype=torch.uint8)
    before = {name: value.clone() for name, value in f.state_dict().items()}
    mean, std = torch.rand(3), torch.rand(3) + 0.1
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, False)
    out = S.features(f, images, mean, std, 5, autocast)
    assert out.shape == (23, f.num_features) and not out.requires_grad and f.training
    assert all(value.equal(before[name]) for name, value in f.state_dict().items())
    with torch.no_grad():
        assert torch.allclose(out, f.eval()(common.normalize(images, mean, std)), atol=1e-4)


def test_feature_std_is_one_for_noise_and_zero_for_a_constant():
    assert S.feature_std(torch.randn(4096, 256)) == pytest.approx(1, abs=0.02)
    assert S.feature_std(torch.ones(64, 256)) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_any_float_is_counted_in_float32(dtype):
    bank, queries = torch.randn(300, 16).to(dtype), torch.randn(50, 16).to(dtype)
    labels = torch.arange(300) % 3
    counted = [S.knn_accuracy(b, labels, q, labels[:50], 3, 20) for b, q in ((bank, queries), (bank.float(), queries.float()))]
    assert counted[0] == counted[1]
