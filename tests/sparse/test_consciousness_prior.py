"""The consciousness prior: a few variables say enough of a world whose factors are small, and not of another."""

import torch
from torch import nn

from manyheads.layers.sparse.consciousness_prior import ConsciousnessPrior

VARIABLES, DIM, STEPS = 16, 16, 400


def accuracy(factor):
    """Of who predicts what most of the variables in `factor` are, +1 or -1, from three of all variables: their mean is
    learned, under noise that fades."""
    layer = ConsciousnessPrior(DIM, slots=3, noise=3.0)
    name, value, readout = nn.Parameter(torch.randn(VARIABLES, DIM)), nn.Parameter(torch.randn(DIM)), nn.Linear(DIM, 1)
    optimizer = torch.optim.Adam([name, value, *layer.parameters(), *readout.parameters()], lr=0.02)

    def world(batch):
        x = torch.randint(2, (batch, VARIABLES)) * 2.0 - 1
        return readout(layer(name + x[..., None] * value)[:, 0]).squeeze(-1), x[:, factor].mean(1)

    for step in range(STEPS):
        layer.noise = 3.0 * (1 - step / STEPS)
        said, mean = world(128)
        optimizer.zero_grad()
        (said - mean).square().mean().backward()
        optimizer.step()
    layer.eval()
    said, mean = world(2000)
    return ((said > 0) == (mean > 0)).float().mean()


def test_small_factors_fit_through_the_bottleneck_and_large_ones_do_not():
    """Who sees all variables is always right; who sees 3 of 15 that vote is right two times in three."""
    assert accuracy([3, 7, 12]) >= 0.95
    assert accuracy(list(range(15))) < 0.75


def test_all_know_of_the_world_through_the_chosen_alone():
    """Another element changes what it makes of them itself, and nothing else."""
    layer = ConsciousnessPrior(8, slots=2).double()
    x = torch.randn(1, 12, 8, dtype=torch.float64)
    everyone = torch.ones(1, 12, dtype=torch.bool)
    chosen, _, _ = layer._attend(layer.k(x), layer.v(x), everyone, layer.start[None])
    other = next(j for j in range(12) if j not in chosen)
    changed = x.clone()
    changed[:, other] *= 0.9  # less liked or more, it is not among the first two
    again, _, _ = layer._attend(layer.k(changed), layer.v(changed), everyone, layer.start[None])
    assert again.equal(chosen)
    moved = (layer(changed) - layer(x)).abs().sum(-1)[0] > 0
    assert moved.nonzero().flatten().tolist() == [other]


def test_noise_is_for_training_and_tries_others():
    layer = ConsciousnessPrior(8, slots=2, noise=5.0)
    k, v = torch.randn(2, 50, 12, 8)
    here = torch.ones(50, 12, dtype=torch.bool)
    here[:, 6:] = False
    calm, tried = (layer.train(mode)._attend(k, v, here, layer.start.expand(50, -1))[0] for mode in (False, True))
    assert calm.equal(layer.eval()._attend(k, v, here, layer.start.expand(50, -1))[0])
    assert not calm.equal(tried) and (tried < 6).all()
