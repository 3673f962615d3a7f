"""BYOL, SwAV and MoCo-LoGo, built from the parts of the four scripts by import.

A method is a subclass of a script's Model, a loss of tensors, and a step, which trains the
model on the views of one batch. With the project's folder and tests/ in `sys.path`:

    import argparse
    import torch
    from functools import partial
    import simsiam
    from common import draw_shapes, normalize, resnet
    from compositions import BYOL, byol_step
    parser = argparse.ArgumentParser()
    simsiam.add_recipe(parser)
    args = parser.parse_args([])  # the defaults of SimSiam
    model = BYOL(partial(resnet, "resnet18", width=0.25), args)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    images, _ = draw_shapes(128, size=16)  # yours: uint8 (N, 3, H, W)
    mean = std = torch.full((3,), 0.5)
    for x in images.split(64):
        views = [normalize(view, mean, std) for view in simsiam.augment(x, args)]
        loss = byol_step(model, optimizer, views, m=0.99)

For a script with flags, log and checkpoints, copy the one that the Model comes from: the loss
belongs in its section 3, the subclass in section 4, and the lines of the step in the fences of
`train`. Numbers in brackets and after "Eq." are those of the method's paper.
"""

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import moco
import simclr
import simsiam
import simsiam_logo


def descend(loss, optimizer):
    """One optimizer step down the gradient of a loss."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


# ----------------------------------------------------------------------------------- BYOL
class BYOL(simsiam.Model):
    """SimSiam's f, g, h and a target network f_k, g_k, which follows f, g [2006.07733].

    base_encoder, args: as for SimSiam, whose widths the heads have, too
    """

    def __init__(self, base_encoder, args):
        super().__init__(base_encoder, args)
        self.f_k, self.g_k = copy.deepcopy(self.f), copy.deepcopy(self.g)
        self.f_k.requires_grad_(False)  # no gradient, only Eq. 4
        self.g_k.requires_grad_(False)

    def forward(self, x1, x2):
        """Views (B, 3, H, W) to p1, p2 and to the target's projections k1, k2 (B, 2048)."""
        p1, p2, _, _ = super().forward(x1, x2)
        k1, k2 = self.g_k(self.f_k(x1)), self.g_k(self.f_k(x2))
        return p1, p2, k1, k2

    def update(self, m):
        """theta_k = m theta_k + (1 - m) theta, Eq. 4, after every optimizer step (Eq. 3)."""
        moco.momentum_update(self.f, self.f_k, m)
        moco.momentum_update(self.g, self.g_k, m)


def byol_loss(p1, p2, k1, k2):
    """The squared distance of unit vectors, Eq. 2, in both directions: in [0, 8]."""
    loss = 2 + 2 * simsiam.neg_cosine(p1, k2)  # 2 - 2 cosine
    return loss + 2 + 2 * simsiam.neg_cosine(p2, k1)  # the same with swapped views


def byol_step(model, optimizer, views, m=0.996):
    """Train on two views of a batch; returns the loss. The paper raises m to 1."""
    loss = byol_loss(*model(*views))
    descend(loss, optimizer)
    model.update(m)
    return loss.detach()


# ----------------------------------------------------------------------------------- SwAV
class SwAV(simclr.Model):
    """SimCLR's f, g and K prototypes [2006.09882], without queue and multi-crop.

    base_encoder: as for SimCLR; args: has `proj_layers`, and `prototypes`, which is K
    """

    def __init__(self, base_encoder, args):
        super().__init__(base_encoder, args)
        self.g.insert(1, nn.BatchNorm1d(self.g[0].out_features))  # as in SwAV's head
        self.prototypes = nn.Parameter(torch.randn(args.prototypes, 128))

    def forward(self, x1, x2):
        """Views (B, 3, H, W) to z1, z2 (B, 128) and the prototypes (K, 128)."""
        return *super().forward(x1, x2), self.prototypes


@torch.no_grad()
def sinkhorn(scores, epsilon, iterations=3):
    """Codes (B, K) that spread the batch over all prototypes, Eq. 3, by Sinkhorn-Knopp."""
    codes = (scores / epsilon).exp()
    for _ in range(iterations):
        codes = codes / codes.sum(0)  # every prototype gets as much as any other
        codes = codes / codes.sum(1, keepdim=True)  # every image gives 1
    return codes


def swav_loss(z1, z2, prototypes, tau=0.1, epsilon=0.05):
    """Swapped prediction, Eq. 1: z1 predicts the code of z2, and z2 that of z1; in nats."""
    prototypes = F.normalize(prototypes.float(), dim=1)
    scores1 = F.normalize(z1.float(), dim=1) @ prototypes.T  # (B, K)
    scores2 = F.normalize(z2.float(), dim=1) @ prototypes.T
    q1, q2 = sinkhorn(scores1, epsilon), sinkhorn(scores2, epsilon)
    loss = F.cross_entropy(scores1 / tau, q2)  # Eq. 2, mean over the batch
    return loss + F.cross_entropy(scores2 / tau, q1)


def swav_step(model, optimizer, views):
    """Train on two views of a batch; returns the loss."""
    loss = swav_loss(*model(*views))
    descend(loss, optimizer)
    return loss.detach()


# ------------------------------------------------------------------------------ MoCo-LoGo
class MoCoLoGo(moco.Model):
    """MoCo's networks and queue, and LoGo's affinity [2203.17205]; arguments as for MoCo."""

    def __init__(self, base_encoder, args):
        super().__init__(base_encoder, args)
        self.affinity = simsiam_logo.Affinity(128)

    def forward(self, xg1, xg2, xl1, xl2):
        """Views to four q, two k (B, 128); logits (B,): L_ll's, Omega's pos and neg."""
        # Unit vectors: InfoNCE ignores their length, which L_ll could change without bound.
        outputs = [self.g(self.f(x)) for x in (xg1, xg2, xl1, xl2)]
        q = [F.normalize(output, dim=1) for output in outputs]
        k = [self.key(xg1), self.key(xg2)]
        pair = torch.cat([q[2], q[3]], 1)  # (B, 256)
        other = torch.cat([q[2], q[3].roll(1, 0)], 1)  # a roll: no image meets itself
        # L_ll trains f and g only; Omega's pos and neg train the affinity only.
        fixed = {name: weight.detach() for name, weight in self.affinity.named_parameters()}
        l_ll = torch.func.functional_call(self.affinity, fixed, pair)
        pos, neg = self.affinity(pair.detach()), self.affinity(other.detach())
        return q, k, l_ll[:, 0], pos[:, 0], neg[:, 0]

    def update(self, k, m):
        """MoCo's Eq. 2 and queue, after every optimizer step."""
        moco.momentum_update(self.f, self.f_k, m)
        moco.momentum_update(self.g, self.g_k, m)
        self.ptr.copy_(moco.enqueue(self.queue, self.ptr, torch.cat(k)))


def moco_logo_loss(q, k, l_ll, queue, tau=0.1, lam=1e-4):
    """L = L_gg + L_lg + lam L_ll, in which l of MoCo's Eq. 1 compares the views; in nats."""
    pair_loss = partial(moco.info_nce, queue=queue, tau=tau)
    return simsiam_logo.logo_loss(q, k, l_ll, lam, pair_loss)


def moco_logo_step(model, optimizer, views, m=0.99):
    """Train on two global and two local views of a batch; returns the loss."""
    q, k, l_ll, pos, neg = model(*views)
    loss = moco_logo_loss(q, k, l_ll, model.queue)
    descend(loss + simsiam_logo.affinity_loss(pos, neg), optimizer)  # L, and -Omega, Eq. 6
    model.update(k, m)
    return loss.detach()
