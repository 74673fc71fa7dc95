"""SAM and its base optimizers in float64, written from the papers: nothing here is shared with the package.

SAM: Foret et al., https://arxiv.org/abs/2010.01412, equation 2. ASAM: Kwon et al.,
https://arxiv.org/abs/2102.11600, with T = |w|. SGD with momentum: Sutskever et al. 2013, as PyTorch documents it.
Adam: Kingma and Ba, https://arxiv.org/abs/1412.6980, algorithm 1; AMSGrad: Reddi et al. 2018, as PyTorch documents it;
AdamW: Loshchilov and Hutter, https://arxiv.org/abs/1711.05101, algorithm 2.
"""

import math

import torch


def norm(weights, grads, adaptive):
    """``||g||_2`` over all tensors together (``adaptive``: one bool per tensor), summed exactly."""
    terms = []
    for w, g, scaled in zip(weights, grads, adaptive, strict=True):
        term = g.double() * w.double().abs() if scaled else g.double()
        terms += term.square().flatten().tolist()
    return math.sqrt(math.fsum(terms))


def climbed(w, g, grad_norm, rho, adaptive=False, maximize=False):
    """``w + e(w)``."""
    w, g = w.double(), g.double()
    e = rho * (w.square() if adaptive else 1.0) * g / (grad_norm + 1e-12)
    return w - e if maximize else w + e


def sgd(w, g, buffer, *, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False):
    """The new ``w`` and momentum buffer; ``buffer`` None: there has been no step."""
    w, g = w.double(), -g.double() if maximize else g.double()
    g = g + weight_decay * w
    if momentum == 0:
        return w - lr * g, None
    buffer = g if buffer is None else momentum * buffer.double() + (1 - dampening) * g
    return w - lr * (g + momentum * buffer if nesterov else buffer), buffer


def adam(
    w,
    g,
    state,
    step,
    *,
    lr,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
    decoupled=False,
    amsgrad=False,
    maximize=False,
):
    """The new ``w`` and moments (m, v, largest v or None); ``step`` counts from 1."""
    m, v, largest = (None if t is None else t.double() for t in state)
    w, g = w.double(), -g.double() if maximize else g.double()
    if decoupled:
        w = w - lr * weight_decay * w
    else:
        g = g + weight_decay * w
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g.square()
    if amsgrad:
        largest = torch.maximum(largest, v)
    v_hat = (largest if amsgrad else v) / (1 - betas[1] ** step)
    m_hat = m / (1 - betas[0] ** step)
    return w - lr * m_hat / (v_hat.sqrt() + eps), (m, v, largest)
