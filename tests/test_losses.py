"""Each loss against loops typed from its paper, its closed forms, low precision, gradients."""

import math

import pytest
import torch
from torch.nn import functional as F

import moco
import simclr
import simsiam
import simsiam_logo

SHAPES = [(2, 3), (5, 8), (16, 128), (33, 7)]
TAUS = [0.05, 0.1, 0.5, 1.0, 2.0]


def draw(*shape, seed=0, dtype=torch.float32):
    """Random normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype)


def unit_rows(*shape, dtype=torch.float32):
    """Random unit vectors, as in MoCo's queue."""
    return F.normalize(draw(*shape, seed=2, dtype=dtype), dim=1)


def four_views(seed):
    """Random outputs (5, 8) of LoGo's four views."""
    return [draw(5, 8, seed=seed + number) for number in range(4)]


def cos(a, b):
    """The cosine of two vectors, by sums."""
    a, b = a.tolist(), b.tolist()
    dot = sum(x * y for x, y in zip(a, b))
    return dot / math.hypot(*a) / math.hypot(*b)


def naive_nt_xent(z1, z2, tau):
    """SimCLR's Algorithm 1: pairs 2k-1, 2k side by side, l(i, j) by Eq. 1."""
    z = [row for pair in zip(z1, z2) for row in pair]
    total = 0.0
    for i, row in enumerate(z):
        partner = i + 1 if i % 2 == 0 else i - 1
        others = [other for n, other in enumerate(z) if n != i]
        below = sum(math.exp(cos(row, other) / tau) for other in others)
        above = math.exp(cos(row, z[partner]) / tau)
        total -= math.log(above / below)
    return total / len(z)


def naive_info_nce(q, k, queue, tau):
    """MoCo's Eq. 1: one positive, K negatives, the sum over all of them."""
    total = 0.0
    for query, key in zip(q, k):
        positive = math.exp(cos(query, key) / tau)
        negatives = sum(math.exp(cos(query, other) / tau) for other in queue)
        total -= math.log(positive / (positive + negatives))
    return total / len(q)


def naive_logo_loss(p, z, l_ll, lam, pair_loss):
    """L_gg between the global views, L_lg from each local to each global one, lam of L_ll."""
    l_gg = pair_loss(p[0], z[1]) + pair_loss(p[1], z[0])  # no view predicts itself
    total = l_gg / 2
    for local in (2, 3):
        for other in (0, 1):
            total += pair_loss(p[local], z[other]) / 4
    return total + lam * sum(l_ll) / len(l_ll)


def mean_negative_cosine(p, z):
    """SimSiam's Eq. 1, by a loop."""
    return -sum(cos(a, b) for a, b in zip(p, z)) / len(p)


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("shape", SHAPES)
def test_contrastive_losses_equal_the_papers_loops(shape, tau):
    a, b = draw(*shape), draw(*shape, seed=1)
    expected = pytest.approx(naive_nt_xent(a, b, tau), rel=2e-5)
    assert simclr.nt_xent(a, b, tau).item() == expected
    queue = unit_rows(19, shape[1])
    expected = pytest.approx(naive_info_nce(a, b, queue, tau), rel=2e-5, abs=1e-6)
    assert moco.info_nce(a, b, queue, tau).item() == expected


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("module", [simsiam, simsiam_logo])
def test_neg_cosine_equals_the_papers_loop(module, shape):
    p, z = draw(*shape), draw(*shape, seed=1)
    expected = pytest.approx(mean_negative_cosine(p, z), abs=1e-6)
    assert module.neg_cosine(p, z).item() == expected


@pytest.mark.parametrize("lam", [0, 0.5])
def test_logo_loss_equals_the_papers_loops(lam):
    p, z, l_ll = four_views(0), four_views(4), draw(5, seed=8)
    expected = naive_logo_loss(p, z, l_ll.tolist(), lam, mean_negative_cosine)
    ours = simsiam_logo.logo_loss(p, z, l_ll, lam)
    assert ours.item() == pytest.approx(expected, abs=1e-6)
    assert ours.dtype == torch.float32


def test_logo_loss_takes_another_loss_of_two_views():
    """MoCo-LoGo, for example; a loss whose arguments cannot be swapped shows their order."""
    def pair_loss(p, z):
        return (p.square() * z).mean()

    p, z, l_ll = four_views(0), four_views(4), draw(5, seed=8)
    expected = naive_logo_loss(p, z, l_ll, 0.5, pair_loss)
    ours = simsiam_logo.logo_loss(p, z, l_ll, 0.5, pair_loss)
    swapped = simsiam_logo.logo_loss(z, p, l_ll, 0.5, pair_loss)
    assert ours.item() == pytest.approx(expected.item(), abs=1e-6)
    assert swapped.item() != pytest.approx(expected.item(), abs=1e-3)


@pytest.mark.parametrize("stop", [True, False])
def test_gradients_of_logo_loss(stop):
    """All predictions and the affinity's logits; targets only without the stop-gradient."""
    p = [x.requires_grad_() for x in four_views(0)]
    z = [x.requires_grad_() for x in four_views(4)]
    l_ll = draw(5, seed=8).requires_grad_()

    def pair_loss(p, z):
        return simsiam_logo.neg_cosine(p, z, stop)

    loss = simsiam_logo.logo_loss(p, z, l_ll, 0.5, pair_loss)
    grads = torch.autograd.grad(loss, [*p, *z, l_ll], allow_unused=True)
    assert all(grad.abs().max() > 0 for grad in grads[:4])
    assert [grad is None for grad in grads[4:8]] == [stop, stop, True, True]
    assert torch.allclose(grads[8], torch.full((5,), 0.5 / 5))


def test_affinity_loss_equals_logistic_regression():
    pos, neg = draw(9), draw(9, seed=1)
    expected = sum(math.log(1 + math.exp(-v)) for v in pos.tolist()) / 9
    expected += sum(math.log(1 + math.exp(v)) for v in neg.tolist()) / 9
    ours = simsiam_logo.affinity_loss(pos, neg)
    assert ours.item() == pytest.approx(expected, rel=1e-6)
    chance = simsiam_logo.affinity_loss(0 * pos, 0 * neg)
    assert chance.item() == pytest.approx(2 * math.log(2))


@pytest.mark.parametrize("b", [2, 7, 64])
def test_losses_of_equal_outputs(b):
    """log(2B - 1), log(K + 1), -1. This is also what a collapsed network reads."""
    same = torch.ones(b, 16)
    ours = simclr.nt_xent(same, same, 0.5).item()
    assert ours == pytest.approx(math.log(2 * b - 1), rel=1e-6)
    queue = torch.full((3 * b, 16), 0.25)  # unit rows, equal to the keys
    ours = moco.info_nce(same, same, queue, 0.1).item()
    assert ours == pytest.approx(math.log(3 * b + 1), rel=1e-6)
    for module in (simsiam, simsiam_logo):
        assert module.neg_cosine(same, 5 * same).item() == pytest.approx(-1)
        assert module.neg_cosine(same, -same).item() == pytest.approx(1)


@pytest.mark.parametrize("tau", [0.1, 0.5])
def test_losses_do_not_depend_on_the_length_of_outputs(tau):
    a, b, queue = draw(8, 32), draw(8, 32, seed=1), unit_rows(20, 32)
    losses = {simclr.nt_xent: (tau,), moco.info_nce: (queue, tau), simsiam.neg_cosine: ()}
    for loss, rest in losses.items():
        plain = loss(a, b, *rest).item()
        scaled = loss(7 * a, 0.1 * b, *rest).item()
        assert scaled == pytest.approx(plain, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_finite_and_exact_in_low_precision(dtype):
    """Features times 1000 in 16 bits under autocast: finite, with arithmetic in float32."""
    queue = unit_rows(40, 64)
    losses = {simclr.nt_xent: (0.05,), moco.info_nce: (queue, 0.05), simsiam.neg_cosine: ()}
    for loss, rest in losses.items():
        a = (1000 * draw(16, 64)).to(dtype).requires_grad_()
        b = (1000 * draw(16, 64, seed=1)).to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype):
            low = loss(a, b, *rest)
        low.backward()
        assert low.dtype == torch.float32
        assert low.isfinite() and a.grad.isfinite().all()
        full = loss(a.detach().float(), b.detach().float(), *rest)
        assert low.item() == pytest.approx(full.item(), rel=1e-4)
    huge = 1000 * draw(16).to(dtype)
    assert simsiam_logo.affinity_loss(huge, huge).isfinite()


def numeric_gradient(loss, x, eps=1e-3):
    """The gradient by differences, one number of x after the other."""
    grad = torch.zeros_like(x)
    for i in range(x.numel()):
        step = torch.zeros(x.numel(), dtype=x.dtype)
        step[i] = eps
        step = step.view_as(x)
        above, below = loss(x.detach() + step), loss(x.detach() - step)
        grad.view(-1)[i] = (above.double() - below.double()) / (2 * eps)
    return grad


@pytest.mark.parametrize("loss", [
    lambda a, b, queue: simclr.nt_xent(a, b, 0.5),
    lambda a, b, queue: simclr.nt_xent(b, a, 0.5),
    lambda a, b, queue: moco.info_nce(a, b, queue, 0.5),
    lambda a, b, queue: simsiam.neg_cosine(a, b)])
def test_gradients_equal_differences(loss):
    a = draw(4, 6, dtype=torch.float64).requires_grad_()
    b = draw(4, 6, seed=1, dtype=torch.float64)
    queue = unit_rows(5, 6, dtype=torch.float64)

    def of_a(x):
        return loss(x, b, queue)

    exact, = torch.autograd.grad(of_a(a), a)
    error = exact - numeric_gradient(of_a, a)
    assert error.abs().max() < 1e-3  # losses are float32 inside


def test_no_gradient_reaches_targets_and_keys():
    p, z = draw(4, 6).requires_grad_(), draw(4, 6, seed=1).requires_grad_()
    queue = unit_rows(5, 6)
    for loss in (simsiam.neg_cosine(p, z), simsiam_logo.neg_cosine(p, z),
                 moco.info_nce(p, z, queue, 0.1)):
        grad_p, grad_z = torch.autograd.grad(loss, (p, z), allow_unused=True)
        assert grad_p.abs().max() > 0 and grad_z is None
    free = simsiam.neg_cosine(p, z, stop_gradient=False)
    assert torch.autograd.grad(free, z)[0].abs().max() > 0
    both = torch.autograd.grad(simclr.nt_xent(p, z, 0.5), (p, z))
    assert all(grad.abs().max() > 0 for grad in both)


def test_swapping_the_views_changes_nothing():
    a, b = draw(8, 16), draw(8, 16, seed=1)
    plain, swapped = simclr.nt_xent(a, b, 0.5), simclr.nt_xent(b, a, 0.5)
    assert plain.item() == pytest.approx(swapped.item(), rel=1e-6)


def test_outputs_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"z1 \(4, 8\) and z2 \(3, 8\) differ in shape"):
        simclr.nt_xent(draw(4, 8), draw(3, 8), 0.5)


def test_momentum_update_of_different_networks_is_refused():
    f, f_k = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, bias=False)
    with pytest.raises(ValueError):
        moco.momentum_update(f, f_k, 0.9)
