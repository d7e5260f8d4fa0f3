"""Weights that make up for what rounding did before them in the same block.

A linear that reads x while its block is in float reads y once matrices before it are rounded. The
weights V for which V y is nearest to W x, in the mean square over tokens, are W + W G H^-1, where H is
the mean of y.T @ y and G, the drift, that of (x - y).T @ y. They are rounded then, with H, instead of W.

So do GPTAQ (Li et al. 2025, arXiv 2504.02692) and Qronos (Zhang et al. 2025, arXiv 2505.11695) with the
x of the whole float model. Here it is that of the float block, given what the rounded blocks before it
give: it needs no states of a second model, and most of the gain is there. KL of GPTQ without this, with
it, and with the x of the float model: babyllama105 at w4-g32 0.0182, 0.0144, 0.0127, at w3-g32 0.0880,
0.0669, 0.0594, reference model at w3-g128 0.0641, 0.0578, 0.0563 (96 x 256 tokens, 2026-11-27). What
counts is the order: found once for a block, before any of it is rounded, G gains nothing.
"""

import torch
from torch import Tensor

# Of each column's H_kk, added to it, since G is an estimate too: a share, and so many times the columns
# over the tokens. KL of the reference model at w4-g128 without correction, and with a share of 0.1, 1
# and 3: from 1,024 tokens 0.0390, 0.0434, 0.0401, 0.0391; from 4,096 0.0203, 0.0200, 0.0189, 0.0192;
# from 32,768 0.0156, 0.0143, 0.0144 (babyllama105, w4-g32: 0.0208, 0.0157, 0.0161, 0.0176); 2026-11-27.
_DAMP, _DAMP_OF_FEW = 0.1, 6.0


def make_up(weight: Tensor, hessian: Tensor, drift: Tensor, tokens: int) -> Tensor | None:
    """`weight` (out, in) plus what makes up for the drift of its inputs.

    Args:
        hessian: the mean of y.T @ y, (in, in).
        drift: the mean of (x - y).T @ y, (in, in).
        tokens: that both are means over.

    Returns:
        None where the damped Hessian has no Cholesky factor, or the result is not finite.

    >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.5, 0.0], [0.0, 1.0]])
    >>> make_up(torch.tensor([[1.0, 1.0]]), y.t() @ y / 2, (x - y).t() @ y / 2, tokens=10**6)
    tensor([[1.9091, 1.0000]])
    """
    damped = hessian.clone()
    diagonal = damped.diagonal()
    share = _DAMP + _DAMP_OF_FEW * len(hessian) / max(1, tokens)
    diagonal.add_(share * torch.where(diagonal > 0, diagonal, diagonal.mean()))
    lower, failed = torch.linalg.cholesky_ex(damped)
    del damped
    if int(failed):
        return None
    more = torch.cholesky_solve((weight @ drift).t(), lower).t()
    result = weight + more
    return result if bool(torch.isfinite(result.sum())) else None
