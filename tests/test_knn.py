"""The kNN monitor on cases counted by hand and against plain loops."""

import math
from functools import partial

import pytest
import torch

import common
import simsiam as S


def naive_knn(bank, bank_labels, queries, labels, classes, k, tau):
    right = 0
    for query, label in zip(queries, labels):
        cosine = sorted(((torch.dot(query, b) / query.norm() / b.norm()).item(), c.item())
                        for b, c in zip(bank, bank_labels))
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
    bank_labels = torch.randint(4, (40,), generator=draw)
    labels = torch.randint(4, (30,), generator=draw)
    ours = S.knn_accuracy(bank, bank_labels, queries, labels, 4, k, tau)
    assert ours == pytest.approx(naive_knn(bank, bank_labels, queries, labels, 4, k, tau))


def test_counted_by_hand():
    """A near neighbour of class 1 against two further ones of class 0: k and tau decide."""
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
    bank_labels = torch.randint(3, (64,), generator=draw)
    labels = torch.randint(3, (101,), generator=draw)
    largest, real = [], torch.Tensor.topk

    def topk(self, *args, **more):
        largest.append(len(self))
        return real(self, *args, **more)
    monkeypatch.setattr(torch.Tensor, "topk", topk)
    whole = S.knn_accuracy(bank, bank_labels, queries, labels, 3)
    many = torch.randn(2**25 // 40, 8, generator=draw)  # so long that 40 queries fill a chunk
    S.knn_accuracy(many, torch.zeros(len(many), dtype=torch.long), queries, labels, 3, 5)
    assert largest == [101, 40, 40, 21]
    assert whole == pytest.approx(naive_knn(bank, bank_labels, queries, labels, 3, 64, 0.1))


def test_small_temperature_does_not_overflow():
    """Nor underflow: neighbours at a right angle vote too, if they are all there is."""
    bank, labels = torch.eye(4), torch.arange(4)
    assert S.knn_accuracy(bank, labels, bank, labels, 4, 4, 0.001) == 100
    far = torch.tensor([3, 3])
    assert S.knn_accuracy(bank[:2], far, bank[2:], far, 4, 2, 0.001) == 100


def test_features_are_the_backbones_in_evaluation_mode():
    f = common.resnet("resnet18", 1 / 4).train()
    images = torch.randint(256, (23, 3, 16, 16), dtype=torch.uint8)
    before = {name: value.clone() for name, value in f.state_dict().items()}
    mean, std = torch.rand(3), torch.rand(3) + 0.1
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, False)
    out = S.features(f, images, mean, std, 5, autocast)
    assert out.shape == (23, f.num_features) and not out.requires_grad and not f.training
    assert all(value.equal(before[name]) for name, value in f.state_dict().items())
    with torch.no_grad():
        assert torch.allclose(out, f(common.normalize(images, mean, std)), atol=1e-4)


@pytest.mark.parametrize("world", [2, 3, 5])
def test_shares_of_the_features_join_to_all(world, monkeypatch):
    """Each process computes as many rows; joined and cut they are those of one process."""
    images = torch.randint(256, (13, 3, 8, 8), dtype=torch.uint8)
    f = common.resnet("resnet18", 1 / 4)
    mean, std = torch.full((3,), 0.5), torch.full((3,), 0.2)
    whole = S.features(f, images, mean, std, 13, torch.no_grad)
    shares = []
    monkeypatch.setattr(S, "gather", lambda x: shares.append(x) or x)
    for rank in range(world):
        monkeypatch.setattr(S, "processes", lambda: common.Processes(rank, world, rank))
        S.features(f, images, mean, std, 4, torch.no_grad)
    assert {len(share) for share in shares} == {-(-13 // world)}
    assert torch.allclose(torch.cat(shares)[:13], whole, atol=1e-5)


def test_without_labels_there_is_no_accuracy():
    data = common.Dataset(torch.zeros(4), None, torch.zeros(0), None, (), None, None)
    assert S.knn_monitor(None, data, None, 4, None) == {}


def test_feature_std_is_one_for_noise_and_zero_for_a_constant():
    assert S.feature_std(torch.randn(4096, 256)) == pytest.approx(1, abs=0.02)
    assert S.feature_std(torch.ones(64, 256)) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_any_float_is_counted_in_float32(dtype):
    bank, queries = torch.randn(300, 16).to(dtype), torch.randn(50, 16).to(dtype)
    labels = torch.arange(300) % 3
    low = S.knn_accuracy(bank, labels, queries, labels[:50], 3, 20)
    assert low == S.knn_accuracy(bank.float(), labels, queries.float(), labels[:50], 3, 20)
