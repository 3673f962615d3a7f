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
from conftest import METHODS, OWN

small = partial(common.resnet, "resnet18", 1 / 4, "cifar")


def build(module, *flags, backbone=small):
    """A method's Model of a small backbone, for batches of eight."""
    torch.manual_seed(0)
    argv = ["--batch-size", "8", *OWN[module.__name__], *flags]
    return module.Model(backbone, module.parse_args(argv))


def random_views(count, size=16):
    """Random images (8, 3, size, size), as many times as there are views."""
    generators = (torch.Generator().manual_seed(seed) for seed in range(count))
    return [torch.rand(8, 3, size, size, generator=draw) for draw in generators]


def copied_state(model):
    """Copies of all parameters and buffers, by name."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal_states(a, b):
    """Two modules have the same names and values in their state."""
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    assert all(value.equal(b[name]) for name, value in a.items())


def test_the_recipe_alone_serves_model_and_augment(script, monkeypatch):
    """In another project nothing may call parse_args, which reads the environment and exits."""
    monkeypatch.setattr(script, "parse_args", lambda *a: pytest.fail("options were read"))
    parser = argparse.ArgumentParser()
    script.add_recipe(parser)
    args = parser.parse_args([])
    x = torch.randint(256, (16, 3, 16, 16), dtype=torch.uint8)
    model = script.Model(small, args)
    first = model(*script.augment(x, args))
    while not torch.is_tensor(first):  # tuples of outputs, pairs of a query and its key
        first = first[0]
    method = METHODS[script.__name__]
    assert first.shape == (16, method["width"])
    assert first.isfinite().all() and first.requires_grad
    assert model.f.num_features == 128
    assert script.Model.sync_bn == method["sync_bn"]


# ----------------------------------------------------------------------------------------- ResNet
def test_cifar_resnet18_at_width_1():
    f = common.resnet()
    assert sum(p.numel() for p in f.parameters()) == 11_168_832
    sizes = []
    for layer in (f.layer1, f.layer4):
        layer.register_forward_hook(lambda module, x, out: sizes.append(out.shape[2:]))
    assert f(torch.zeros(2, 3, 32, 32)).shape == (2, 512)
    assert f.num_features == 512
    assert sizes == [(32, 32), (4, 4)]


@pytest.mark.parametrize("arch", common.ARCHS)
def test_resnet_is_torchvisions_without_fc(arch):
    """The same names and shapes, and the same numbers with the same weights."""
    ours = common.resnet(arch, 1, "imagenet").eval()
    theirs = getattr(models, arch)().eval()
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


@pytest.mark.parametrize("wrong", [("resnet19", 1, "cifar"), ("resnet18", 1, "stem")])
def test_unknown_backbones_are_refused(wrong):
    with pytest.raises(KeyError):
        common.resnet(*wrong)


# ------------------------------------------------------------------------------------------ heads
def layers(head):
    """Class and sizes of every layer; whether a linear one has a bias, a norm its affine part."""
    out = []
    for layer in head:
        about = [type(layer).__name__]
        if isinstance(layer, nn.Linear):
            about += [layer.in_features, layer.out_features, layer.bias is not None]
        elif isinstance(layer, nn.BatchNorm1d):
            about += [layer.num_features, layer.affine]
        out.append(tuple(about))
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


@pytest.mark.parametrize("module, number, expected", [
    (simclr, "2", [512, 1024, 128]),
    (simclr, "3", [512, 1024, 1024, 128]),
    (moco, "2", [512, 512, 128]),
    (moco, "1", [512, 128])])
def test_heads_of_simclr_and_moco(module, number, expected):
    args = module.parse_args(["--proj-layers", number])
    assert module.parse_args([]).proj_layers == 2
    model = module.Model(partial(common.resnet, "resnet18"), args)
    linear, between = [*model.g][::2], [*model.g][1::2]
    assert {type(layer) for layer in linear} == {nn.Linear}
    assert all(isinstance(layer, nn.ReLU) for layer in between)
    widths = [linear[0].in_features, *(layer.out_features for layer in linear)]
    assert widths == expected


def test_simsiam_outputs_do_not_depend_on_the_order_of_views():
    model = build(simsiam)
    x1, x2 = random_views(2)
    p1, p2, z1, z2 = model(x1, x2)
    assert p1.shape == p2.shape == z1.shape == z2.shape == (8, 2048)
    loss = simsiam.neg_cosine(p1, z2) / 2 + simsiam.neg_cosine(p2, z1) / 2
    p2, p1, z2, z1 = model(x2, x1)
    swapped = simsiam.neg_cosine(p1, z2) / 2 + simsiam.neg_cosine(p2, z1) / 2
    assert loss.item() == pytest.approx(swapped.item(), abs=1e-6)
    loss.backward()
    grads = [p.grad for p in model.parameters()]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)


# ------------------------------------------------------------------------------------------- MoCo
def test_momentum_update_is_exact():
    f, f_k = nn.Linear(5, 4), nn.Linear(5, 4)
    pairs = zip(f.parameters(), copy.deepcopy(f_k).parameters())
    expected = [0.9 * p_k + (1 - 0.9) * p for p, p_k in pairs]
    before = [p.clone() for p in f.parameters()]
    moco.momentum_update(f, f_k, 0.9)
    for p_k, right in zip(f_k.parameters(), expected):
        assert torch.allclose(p_k, right, rtol=0, atol=1e-7)
    assert all(map(torch.equal, f.parameters(), before))


@pytest.mark.parametrize("n", [1, 3, 20])
@pytest.mark.parametrize("length", [1, 7, 20])
def test_queue_is_first_in_first_out(n, length):
    """Any batch and any length, against a list; rows stay unit vectors."""
    queue, ptr = F.normalize(torch.randn(length, 4), dim=1), 0
    rows = list(queue.clone())
    for _ in range(24):
        k = torch.randn(n, 4) * 10
        ptr = moco.enqueue(queue, ptr, k)
        rows = (rows + list(F.normalize(k, dim=1)))[-length:]  # the oldest first
        assert torch.equal(queue.roll(-int(ptr), 0), torch.stack(rows))
        assert torch.allclose(queue.norm(dim=1), torch.ones(length))
        assert 0 <= ptr < length


def test_the_pointer_may_be_a_tensor():
    queue, same = torch.zeros(7, 4), torch.zeros(7, 4)
    ptr, number = torch.tensor(0), 0
    for _ in range(5):
        k = torch.randn(3, 4)
        ptr = moco.enqueue(queue, ptr, k)
        number = moco.enqueue(same, number, k)
        assert ptr.item() == number and queue.equal(same)


def test_the_key_encoder_starts_equal_and_gets_no_gradient():
    model = build(moco, "--bn-splits", "1")
    assert_equal_states(model.f, model.f_k)
    assert_equal_states(model.g, model.g_k)
    pairs = model(*random_views(2))
    assert [(q.requires_grad, k.requires_grad) for q, k in pairs] == 2 * [(True, False)]
    loss = sum(moco.info_nce(q, k, model.queue, 0.1) for q, k in pairs)
    loss.backward()
    keys = [*model.f_k.parameters(), *model.g_k.parameters()]
    queries = [*model.f.parameters(), *model.g.parameters()]
    assert all(p.grad is None for p in keys)
    assert all(p.grad is not None for p in queries)


def test_only_the_symmetric_loss_has_two_pairs():
    model = build(moco, "--no-symmetric")
    assert len(model(*random_views(2))) == 1


def test_forward_changes_nothing_but_running_statistics():
    model = build(moco)
    before = copied_state(model)
    model(*random_views(2))
    after = copied_state(model)
    changed = [name for name, value in after.items() if not value.equal(before[name])]
    assert changed
    assert all("running" in name for name in changed)
    model.f.eval()
    model.f(*random_views(1))  # what the kNN monitor does
    assert all(value.equal(after[name]) for name, value in model.state_dict().items())
    assert model.f_k.training


def depends_on(output, x):
    """The numbers of the images on which output 0 depends, by its gradient."""
    grad, = torch.autograd.grad(output[0].sum(), x)
    sizes = grad.flatten(1).abs().sum(1)
    return set(sizes.nonzero().flatten().tolist())


def test_a_key_shares_statistics_with_other_images_than_its_query(monkeypatch):
    """ShuffleBN on one GPU; the network computes keys of the batch in another order."""
    model, x = build(moco, "--bn-splits", "4"), random_views(1)[0]
    x.requires_grad_()
    assert depends_on(model.f(x), x) == {0, 1}  # part 0 of 4: images 0 and 1
    order = torch.tensor([0.0, 6, 2, 3, 4, 5, 1, 7])
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", lambda n, device=None: order)
        key = moco.Model.key.__wrapped__(model, x)  # with gradient
    assert depends_on(key, x) == {0, 6}
    unshuffled = model.g_k(model.f_k(x))
    assert not torch.allclose(model.key(x), unshuffled, atol=1e-3)


def test_without_splits_a_shuffle_changes_nothing():
    """All images share their statistics: so the test above can fail."""
    model, x = build(moco, "--bn-splits", "1"), random_views(1)[0]
    x.requires_grad_()
    assert depends_on(model.f(x), x) == set(range(8))
    unshuffled = model.g_k(model.f_k(x))
    assert torch.allclose(model.key(x), unshuffled, atol=1e-5)


def random_batch_norm():
    """A batch norm with settings, weights and statistics of its own."""
    norm = nn.BatchNorm2d(6, eps=0.1, momentum=0.3)
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.uniform_(norm.bias, -1, 1)
    norm.running_mean.fill_(7)
    return norm


def test_split_batch_norm_equals_batch_norm_of_each_part():
    whole, x = random_batch_norm(), torch.randn(16, 6, 5, 5)
    ours = moco.SplitBatchNorm2d(whole, 4)
    parts = []
    for out, images in zip(ours(x).chunk(4), x.chunk(4)):
        part = copy.deepcopy(whole)
        assert torch.allclose(out, part(images), atol=1e-5)
        parts.append(part)
    for name in ("running_mean", "running_var"):
        mean = torch.stack([getattr(part, name) for part in parts]).mean(0)
        assert torch.allclose(getattr(ours, name), mean, atol=1e-6)
    whole.load_state_dict(ours.state_dict())
    assert torch.equal(ours.eval()(x), whole.eval()(x))


def test_split_batch_norm_refuses_parts_of_different_sizes():
    norm = moco.SplitBatchNorm2d(nn.BatchNorm2d(6), 4)
    for images in (6, 9, 14):  # 6 and 9 images make three equal parts, not four
        with pytest.raises(RuntimeError):
            norm(torch.randn(images, 6, 5, 5))


def test_split_batch_norm_keeps_channels_last():
    norm, x = moco.SplitBatchNorm2d(nn.BatchNorm2d(6), 4), torch.randn(16, 6, 5, 5)
    out = norm(x.to(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)


class BatchNormWithActivation(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: splitting would lose the ReLU."""

    def forward(self, x):
        return super().forward(x).relu()


def backbone_with(norm):
    """A function that makes a small backbone with a norm of four channels."""
    def make():
        first, block = nn.Conv2d(3, 4, 3, 2), nn.Sequential(nn.ReLU(), norm)
        f = nn.Sequential(first, block, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        f.num_features = 4
        return f
    return make


@pytest.mark.parametrize("norm", [
    BatchNormWithActivation(4),
    nn.SyncBatchNorm(4),
    nn.BatchNorm2d(4, affine=False),
    nn.BatchNorm2d(4, momentum=None),
    nn.BatchNorm2d(4, track_running_stats=False)])
def test_norms_that_cannot_be_split_are_refused_by_name(norm):
    words = rf"1\.1.*{type(norm).__name__}.*--bn-splits 1"
    with pytest.raises(ValueError, match=words):
        build(moco, "--bn-splits", "2", backbone=backbone_with(norm))
    model = build(moco, "--bn-splits", "1", backbone=backbone_with(norm))
    assert model.f[1][1] is norm  # as it was


def test_several_gpus_leave_split_batch_norm_as_it_is():
    """SyncBatchNorm would give all images of a batch the same statistics."""
    model = build(moco, "--bn-splits", "2")
    before = [type(module) for module in model.modules()]
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert [type(module) for module in model.modules()] == before
    assert before.count(moco.SplitBatchNorm2d) == 2 * 20
    assert nn.SyncBatchNorm not in before


def mobilenet():
    """torchvision's MobileNetV3 as a backbone; its batch norms have settings of their own."""
    f = models.mobilenet_v3_small()
    f.num_features, f.classifier = f.classifier[0].in_features, nn.Identity()
    return f


def test_splitting_keeps_the_features_and_settings_of_a_backbone():
    model = build(moco, "--bn-splits", "2", backbone=mobilenet)
    model(*random_views(2, 64))  # weights and statistics are no longer those of the start
    plain = mobilenet()
    plain.load_state_dict(model.f.state_dict())
    x, = random_views(1, 64)
    assert torch.allclose(model.f.eval()(x), plain.eval()(x), atol=1e-6)
    ours = dict(model.f.named_modules())
    norms = [name for name, module in plain.named_modules() if type(module) is nn.BatchNorm2d]
    for name in norms:
        assert type(ours[name]) is moco.SplitBatchNorm2d
        assert (ours[name].eps, ours[name].momentum) == (0.001, 0.01)
    assert len(norms) == 34


# ------------------------------------------------------------------------------------------- LoGo
def test_the_affinity_is_a_small_network_of_pairs():
    """Its parameters have the names of its layers, so that older checkpoints can be read."""
    torch.manual_seed(0)
    ours = simsiam_logo.Affinity(8)
    torch.manual_seed(0)
    expected = nn.Sequential(
        nn.Linear(16, 256), nn.ReLU(),
        nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1))
    assert_equal_states(ours, expected)
    assert [*ours.state_dict()] == [
        "0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]
    x = torch.randn(5, 16)
    assert ours(x).equal(expected(x)) and ours(x).shape == (5, 1)
    state = build(simsiam_logo).state_dict()
    names = [name for name in state if name.startswith("affinity.")]
    assert names == [f"affinity.{name}" for name in ours.state_dict()]
    assert state["affinity.0.weight"].shape == (256, 2 * 2048)


def trained_by(loss, parameters):
    """Of each parameter, whether the loss has a gradient for it."""
    grads = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return [grad is not None and bool(grad.abs().max() > 0) for grad in grads]


def test_omega_trains_the_affinity_alone_and_l_ll_the_encoder_alone():
    model = build(simsiam_logo)
    encoder = [*model.f.parameters(), *model.g.parameters()]
    predictor = [*model.h.parameters()]
    affinity = [*model.affinity.parameters()]
    p, z, l_ll, pos, neg = model(*random_views(4))
    assert torch.equal(l_ll, pos)  # the same numbers, with gradients for others
    assert all(trained_by(l_ll.mean(), encoder))
    assert not any(trained_by(l_ll.mean(), affinity + predictor))
    omega = simsiam_logo.affinity_loss(pos, neg)
    assert all(trained_by(omega, affinity))
    assert not any(trained_by(omega, encoder + predictor))
    l_lg = simsiam_logo.neg_cosine(p[2], z[0])
    assert all(trained_by(l_lg, encoder + predictor))
    assert not any(trained_by(l_lg, affinity))


@pytest.mark.parametrize("b", [2, 7, 8])
def test_negative_pairs_never_join_an_image_with_itself(b):
    """Odd batches too: the batch reversed would pair the middle image with itself."""
    rows = torch.arange(b)
    assert (rows.roll(1, 0) != rows).all()
    model, seen = build(simsiam_logo), []
    model.affinity.register_forward_pre_hook(lambda module, x: seen.append(x[0]))
    _, z, *_ = model(*(x[:b] for x in random_views(4)))
    _, pos, neg = seen
    zl1, zl2 = z[2:]
    assert pos.equal(torch.cat([zl1, zl2], 1))
    assert neg.equal(torch.cat([zl1, zl2.roll(1, 0)], 1))


@pytest.mark.parametrize("size, flags, expected", [
    (16, ["--local-size", "8"], [16, 16, 8, 8]),
    (64, [], [64, 64, 64, 64]),
    (224, [], [224, 224, 96, 96])])
def test_local_views_may_be_smaller(size, flags, expected):
    x = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    views = simsiam_logo.augment(x, simsiam_logo.parse_args(flags))
    assert [view.shape[3] for view in views] == expected


# ------------------------------------------------------------------------------------------- LARS
def naive_lars(w, g, v, lr, momentum, decay, trust=1e-3):
    """You et al., Alg. 1, the norm of the decayed gradient as in google-research/simclr."""
    local = 1.0
    if w.ndim > 1:
        g = g + decay * w
        if w.norm() > 0 and g.norm() > 0:
            local = trust * w.norm() / g.norm()
    v = momentum * v + lr * local * g
    return w - v, v


def test_lars_equals_its_algorithm_over_steps():
    torch.manual_seed(0)
    first, last = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
    net = nn.Sequential(first, nn.BatchNorm2d(4), nn.Flatten(), last)
    nn.init.zeros_(last.weight)  # no norm, no adaptation
    optimizer = simclr.LARS(net.parameters(), 0.3, 0.9, 1e-2)
    expected = [p.detach().double() for p in net.parameters()]
    velocity = [torch.zeros_like(p) for p in expected]
    for step in range(8):
        lr = 0.3 * (step + 1) / 8  # a schedule: the rate belongs inside the momentum
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        net(torch.randn(5, 3, 3, 3)).square().sum().backward()
        for i, p in enumerate(net.parameters()):
            expected[i], velocity[i] = naive_lars(
                expected[i], p.grad.double(), velocity[i], lr, 0.9, 1e-2)
        optimizer.step()
        for right, p in zip(expected, net.parameters()):
            assert torch.allclose(right.float(), p, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape, decays", [((4,), False), ((4, 4), True)])
def test_one_dimensional_parameters_get_no_decay_from_lars(shape, decays):
    p = nn.Parameter(torch.ones(shape))
    p.grad = torch.zeros(shape)
    simclr.LARS([p], 1.0, 0.9, 0.1).step()
    assert bool((p != 1).any()) == decays
