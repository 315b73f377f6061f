"""Sinkhorn's iteration in the log domain: a plan that gives every expert the same mass.

Letters: G groups, N tokens of a group, E experts.
"""

import math

import torch
from torch import Tensor


@torch.no_grad()
def balanced_logits(
    logits_GNE: Tensor, valid_GN: Tensor, iterations: int, tolerance: float = 0.0
) -> Tensor:
    """Logits with each expert's price g added, [G, N, E]; a row's softmax is its token's plan.

    Entropy-regularised transport (Clark et al. 2022, arXiv 2202.01169, S-BASE):
    the plan T_ie = exp(f_i + L_ie + g_e) has row sums 1/n over the n valid tokens and column sums
    1/E, solved by f = log(1/n) - logsumexp_e(L + g) and g = log(1/E) - logsumexp_i(L + f). Since f
    shifts a whole row, g alone decides its largest entry. Padding has no mass. A group of one
    token, to which all experts would become alike, or of none keeps its logits. With a `tolerance`
    above 0 a group stops by itself, whatever the others do: when no column is further from 1/E than
    that part of it. Without gradients, in the type of the logits.
    """
    experts = logits_GNE.shape[-1]
    tokens_G11 = valid_GN.sum(-1).view(-1, 1, 1)
    log_n_G11 = tokens_G11.clamp(min=1).to(logits_GNE.dtype).log()
    padding_GN1 = ~valid_GN.unsqueeze(-1)
    g_G1E = logits_GNE.new_zeros(len(logits_GNE), 1, experts)
    going_G11 = tokens_G11 > 1
    for _ in range(iterations):
        f_GN1 = -log_n_G11 - (logits_GNE + g_G1E).logsumexp(-1, keepdim=True)
        f_GN1 = f_GN1.masked_fill(padding_GN1, -torch.inf)
        mass_G1E = (logits_GNE + f_GN1).logsumexp(1, keepdim=True)
        if tolerance:
            error_G1E = (experts * (mass_G1E + g_G1E).exp() - 1).abs()
            going_G11 = going_G11 & (error_G1E.amax(-1, keepdim=True) > tolerance)
            if not going_G11.any():
                break
        g_G1E = torch.where(going_G11, -math.log(experts) - mass_G1E, g_G1E)
    return logits_GNE + g_G1E
