"""Routing attention: centroids find the topics that tokens are about, and tokens outside of clusters get nothing."""

import torch

from manyheads.layers.sparse.routing_attention import RoutingAttention, alike


def mass_within_clusters(module, x):
    """The share of softmax's mass over all tokens x [1, len, dim] that falls on those of a common cluster."""
    r, n = alike(x), x.shape[1]
    members = module._members(r[None], torch.ones(1, n, dtype=torch.bool))[0, 0]
    inside = torch.zeros(len(members), n).scatter(1, members, 1.0)
    together = inside.T @ inside > 0
    return ((r[0] @ r[0].T * module.dim**-0.5).softmax(-1) * together).sum(-1).mean()


def test_centroids_learn_where_the_mass_is():
    """16 topics, 16 clusters of an eleventh of the tokens each. Random centroids find much, as a token may be in
    several clusters; learned ones find more. Which start is good is luck, as it is in k-means."""
    topics = 2 * torch.randn(16, 64)
    text = [(topics[torch.randint(16, (256,))] + 0.3 * torch.randn(256, 64))[None] for _ in range(40)]
    before, after = [], []
    for _ in range(4):
        module = RoutingAttention(64, 1, local_heads=0, clusters=16, window=24, decay=0.9, rope_theta=None)
        with torch.no_grad():
            module.q.weight.copy_(torch.eye(64))
        before.append(mass_within_clusters(module.eval(), text[0]))
        for x in text:
            module.train()(x)
        after.append(mass_within_clusters(module.eval(), text[0]))
    assert sum(after) / 4 > sum(before) / 4 + 0.05 and max(after) > 0.9


def test_a_centroid_moves_towards_the_mean_of_its_tokens_in_training_alone():
    module = RoutingAttention(4, 1, local_heads=0, clusters=2, window=2, decay=0.75).double()
    with torch.no_grad():
        module.q.weight.copy_(torch.eye(4))
        module.centroids.copy_(torch.tensor([[[1.0, -1, 1, -1], [1, 1, -1, -1]]]))
    near = torch.tensor([[2.0, -1, 1, -2], [1, -2, 2, -1]], dtype=torch.float64)
    before = module.centroids.clone()
    module.eval()(near[None])
    assert module.centroids.equal(before)
    module.train()(near[None])
    torch.testing.assert_close(module.centroids[0, 0], 0.75 * before[0, 0] + 0.25 * alike(near).mean(0))
    assert module.centroids[0, 1].equal(before[0, 1]), "no token, no change"
    moved = module.centroids.clone()
    padding = torch.tensor([[30.0, -20, 10, -20]] * 2, dtype=torch.float64)
    module(torch.cat([near, padding])[None], present=torch.tensor([[True, True, False, False]]))
    torch.testing.assert_close(module.centroids[0, 0], 0.75 * moved[0, 0] + 0.25 * alike(near).mean(0))


def test_a_token_in_no_cluster_gets_nothing():
    module = RoutingAttention(8, 2, local_heads=0, clusters=1, window=3)
    heads = module._route(*torch.randn(2, 1, 2, 9, 4), torch.ones(1, 9, dtype=torch.bool))
    assert (heads.abs().sum(-1) > 0).sum(-1).tolist() == [[3, 3]]
