"""Each loss against loops typed from its paper, its closed forms, low precision, gradients."""

import math

import pytest
import torch

import moco
import simclr
import simsiam
import simsiam_logo

SHAPES = [(2, 3), (5, 8), (16, 128), (33, 7)]
TAUS = [0.05, 0.1, 0.5, 1.0, 2.0]


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def cos(a, b):
    a, b = a.tolist(), b.tolist()
    lengths = math.sqrt(sum(x * x for x in a)), math.sqrt(sum(y * y for y in b))
    return sum(x * y for x, y in zip(a, b)) / lengths[0] / lengths[1]


def naive_nt_xent(z1, z2, tau):
    """SimCLR's Algorithm 1: pairs 2k-1, 2k side by side, l(i, j) by Eq. 1."""
    z = [row for pair in zip(z1, z2) for row in pair]
    total = 0.0
    for k in range(len(z1)):
        for i, j in ((2 * k, 2 * k + 1), (2 * k + 1, 2 * k)):
            below = sum(math.exp(cos(z[i], z[n]) / tau) for n in range(len(z)) if n != i)
            total += -math.log(math.exp(cos(z[i], z[j]) / tau) / below)
    return total / (2 * len(z1))


def naive_info_nce(q, k, queue, tau):
    """MoCo's Eq. 1: one positive, K negatives, the sum over all of them."""
    total = 0.0
    for qi, ki in zip(q, k):
        positive = math.exp(cos(qi, ki) / tau)
        total += -math.log(positive / (positive + sum(math.exp(cos(qi, n) / tau) for n in queue)))
    return total / len(q)


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("shape", SHAPES)
def test_contrastive_losses_equal_the_papers_loops(shape, tau):
    a, b = draw(*shape), draw(*shape, seed=1)
    assert simclr.nt_xent(a, b, tau).item() == pytest.approx(naive_nt_xent(a, b, tau), rel=2e-5)
    queue = torch.nn.functional.normalize(draw(19, shape[1], seed=2), dim=1)
    expected = pytest.approx(naive_info_nce(a, b, queue, tau), rel=2e-5, abs=1e-6)
    assert moco.info_nce(a, b, queue, tau).item() == expected


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("module", [simsiam, simsiam_logo])
def test_neg_cosine_equals_the_papers_loop(module, shape):
    p, z = draw(*shape), draw(*shape, seed=1)
    expected = -sum(cos(a, b) for a, b in zip(p, z)) / len(p)
    assert module.neg_cosine(p, z).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("lam", [0, 0.5])
def test_logo_loss_equals_the_papers_loops(lam):
    """L_gg between the global views, L_lg from each local to each global one, lam of L_ll."""
    p, z = ([draw(5, 8, seed=seed + i) for i in range(4)] for seed in (0, 4))
    l_ll = draw(5, seed=8)

    def d(i, j):
        return -sum(cos(a, b) for a, b in zip(p[i], z[j])) / 5
    expected = (d(0, 1) + d(1, 0)) / 2  # no view predicts itself
    expected += sum(d(local, other) for local in (2, 3) for other in (0, 1)) / 4
    expected += lam * sum(l_ll.tolist()) / 5
    ours = simsiam_logo.logo_loss(p, z, l_ll, lam)
    assert ours.item() == pytest.approx(expected, abs=1e-6) and ours.dtype == torch.float32


def test_what_logo_loss_moves():
    """All predictions and the affinity's logits; targets only without the stop-gradient."""
    p, z = ([draw(5, 8, seed=seed + i).requires_grad_() for i in range(4)] for seed in (0, 4))
    l_ll = draw(5, seed=8).requires_grad_()
    for stop in (True, False):
        loss = simsiam_logo.logo_loss(p, z, l_ll, 0.5, stop)
        grads = torch.autograd.grad(loss, [*p, *z, l_ll], allow_unused=True)
        assert all(grad.abs().max() > 0 for grad in grads[:4])
        assert [grad is None for grad in grads[4:8]] == [stop, stop, True, True]
        assert torch.allclose(grads[8], torch.full((5,), 0.5 / 5))


def test_affinity_loss_equals_logistic_regression():
    pos, neg = draw(9), draw(9, seed=1)
    expected = sum(math.log(1 + math.exp(-v)) for v in pos.tolist()) / 9
    expected += sum(math.log(1 + math.exp(v)) for v in neg.tolist()) / 9
    assert simsiam_logo.affinity_loss(pos, neg).item() == pytest.approx(expected, rel=1e-6)
    assert simsiam_logo.affinity_loss(0 * pos, 0 * neg).item() == pytest.approx(2 * math.log(2))


@pytest.mark.parametrize("b", [2, 7, 64])
def test_closed_forms(b):
    """Equal outputs: log(2B - 1), log(K + 1), -1. This is also what a collapsed network reads."""
    same = torch.ones(b, 16)
    assert simclr.nt_xent(same, same, 0.5).item() == pytest.approx(math.log(2 * b - 1), rel=1e-6)
    queue = torch.full((3 * b, 16), 0.25)  # unit rows, equal to the keys
    ours = moco.info_nce(same, same, queue, 0.1).item()
    assert ours == pytest.approx(math.log(3 * b + 1), rel=1e-6)
    for module in (simsiam, simsiam_logo):
        assert module.neg_cosine(same, 5 * same).item() == pytest.approx(-1)
        assert module.neg_cosine(same, -same).item() == pytest.approx(1)


@pytest.mark.parametrize("tau", [0.1, 0.5])
def test_losses_do_not_see_the_scale(tau):
    a, b = draw(8, 32), draw(8, 32, seed=1)
    queue = torch.nn.functional.normalize(draw(20, 32, seed=2), dim=1)
    for loss, rest in ((simclr.nt_xent, (tau,)), (moco.info_nce, (queue, tau)),
                       (simsiam.neg_cosine, ())):
        plain, scaled = loss(a, b, *rest).item(), loss(7 * a, 0.1 * b, *rest).item()
        assert scaled == pytest.approx(plain, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_finite_and_exact_in_low_precision(dtype):
    """Features times 1000 in 16 bits under autocast: finite, with arithmetic in float32."""
    queue = torch.nn.functional.normalize(draw(40, 64, seed=2), dim=1)
    losses = {simclr.nt_xent: (0.05,), moco.info_nce: (queue, 0.05), simsiam.neg_cosine: ()}
    for loss, rest in losses.items():
        a, b = ((1000 * draw(16, 64, seed=s)).to(dtype).requires_grad_() for s in (0, 1))
        with torch.autocast("cpu", dtype):
            low = loss(a, b, *rest)
        low.backward()
        assert low.dtype == torch.float32 and low.isfinite() and a.grad.isfinite().all()
        full = loss(a.detach().float(), b.detach().float(), *rest)
        assert low.item() == pytest.approx(full.item(), rel=1e-4)
    huge = 1000 * draw(16).to(dtype)
    assert simsiam_logo.affinity_loss(huge, huge).isfinite()


def test_gradients_are_right_in_float64():
    a, b = (draw(4, 6, seed=s, dtype=torch.float64).requires_grad_() for s in (0, 1))
    eye = torch.nn.functional.normalize(draw(5, 6, seed=2, dtype=torch.float64), dim=1)

    def numeric(loss, x, eps=1e-3):
        grad = torch.zeros_like(x)
        for i in range(x.numel()):
            step = torch.zeros(x.numel(), dtype=x.dtype)
            step[i] = eps
            step = step.view_as(x)
            difference = loss(x.detach() + step).double() - loss(x.detach() - step).double()
            grad.view(-1)[i] = difference / (2 * eps)
        return grad

    b = b.detach()
    for loss in (lambda x: simclr.nt_xent(x, b, 0.5), lambda x: simclr.nt_xent(b, x, 0.5),
                 lambda x: moco.info_nce(x, b, eye, 0.5), lambda x: simsiam.neg_cosine(x, b)):
        exact, = torch.autograd.grad(loss(a), a)
        assert (exact - numeric(loss, a)).abs().max() < 1e-3  # losses are float32 inside


def test_no_gradient_reaches_target_key_or_queue():
    p, z = draw(4, 6).requires_grad_(), draw(4, 6, seed=1).requires_grad_()
    queue = torch.nn.functional.normalize(draw(5, 6, seed=2), dim=1)
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
    swapped = pytest.approx(simclr.nt_xent(b, a, 0.5).item(), rel=1e-6)
    assert simclr.nt_xent(a, b, 0.5).item() == swapped


def test_two_batches_of_different_length_are_refused():
    with pytest.raises(ValueError, match=r"z1 \(4, 8\) and z2 \(3, 8\) are not of one batch"):
        simclr.nt_xent(draw(4, 8), draw(3, 8), 0.5)
    with pytest.raises(ValueError):
        moco.momentum_update(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, bias=False), 0.9)
