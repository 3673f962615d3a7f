"""What the four networks compute, what trains what, MoCo's queue and LARS."""

import argparse
import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

import common
import moco
import simclr
import simsiam
import simsiam_logo
from conftest import OWN

small = partial(common.resnet, "resnet18", 1 / 4, "cifar")


def build(module, *flags):
    torch.manual_seed(0)
    args = module.parse_args(["--batch-size", "8", *OWN.get(module.__name__, []), *flags])
    return module.Model(small, args), args


def views(count, size=16):
    return [torch.rand(8, 3, size, size, generator=torch.Generator().manual_seed(i))
            for i in range(count)]


def test_a_copier_needs_no_options(script, monkeypatch):
    """The recipe alone serves Model and augment: parse_args reads the environment, may exit."""
    monkeypatch.setattr(script, "parse_args", lambda *a: pytest.fail("options were read"))
    parser = argparse.ArgumentParser()
    script.add_recipe(parser)
    args = parser.parse_args([])
    x = torch.randint(256, (16, 3, 16, 16), dtype=torch.uint8)
    model = script.Model(small, args)
    outputs = model(*script.augment(x, args))
    first = outputs[0][0] if script in (moco, simsiam_logo) else outputs[0]
    assert first.shape == (16, 128 if script in (simclr, moco) else 2048)
    assert first.isfinite().all() and first.requires_grad
    assert model.f.num_features == 128 and script.Model.sync_bn == (script is not moco)


# ------------------------------------------------------------------------------------------ ResNet
def test_cifar_resnet18_at_width_1():
    f = common.resnet()
    assert sum(p.numel() for p in f.parameters()) == 11_168_832
    maps = {}
    for name in ("layer1", "layer4"):
        getattr(f, name).register_forward_hook(
            lambda m, i, out, name=name: maps.update({name: out.shape[2:]}))
    assert f(torch.zeros(2, 3, 32, 32)).shape == (2, 512) and f.num_features == 512
    assert maps == {"layer1": (32, 32), "layer4": (4, 4)}


@pytest.mark.parametrize("arch", common.ARCHS)
def test_resnet_is_torchvisions_without_fc(arch):
    """The same names and shapes, and the same numbers with the same weights."""
    ours, theirs = common.resnet(arch, 1, "imagenet").eval(), getattr(models, arch)().eval()
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert missing == ["fc.weight", "fc.bias"] and not unexpected
    theirs.fc = nn.Identity()
    x = torch.randn(2, 3, 64, 64)
    assert torch.allclose(ours(x), theirs(x), atol=1e-4)


@pytest.mark.parametrize("width, features", [(0.25, 128), (2, 1024)])
def test_width_multiplies_every_channel(width, features):
    f = common.resnet("resnet18", width)
    assert f(torch.zeros(1, 3, 32, 32)).shape == (1, features)
    assert f.conv1.out_channels == 64 * width


@pytest.mark.parametrize("wrong", [
    ("resnet19", 1, "cifar"), ("resnet18", 0.001, "cifar"), ("resnet18", 1, "stem")])
def test_unknown_backbones_are_refused(wrong):
    with pytest.raises(ValueError):
        common.resnet(*wrong)


# ------------------------------------------------------------------------------------------- heads
def layers(head):
    """Class and sizes of every layer; whether a linear one has a bias, a norm its affine part."""
    out = []
    for m in head:
        sizes = ()
        if isinstance(m, nn.Linear):
            sizes = m.in_features, m.out_features, m.bias is not None
        elif isinstance(m, nn.BatchNorm1d):
            sizes = m.num_features, m.affine
        out.append((type(m).__name__, *sizes))
    return out


@pytest.mark.parametrize("module", [simsiam, simsiam_logo])
def test_simsiam_heads_are_the_official_ones(module):
    """github.com/facebookresearch/simsiam builder.py, two projector layers as in App. D."""
    model = module.Model(partial(common.resnet, "resnet18"), module.parse_args([]))
    assert layers(model.g) == [
        ("Linear", 512, 2048, False), ("BatchNorm1d", 2048, True), ("ReLU",),
        ("Linear", 2048, 2048, False), ("BatchNorm1d", 2048, False)]
    assert layers(model.h) == [
        ("Linear", 2048, 512, False), ("BatchNorm1d", 512, True), ("ReLU",),
        ("Linear", 512, 2048, True)]


@pytest.mark.parametrize("module, flags, expected", [
    (simclr, [], [512, 1024, 128]), (simclr, ["--proj-layers", "3"], [512, 1024, 1024, 128]),
    (moco, [], [512, 512, 128]), (moco, ["--proj-layers", "1"], [512, 128])])
def test_contrastive_heads(module, flags, expected):
    model = module.Model(partial(common.resnet, "resnet18"), module.parse_args(flags))
    linear = [m for m in model.g if isinstance(m, nn.Linear)]
    assert [linear[0].in_features, *(m.out_features for m in linear)] == expected
    assert len(model.g) == 2 * len(linear) - 1 and isinstance(model.g[-1], nn.Linear)


def test_simsiam_outputs_and_stop_gradient():
    model, args = build(simsiam)
    x1, x2 = views(2)
    p1, p2, z1, z2 = model(x1, x2)
    assert p1.shape == p2.shape == z1.shape == z2.shape == (8, 2048)
    loss = simsiam.neg_cosine(p1, z2) / 2 + simsiam.neg_cosine(p2, z1) / 2
    p2, p1, z2, z1 = model(x2, x1)
    swapped = simsiam.neg_cosine(p1, z2) / 2 + simsiam.neg_cosine(p2, z1) / 2
    assert loss.item() == pytest.approx(swapped.item(), abs=1e-6)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# ------------------------------------------------------------------------------------------- MoCo
def test_momentum_update_is_exact():
    f, f_k = nn.Linear(5, 4), nn.Linear(5, 4)
    pairs = zip(f.parameters(), copy.deepcopy(f_k).parameters())
    expected = [0.9 * b + (1 - 0.9) * a for a, b in pairs]
    before = [p.clone() for p in f.parameters()]
    moco.momentum_update(f, f_k, 0.9)
    assert all(torch.allclose(p, e, rtol=0, atol=1e-7) for p, e in zip(f_k.parameters(), expected))
    assert all(p.equal(b) for p, b in zip(f.parameters(), before))


@pytest.mark.parametrize("n, length", [(3, 8), (3, 7), (8, 8), (5, 1), (20, 6), (1, 4)])
def test_queue_is_first_in_first_out(n, length):
    """Any batch and any length, against a list; rows stay unit."""
    queue, ptr = F.normalize(torch.randn(length, 4), dim=1), 0
    rows = list(queue.clone())
    for step in range(12):
        k = torch.randn(n, 4) * 10
        ptr = moco.enqueue(queue, ptr, k)
        rows = (rows + list(F.normalize(k, dim=1)))[-length:]  # the oldest first
        assert torch.equal(queue.roll(-int(ptr), 0), torch.stack(rows))
        assert torch.allclose(queue.norm(dim=1), torch.ones(length))
        assert 0 <= ptr < length


def test_the_pointer_may_be_a_tensor():
    queue, same = torch.zeros(7, 4), torch.zeros(7, 4)
    ptr, number = torch.tensor(0), 0
    for step in range(5):
        k = torch.randn(3, 4)
        ptr, number = moco.enqueue(queue, ptr, k), moco.enqueue(same, number, k)
        assert ptr.item() == number and queue.equal(same)


def test_key_side_starts_equal_and_gets_no_gradient():
    model, args = build(moco, "--bn-splits", "1")
    for ours, keys in ((model.f, model.f_k), (model.g, model.g_k)):
        both = zip(ours.state_dict().values(), keys.state_dict().values(), strict=True)
        assert all(a.equal(b) for a, b in both)
    pairs = model(*views(2))
    assert len(pairs) == 2 and all(q.requires_grad and not k.requires_grad for q, k in pairs)
    sum(moco.info_nce(q, k, model.queue, 0.1) for q, k in pairs).backward()
    assert all(p.grad is None for part in (model.f_k, model.g_k) for p in part.parameters())
    assert all(p.grad is not None for part in (model.f, model.g) for p in part.parameters())
    assert len(build(moco, "--no-symmetric")[0](*views(2))) == 1


def test_forward_has_no_side_effect_on_the_queue():
    model, args = build(moco)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(*views(2))
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert all("running" in name or "num_batches" in name for name in changed)
    after = {name: value.clone() for name, value in model.state_dict().items()}
    model.f.eval()
    model.f(views(1)[0])  # what the kNN monitor does
    assert all(value.equal(after[name]) for name, value in model.state_dict().items())
    assert model.f_k.training


def test_a_keys_statistics_group_is_not_its_querys(monkeypatch):
    """ShuffleBN on one GPU: key 0 shares batch statistics with others than query 0 does."""
    model, args = build(moco, "--bn-splits", "4")
    x = views(1)[0]

    def depends_on(output, x):
        """Which images output 0 depends on, by its gradient."""
        grad, = torch.autograd.grad(output[0].sum(), x)
        return set(grad.flatten(1).abs().sum(1).nonzero()[:, 0].tolist())

    x.requires_grad_()
    query_group = depends_on(model.f(x), x)
    assert query_group == {0, 4}  # part 0 of 4: images 0 and 4
    order = torch.tensor([1.0, 0, 2, 3, 4, 6, 5, 7])
    monkeypatch.setattr(torch, "rand", lambda n, device=None: order)
    with torch.enable_grad():
        key_group = depends_on(moco.Model.key.__wrapped__(model, x), x)
    assert key_group == {0, 6} and key_group != query_group
    monkeypatch.undo()
    # The test bites: in one part, everybody shares statistics, and a shuffle changes nothing.
    whole, _ = build(moco, "--bn-splits", "1")
    assert depends_on(whole.f(x), x) == set(range(8))
    assert torch.allclose(whole.key(x), whole.g_k(whole.f_k(x)), atol=1e-5)
    assert not torch.allclose(model.key(x), model.g_k(model.f_k(x)), atol=1e-3)


def test_split_batch_norm_equals_batch_norm_of_each_part():
    whole, x = nn.BatchNorm2d(6, eps=0.1, momentum=0.3), torch.randn(16, 6, 5, 5)
    with torch.no_grad():
        whole.weight.uniform_(0.5, 2), whole.bias.uniform_(-1, 1), whole.running_mean.fill_(7)
    ours = moco.SplitBatchNorm2d(whole, 4)
    out, parts = ours(x), []
    for i in range(4):
        one = nn.BatchNorm2d(6, eps=0.1, momentum=0.3)
        one.load_state_dict(whole.state_dict())
        assert torch.allclose(out[i::4], one(x[i::4]), atol=1e-5)
        parts.append(one)
    for name in ("running_mean", "running_var"):
        mean = torch.stack([getattr(part, name) for part in parts]).mean(0)
        assert torch.allclose(getattr(ours, name), mean, atol=1e-6)
    whole.load_state_dict(ours.state_dict())
    assert torch.equal(ours.eval()(x), whole.eval()(x))
    with pytest.raises(RuntimeError):  # 14 images have no 4 equal parts
        ours.train()(x[:14])


# ------------------------------------------------------------------------------------------- LoGo
def test_what_trains_what():
    """Omega moves the affinity alone, L_ll the encoder alone: no gradient for the affinity."""
    model, args = build(simsiam_logo)
    encoder = [*model.f.parameters(), *model.g.parameters()]
    affinity = [*model.affinity.parameters()]

    def moved(loss, params):
        grads = torch.autograd.grad(loss, params, allow_unused=True, retain_graph=True)
        return [g is not None and g.abs().max() > 0 for g in grads]

    p, z, l_ll, pos, neg = model(*views(4))
    assert torch.equal(l_ll, pos)  # one function, two routes
    assert all(moved(l_ll.mean(), encoder)) and not any(moved(l_ll.mean(), affinity))
    omega = simsiam_logo.affinity_loss(pos, neg)
    assert all(moved(omega, affinity)) and not any(moved(omega, [*encoder, *model.h.parameters()]))
    l_lg = simsiam_logo.neg_cosine(p[2], z[0])
    assert all(moved(l_lg, [*model.h.parameters(), *encoder])) and not any(moved(l_lg, affinity))


@pytest.mark.parametrize("b", [2, 7, 8])
def test_negative_pairs_never_join_an_image_with_itself(b):
    """Odd batches too: the batch reversed would pair the middle image with itself."""
    rows = torch.arange(b)
    assert (rows.roll(1, 0) != rows).all()
    model, _ = build(simsiam_logo)
    seen = []
    model.affinity.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    _, z, *_ = model(*(x[:b] for x in views(4)))
    _, pos, neg = seen
    assert torch.equal(pos, torch.cat([z[2], z[3]], 1))
    assert torch.equal(neg, torch.cat([z[2], z[3].roll(1, 0)], 1))


def test_local_views_may_be_smaller():
    args = simsiam_logo.parse_args(["--local-size", "8"])
    x = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    assert [v.shape[3] for v in simsiam_logo.augment(x, args)] == [16, 16, 8, 8]
    x = torch.zeros(2, 3, 224, 224, dtype=torch.uint8)
    views = simsiam_logo.augment(x, simsiam_logo.parse_args([]))
    assert [v.shape[3] for v in views] == [224, 224, 96, 96]


# ------------------------------------------------------------------------------------------- LARS
def naive_lars(w, g, v, lr, momentum, decay, trust=1e-3):
    """You et al., Alg. 1, the norm of the decayed gradient as in google-research/simclr."""
    if w.ndim > 1:
        g = g + decay * w
        local = trust * w.norm() / g.norm() if w.norm() > 0 and g.norm() > 0 else 1.0
    else:
        local = 1.0
    v = momentum * v + lr * local * g
    return w - v, v


def test_lars_equals_its_algorithm_over_steps():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        net[3].weight.zero_()  # no norm, no adaptation
    optimizer = simclr.LARS(net.parameters(), 0.3, 0.9, 1e-2)
    ours = [p.detach().double() for p in net.parameters()]
    speed = [torch.zeros_like(p) for p in ours]
    for step in range(8):
        lr = 0.3 * (step + 1) / 8  # a schedule: the rate belongs inside the momentum
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        net(torch.randn(5, 3, 3, 3)).square().sum().backward()
        state = [naive_lars(w, p.grad.double(), v, lr, 0.9, 1e-2)
                 for w, p, v in zip(ours, net.parameters(), speed)]
        ours, speed = [list(s) for s in zip(*state)]
        optimizer.step()
        for w, p in zip(ours, net.parameters()):
            assert torch.allclose(w.float(), p, rtol=1e-4, atol=1e-6)


def test_one_dimensional_parameters_get_no_decay_from_lars():
    for shape, moves in (((4,), False), ((4, 4), True)):
        p = nn.Parameter(torch.ones(shape))
        p.grad = torch.zeros(shape)
        simclr.LARS([p], 1.0, 0.9, 0.1).step()
        assert bool((p != 1).any()) == moves
