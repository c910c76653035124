"""Visual attention redistribution: weight on sink tokens goes to the image tokens that are no sinks.

    a = causal softmax,   V = image tokens,   I = sinks,   rest = V without I
    where query i is text, sum_V a_i >= share and sum_{V and I} a_i <= rho sum_V a_i:
    a'_ij = keep a_ij for j in I,   a'_ij = a_ij (1 + (1 - keep) sum_I a_i / sum_rest a_i) for j in rest

so rows keep their sum. I holds text and image tokens with massive activations, `sink_tokens`, found anew before each
layer from the third on. Operands say which tokens are image and which are sinks: 1 or 0, or a degree between.

Kang, Kim, Kim, Hwang. "See What You Are Told: Visual Attention Sink in Large Multimodal Models." 2025.
arXiv:2503.03321. That `keep` is the share that stays, and heads of any layer but the last, as in the released code.
"""

import torch
import torch.nn.functional as F

from manyheads.core import Function, Operand, mechanism
from manyheads.core.maps import attention_map, read


def reference(q, k, v, *, image, sink, keep=0.6, rho=0.5, share=0.2):
    offset, out = k.shape[-2] - q.shape[-2], []
    for i in range(q.shape[-2]):
        end = offset + i + 1
        a = torch.softmax(q[..., i : i + 1, :] @ k[..., :end, :].mT / q.shape[-1] ** 0.5, -1)
        im, sk = (t[:, None, None, :end] for t in (image, sink))
        seen, rest = (a * im).sum(-1, keepdim=True), (a * im * (1 - sk)).sum(-1, keepdim=True)
        chosen = (seen >= share) & ((a * im * sk).sum(-1, keepdim=True) <= rho * seen) & (rest > 0)
        budget = (1 - keep) * (a * sk).sum(-1, keepdim=True)
        moved = budget * a * im * (1 - sk) / torch.where(chosen, rest, 1.0) - (1 - keep) * a * sk
        text = 1 - image[:, None, None, end - 1 : end]
        out.append((a + text * torch.where(chosen, moved, 0.0)) @ v[..., :end, :])
    return torch.cat(out, -2)


@mechanism(
    reference=reference,
    arxiv="2503.03321",
    system="visual-attention-sink-var",
    examples=({}, {"keep": 0.0, "rho": 0.9, "share": 0.05}),
    ranges={"keep": (0.0, 1.0), "rho": (0.0, 1.0), "share": (0.0, 1.0)},
)
def visual_attention_redistribution(keep: float = 0.6, rho: float = 0.5, share: float = 0.2) -> Function:
    """Sinks keep the share `keep`, in heads that give image tokens `share` of a query's weight or more, and sinks at
    most `rho` of that."""

    def forward(q, k, v, *, scale, image, sink):
        a = attention_map(q, k, scale, causal=True)
        image, sink = image.to(a.dtype)[:, None, None], sink.to(a.dtype)[:, None, None]
        on_image, on_rest = a * image, a * image * (1 - sink)
        seen, rest = on_image.sum(-1, keepdim=True), on_rest.sum(-1, keepdim=True)
        image_centric = (seen >= share) & ((on_image * sink).sum(-1, keepdim=True) <= rho * seen) & (rest > 0)
        given = (1 - keep) * a * sink
        moved = given.sum(-1, keepdim=True) * on_rest / torch.where(image_centric, rest, 1.0) - given
        before_keys = max(q.shape[2] - k.shape[2], 0)  # queries that see nothing, whatever they are
        text = 1 - F.pad(image, (before_keys, 0))[..., -q.shape[2] :].mT
        return read(a + text * torch.where(image_centric, moved, 0.0), v)

    membership = Operand("batch len", torch.sigmoid)
    return Function(forward=forward, operands={"image": membership, "sink": membership})


def sink_tokens(hidden: torch.Tensor, dims: tuple[int, ...], tau: float = 20.0) -> torch.Tensor:
    """Which tokens of hidden states [batch, len, dim] are sinks: bool [batch, len].

    dims: where the model's massive activations stand: (1415, 2533) in LLaMA-1.5 7B, (2100, 4743) in 13B.
    """
    hidden = hidden.float()
    normal = hidden * (hidden.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    return (normal[..., list(dims)].abs() > tau).any(-1)
