"""The kNN monitor on cases counted by hand and against plain loops."""

import math
from functools import partial

import pytest
import torch

import common
import simsiam as S

no_autocast = partial(torch.autocast, "cpu", torch.bfloat16, False)


def draw(*shape, seed=0):
    """Random normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draw_labels(count, classes, seed=0):
    """Random labels."""
    return torch.randint(classes, (count,), generator=torch.Generator().manual_seed(seed))


def data_set(train, test, train_labels=None, test_labels=None):
    """A Dataset of two classes."""
    mean, std = torch.tensor([0.5, 0.4, 0.6]), torch.tensor([0.2, 0.3, 0.25])
    return common.Dataset(train, train_labels, test, test_labels, ("a", "b"), mean, std)


def random_images(count, size):
    """Random uint8 images."""
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8)


def cosine(a, b):
    """The cosine of two vectors."""
    return (torch.dot(a, b) / a.norm() / b.norm()).item()


def naive_knn(bank, bank_labels, queries, labels, classes, k, tau, leave_one_out=False):
    """Percent of right votes, by one loop for the queries and one for the bank."""
    right = 0
    for number, (query, label) in enumerate(zip(queries, labels)):
        neighbours = []
        for other, (row, bank_label) in enumerate(zip(bank, bank_labels)):
            if not leave_one_out or other != number:
                neighbours.append((cosine(query, row), bank_label.item()))
        neighbours.sort(reverse=True)
        votes = [0.0] * classes
        for value, voted in neighbours[:k]:
            votes[voted] += math.exp(value / tau)
        right += votes.index(max(votes)) == label.item()
    return 100 * right / len(queries)


@pytest.mark.parametrize("k", [1, 3, 10, 200])
@pytest.mark.parametrize("tau", [0.05, 0.1, 1.0])
def test_accuracy_equals_plain_loops(k, tau):
    bank, bank_labels = draw(40, 5), draw_labels(40, 4)
    queries, labels = draw(30, 5, seed=1), draw_labels(30, 4, seed=1)
    ours = S.knn_accuracy(bank, bank_labels, queries, labels, 4, k, tau)
    expected = naive_knn(bank, bank_labels, queries, labels, 4, k, tau)
    assert ours == pytest.approx(expected)


@pytest.mark.parametrize("k", [1, 3, 10, 200])
@pytest.mark.parametrize("tau", [0.05, 1.0])
def test_leave_one_out_equals_plain_loops(k, tau):
    bank, labels = draw(40, 5), draw_labels(40, 4)
    ours = S.knn_accuracy(bank, labels, bank, labels, 4, k, tau, leave_one_out=True)
    expected = naive_knn(bank, labels, bank, labels, 4, k, tau, leave_one_out=True)
    assert ours == pytest.approx(expected) and ours < 100
    if k == 1:  # with itself among its neighbours every row is right
        assert S.knn_accuracy(bank, labels, bank, labels, 4, k, tau) == 100


def test_leave_one_out_leaves_out_the_query_in_every_chunk():
    """The nearest other row of each row is almost equal and has the other label."""
    rows, noise = draw(3000, 16), 0.01 * draw(3000, 16, seed=1)
    bank, labels = torch.cat([rows, rows + noise]), torch.arange(6000) // 3000
    assert 2**25 // len(bank) < len(bank)  # more than one chunk
    assert S.knn_accuracy(bank, labels, bank, labels, 2, 1, leave_one_out=True) == 0
    assert S.knn_accuracy(bank, labels, bank, 1 - labels, 2, 1, leave_one_out=True) == 100


def test_accuracy_counted_by_hand():
    """A near neighbour of class 1 against two further ones of class 0: k and tau decide."""
    def at(degrees):
        angle = math.radians(degrees)
        return [math.cos(angle), math.sin(angle)]

    bank = torch.tensor([at(10), at(40), at(-40)])
    labels = torch.tensor([1, 0, 0])
    query = torch.tensor([at(0)])
    cases = [(1, 0.1, 1), (3, 0.1, 1), (3, 10.0, 0)]
    for k, tau, winner in cases:
        right, wrong = torch.tensor([winner]), torch.tensor([1 - winner])
        assert S.knn_accuracy(bank, labels, query, right, 2, k, tau) == 100
        assert S.knn_accuracy(bank, labels, query, wrong, 2, k, tau) == 0


def test_features_of_any_length_are_normalised():
    bank, labels = draw(50, 8), draw_labels(50, 3)
    lengths = 1000 * draw(50, 1, seed=1).abs()
    assert S.knn_accuracy(lengths * bank, labels, 3 * bank, labels, 3, 1) == 100


def test_chunks_change_nothing(monkeypatch):
    bank, bank_labels = draw(64, 8), draw_labels(64, 3)
    queries, labels = draw(101, 8, seed=1), draw_labels(101, 3, seed=1)
    chunks, real = [], torch.Tensor.topk

    def topk(self, *args, **more):
        chunks.append(len(self))
        return real(self, *args, **more)

    monkeypatch.setattr(torch.Tensor, "topk", topk)
    whole = S.knn_accuracy(bank, bank_labels, queries, labels, 3)
    many = draw(2**25 // 40, 8, seed=2)  # so long that 40 queries fill a chunk
    many_labels = torch.zeros(len(many), dtype=torch.long)
    S.knn_accuracy(many, many_labels, queries, labels, 3, 5)
    assert chunks == [101, 40, 40, 21]
    expected = naive_knn(bank, bank_labels, queries, labels, 3, 64, 0.1)
    assert whole == pytest.approx(expected)


def test_small_temperature_does_not_overflow():
    """Nor underflow: neighbours at a right angle vote too, if they are all there is."""
    bank, labels = torch.eye(4), torch.arange(4)
    assert S.knn_accuracy(bank, labels, bank, labels, 4, 4, 0.001) == 100
    far = torch.tensor([3, 3])
    assert S.knn_accuracy(bank[:2], far, bank[2:], far, 4, 2, 0.001) == 100


def test_features_are_the_backbones_in_evaluation_mode():
    f = common.resnet("resnet18", 1 / 4).train()
    images = random_images(23, 16)
    data = data_set(images, images[:0])
    before = {name: value.clone() for name, value in f.state_dict().items()}
    out = S.features(f, images, data, 5, no_autocast)
    assert out.shape == (23, f.num_features)
    assert not out.requires_grad and not f.training
    assert all(value.equal(before[name]) for name, value in f.state_dict().items())
    with torch.no_grad():
        expected = f(common.normalize(images, data.mean, data.std))
    assert torch.allclose(out, expected, atol=1e-4)


@pytest.mark.parametrize("world", [2, 3, 5])
def test_features_of_all_processes_are_those_of_one(world, monkeypatch):
    """Each process computes as many rows; joined and cut they are those of one process."""
    images = random_images(13, 8)
    data = data_set(images, images[:0])
    f = common.resnet("resnet18", 1 / 4)
    whole = S.features(f, images, data, 13, no_autocast)
    shares = []

    def gather(x):
        shares.append(x)
        return x

    monkeypatch.setattr(S, "gather", gather)
    for rank in range(world):
        place = (rank, world, rank)
        monkeypatch.setattr(S, "processes", lambda place=place: place)
        S.features(f, images, data, 4, no_autocast)
    assert {len(share) for share in shares} == {-(-13 // world)}
    assert torch.allclose(torch.cat(shares)[:13], whole, atol=1e-5)


def test_the_monitor_uses_the_test_split_or_else_leaves_one_out():
    train, test = random_images(14, 8), random_images(9, 8)
    labels = torch.arange(14) % 2
    f, args = common.resnet("resnet18", 1 / 4), S.parse_args(["--knn-k", "3"])
    data = data_set(train, test, labels, labels[:9])
    bank = S.features(f, train, data, 14, no_autocast)
    queries = S.features(f, test, data, 9, no_autocast)
    split = naive_knn(bank, labels, queries, labels[:9], 2, 3, 0.1)
    one_out = naive_knn(bank, labels, bank, labels, 2, 3, 0.1, leave_one_out=True)
    ours = S.knn_monitor(f, data, args, 4, no_autocast)
    assert ours == {"knn": pytest.approx(split)}
    data = data_set(train, test[:0], labels)
    ours = S.knn_monitor(f, data, args, 4, no_autocast)
    assert ours == {"knn": pytest.approx(one_out)}


def test_without_labels_there_is_no_accuracy():
    data = data_set(torch.zeros(4), torch.zeros(0))
    assert S.knn_monitor(None, data, None, 4, None) == {}


def test_feature_std_is_one_for_noise_and_zero_for_a_constant():
    assert S.feature_std(draw(4096, 256)) == pytest.approx(1, abs=0.02)
    assert S.feature_std(torch.ones(64, 256)) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_features_of_any_dtype_are_compared_in_float32(dtype):
    bank = draw(300, 16).to(dtype)
    queries = draw(50, 16, seed=1).to(dtype)
    bank_labels = torch.arange(300) % 3
    labels = bank_labels[:50]
    low = S.knn_accuracy(bank, bank_labels, queries, labels, 3, 20)
    full = S.knn_accuracy(bank.float(), bank_labels, queries.float(), labels, 3, 20)
    assert low == full
