"""Methods composed from the scripts' parts: their losses are the papers', and a step trains."""

import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import common
import compositions
import moco
import simclr
import simsiam
import simsiam_logo

METHODS = {
    "byol": (compositions.BYOL, compositions.byol_step, simsiam, {}),
    "swav": (compositions.SwAV, compositions.swav_step, simclr, {"prototypes": 10}),
    "moco_logo": (compositions.MoCoLoGo, compositions.moco_logo_step, simsiam_logo,
                  {"queue": 16, "bn_splits": 2, "symmetric": True, "proj_layers": 2}),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_step_lowers_the_loss_of_its_batch_and_trains_the_backbone(name):
    kind, step, script, more = METHODS[name]
    torch.manual_seed(0)
    args = SimpleNamespace(**{**vars(script.parse_args([])), **more})
    model = kind(partial(common.resnet, "resnet18", 0.25), args)
    before = model.f.conv1.weight.clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    images, _ = common.draw_shapes(8, 16)
    half = torch.full((3,), 0.5)
    views = [common.normalize(view, half, half) for view in script.augment(images, args)]
    losses = [step(model, optimizer, views).item() for _ in range(6)]
    assert losses[-1] < losses[0] or name == "moco_logo"  # its queue changes with every step
    assert all(torch.tensor(losses).isfinite())
    assert not model.f.conv1.weight.equal(before)


def knn(f, bank, labels, queries, truth):
    """kNN accuracy of a backbone in evaluation mode; images are uint8."""
    half = torch.full((3,), 0.5)
    f.eval()
    with torch.no_grad():
        bank, queries = [f(common.normalize(x, half, half)) for x in (bank, queries)]
    f.train()
    return simsiam.knn_accuracy(bank, labels, queries, truth, 10, k=20)


@pytest.mark.skipif("SLOW" not in os.environ, reason="SLOW=1 runs it, for some minutes")
@pytest.mark.parametrize("name", METHODS)
def test_each_learns_the_classes_of_drawn_images(name):
    """In 300 steps their kNN accuracy rises by 2 points or more."""
    kind, step, script, more = METHODS[name]
    if name == "moco_logo":
        more = {**more, "queue": 512}
    torch.manual_seed(0)
    args = SimpleNamespace(**{**vars(script.parse_args([])), **more})
    model = kind(partial(common.resnet, "resnet18", 0.25), args)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9, weight_decay=5e-4)
    train, labels = common.draw_shapes(2000, 16, seed=1)
    test, truth = common.draw_shapes(1000, 16, seed=2)
    half = torch.full((3,), 0.5)
    before = knn(model.f, train, labels, test, truth)
    for index in torch.randint(2000, (300, 64)):
        views = script.augment(train[index], args)
        step(model, optimizer, [common.normalize(view, half, half) for view in views])
    assert knn(model.f, train, labels, test, truth) > before + 2


def test_byols_loss_is_the_distance_of_unit_vectors_in_both_directions():
    p1, p2, k1, k2 = torch.randn(4, 5, 7)
    expected = 0
    for p, k in ((p1, k2), (p2, k1)):
        for row, key in zip(p, k):
            distance = row / row.norm() - key / key.norm()
            expected += distance.square().sum() / 5
    found = compositions.byol_loss(p1, p2, k1, k2)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_byols_target_gets_no_gradient_and_follows_its_equation():
    backbone = partial(common.resnet, "resnet18", 0.25)
    model = compositions.BYOL(backbone, simsiam.parse_args([]))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    target = model.f_k.conv1.weight.clone()
    images = torch.rand(2, 4, 3, 16, 16)
    compositions.byol_step(model, optimizer, images, m=0.75)
    expected = 0.75 * target + 0.25 * model.f.conv1.weight
    assert torch.allclose(model.f_k.conv1.weight, expected, atol=1e-7)
    assert model.f_k.conv1.weight.grad is None


def test_swavs_loss_is_the_swapped_prediction_of_codes():
    z1, z2 = torch.randn(2, 6, 4)
    prototypes = torch.randn(3, 4)
    unit = [x / x.norm(dim=1, keepdim=True) for x in (z1, z2, prototypes)]
    scores = [unit[0] @ unit[2].T, unit[1] @ unit[2].T]
    codes = []
    for score in scores:
        code = (score / 0.05).exp()
        for _ in range(3):
            for column in range(3):
                total = code[:, column].sum()
                code[:, column] = code[:, column] / total
            for row in range(6):
                code[row] = code[row] / code[row].sum()
        codes.append(code)
    expected = 0
    swapped = ((scores[0], codes[1]), (scores[1], codes[0]))
    for score, code in swapped:
        logs = (score / 0.1).log_softmax(1)
        expected = expected - (code * logs).sum() / 6
    found = compositions.swav_loss(z1, z2, prototypes)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


def test_moco_logos_loss_is_logos_with_infonce_for_its_pairs():
    q, k = torch.randn(4, 5, 8), torch.randn(2, 5, 8)
    l_ll = torch.randn(5)
    queue = torch.nn.functional.normalize(torch.randn(7, 8), dim=1)
    pairs = [moco.info_nce(q[i], k[j], queue, 0.1)
             for i in (2, 3) for j in (0, 1)]
    both = moco.info_nce(q[0], k[1], queue, 0.1)
    both = both + moco.info_nce(q[1], k[0], queue, 0.1)
    expected = both / 2 + sum(pairs) / 4 + 1e-4 * l_ll.mean()
    found = compositions.moco_logo_loss(q, k, l_ll, queue)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
