"""SAM, its family and its base optimizers in float64, written from the papers: nothing here is shared with the package.

A method is a function that runs the passes of one step: it is given the weights, a function that computes all gradients
anywhere, one dict of options for each tensor (``rho``, ``lr``, ...) and a dict of its own memory. It returns the
gradients to descend with; a second list, if any, is subtracted from the weights after the base's update.

SGD with momentum: Sutskever et al. 2013, as PyTorch documents it. Adam: Kingma and Ba (arXiv:1412.6980), algorithm 1;
AMSGrad: Reddi et al. 2018, as PyTorch documents it; AdamW: Loshchilov and Hutter (arXiv:1711.05101), algorithm 2.
"""

import math

import torch

# ---- sums ----


def dot(xs, ys):
    """Of two lists of tensors, as one long vector each; summed exactly."""
    return math.fsum(math.fsum((x * y).flatten().tolist()) for x, y in zip(xs, ys, strict=True))


def length(xs):
    return math.sqrt(dot(xs, xs))


def norm(weights, grads, adaptive):
    """``||g||_2`` over all tensors together; scaled by ``|w|`` where ``adaptive`` (one bool per tensor)."""
    scaled = zip(weights, grads, adaptive, strict=True)
    return length([g.double() * w.double().abs() if scales else g.double() for w, g, scales in scaled])


def added(weights, e):
    return [w + d for w, d in zip(weights, e, strict=True)]


# ---- SAM ----


def perturbed(w, g, grad_norm, rho, adaptive=False, maximize=False):
    """``w + e(w)``: Foret et al., equation 2; adaptive: Kwon et al. with T = |w|."""
    w, g = w.double(), g.double()
    e = rho * (w.square() if adaptive else 1.0) * g / (grad_norm + 1e-12)
    return w - e if maximize else w + e


def sam_weights(weights, g, groups):
    """The perturbed weights; a group's ``perturb=False`` leaves its tensor out of the norm, too."""
    inside = [i for i, group in enumerate(groups) if group.get("perturb", True)]
    adaptive = [groups[i].get("adaptive", False) for i in inside]
    size = norm([weights[i] for i in inside], [g[i] for i in inside], adaptive)
    result = list(weights)
    for i in inside:
        group = groups[i]
        is_adaptive, maximize = group.get("adaptive", False), group.get("maximize", False)
        result[i] = perturbed(weights[i], g[i], size, group["rho"], is_adaptive, maximize)
    return result


def sam(weights, gradient, groups, memory):
    """Foret et al. 2021 (arXiv:2010.01412), algorithm 1 and equation 2 with p = 2."""
    return gradient(sam_weights(weights, gradient(weights), groups))


def sam_of_p(p):
    def step(weights, gradient, groups, memory):
        """Foret et al., equation 2."""
        g = gradient(weights)
        q = 1.0 if p == math.inf else p / (p - 1)
        total = math.fsum(math.fsum((x.abs() ** q).flatten().tolist()) for x in g)
        # (||g||_q^q)^(1/p) = ||g||_q^(q-1)
        scales = [group["rho"] / total ** (1 / p) for group in groups]
        return gradient(added(weights, [s * x.sign() * x.abs() ** (q - 1) for s, x in zip(scales, g, strict=True)]))

    return step


def sam_in_steps(count, fraction=None):
    def step(weights, gradient, groups, memory):
        """Projected gradient ascent with steps of length rho / K; balls in e / rho where rho differs."""
        size = 1 / count if fraction is None else fraction
        rhos = [group["rho"] for group in groups]
        moving = [i for i, rho in enumerate(rhos) if rho > 0]
        e = [torch.zeros_like(w) for w in weights]
        for _ in range(count):
            g = gradient(added(weights, e))
            grad_norm = length([g[i] for i in moving]) + 1e-12
            for i in moving:
                e[i] = e[i] + size * rhos[i] * g[i] / grad_norm
            radius = length([e[i] / rhos[i] for i in moving])
            if radius > 1:
                e = [d / radius for d in e]
        return gradient(added(weights, e))

    return step


# ---- the family ----


def asam(weights, gradient, groups, memory, eta=0.01):
    """Kwon et al. 2021 (arXiv:2102.11600), equation 5; T = |w| + eta for matrices, 1 for biases (section 4)."""
    g = gradient(weights)
    operators = [w.abs() + eta if w.dim() > 1 else torch.ones_like(w) for w in weights]
    size = length([t * x for t, x in zip(operators, g, strict=True)])
    e = [group["rho"] * t**2 * x / size for group, t, x in zip(groups, operators, g, strict=True)]
    return gradient(added(weights, e))


def both_gradients(weights, gradient, groups):
    g = gradient(weights)
    return g, gradient(sam_weights(weights, g, groups))


def gsam(weights, gradient, groups, memory, alpha=0.4):
    """Zhuang et al. 2022 (arXiv:2203.08065), algorithm 1."""
    g, g_p = both_gradients(weights, gradient, groups)
    cosine_times_norm = dot(g, g_p) / length(g_p)
    unit = [x / length(g_p) for x in g_p]
    orthogonal = [x - cosine_times_norm * u for x, u in zip(g, unit, strict=True)]
    return [p if group["rho"] == 0 else p - alpha * o for group, p, o in zip(groups, g_p, orthogonal, strict=True)]


def wsam_coupled(weights, gradient, groups, memory, gamma=0.9):
    """Yue et al. 2023 (arXiv:2305.15817), algorithm 1: h = (1 - 2 gamma)/(1 - gamma) g + gamma/(1 - gamma) g_p."""
    g, g_p = both_gradients(weights, gradient, groups)
    own, other = (1 - 2 * gamma) / (1 - gamma), gamma / (1 - gamma)
    return [p if group["rho"] == 0 else own * x + other * p for group, x, p in zip(groups, g, g_p, strict=True)]


def wsam_decoupled(weights, gradient, groups, memory, gamma=0.9):
    """Yue et al., algorithm 2: the base takes g, the sharpness is applied with lr alone."""
    g, g_p = both_gradients(weights, gradient, groups)
    ratio = gamma / (1 - gamma)
    given, extra = [], []
    for group, x, p in zip(groups, g, g_p, strict=True):
        given.append(p if group["rho"] == 0 else x)
        extra.append(torch.zeros_like(x) if group["rho"] == 0 else group["lr"] * ratio * (p - x))
    return given, extra


def looksam(k=5, alpha=0.7):
    def step(weights, gradient, groups, memory):
        """Liu et al. 2022 (arXiv:2203.02714), algorithm 1."""
        t = memory["t"] = memory.get("t", -1) + 1
        g = gradient(weights)
        if t % k == 0:
            g_s = gradient(sam_weights(weights, g, groups))
            cosine = dot(g, g_s) / (length(g) * length(g_s))
            memory["g_v"] = [s - length(g_s) * cosine * x / length(g) for s, x in zip(g_s, g, strict=True)]
            return g_s
        ratio = alpha * length(g) / length(memory["g_v"])
        return [x if group["rho"] == 0 else x + ratio * v for group, x, v in zip(groups, g, memory["g_v"], strict=True)]

    return step


def friendly_average(g, memory, lmbda=0.9):
    before = memory.get("m", [torch.zeros_like(x) for x in g])
    memory["m"] = [lmbda * a + (1 - lmbda) * x for a, x in zip(before, g, strict=True)]
    return memory["m"]


def friendly(weights, gradient, groups, memory, sigma=1.0):
    """Li et al. 2024 (arXiv:2403.12350), algorithm 1."""
    g = gradient(weights)
    m = friendly_average(g, memory)
    d = [x - sigma * a for x, a in zip(g, m, strict=True)]
    return gradient(added(weights, [group["rho"] * x / length(d) for group, x in zip(groups, d, strict=True)]))


def gradient_norm_penalty(weights, gradient, groups, memory, alpha=0.8):
    """Zhao et al. 2022 (arXiv:2202.03599), algorithm 1."""
    g, g_p = both_gradients(weights, gradient, groups)
    mixed = [(1 - alpha) * x + alpha * p for x, p in zip(g, g_p, strict=True)]
    return [p if group["rho"] == 0 else m for group, p, m in zip(groups, g_p, mixed, strict=True)]


def vasso_average(g, memory, theta=0.9):
    before = memory.get("d", g)
    memory["d"] = [(1 - theta) * a + theta * x for a, x in zip(before, g, strict=True)]
    return memory["d"]


def vasso(weights, gradient, groups, memory):
    """Li and Giannakis 2023 (arXiv:2309.15639): d starts as the first gradient."""
    d = vasso_average(gradient(weights), memory)
    return gradient(added(weights, [group["rho"] * x / length(d) for group, x in zip(groups, d, strict=True)]))


def stable_sam(weights, gradient, groups, memory):
    """Tan et al. 2025 (arXiv:2401.07250): the descent's gradient has the length of the ascent's."""
    g, g_p = both_gradients(weights, gradient, groups)
    ratio = length(g) / length(g_p)
    return [p if group["rho"] == 0 else ratio * p for group, p in zip(groups, g_p, strict=True)]


def unified_sam(weights, gradient, groups, memory, lam=0.5):
    """Oikonomou and Loizou 2025 (arXiv:2503.02225): e = rho (1 - lambda + lambda / ||g||) g."""
    g = gradient(weights)
    factor = 1 - lam + lam / length(g)
    return gradient(added(weights, [group["rho"] * factor * x for group, x in zip(groups, g, strict=True)]))


def sagm(weights, gradient, groups, memory, alpha=0.001):
    """Wang et al. 2023 (arXiv:2303.10353): L(w) + L(w + rho g / ||g|| - alpha g), halved; rho = 0 is the base alone."""
    g = gradient(weights)
    size = length(g)
    e = [(group["rho"] / size - alpha if group["rho"] else 0.0) * x for group, x in zip(groups, g, strict=True)]
    g_p = gradient(added(weights, e))
    return [(x + p) / 2 if group["rho"] else p for group, x, p in zip(groups, g, g_p, strict=True)]


def lesam(total=None, sigma=0.35):
    def step(weights, gradient, groups, memory):
        """Wang et al. 2026 (arXiv:2605.10183); in the last fifth of the steps sigma falls to 0 along a cosine."""
        t = memory["t"] = memory.get("t", -1) + 1
        g = gradient(weights)
        size, sigma_t = length(g), sigma
        if total is not None and t >= total - total // 5:
            done = (t - (total - total // 5)) / (total // 5 - 1)
            sigma_t = sigma * (0.5 + 0.5 * math.cos(math.pi * min(done, 1.0)))
        e = [min(sigma_t / size, group["rho"]) * x / size for group, x in zip(groups, g, strict=True)]
        return gradient(added(weights, e))

    return step


def zsharp(weights, gradient, groups, memory, q=0.95):
    """Yun 2025 (arXiv:2505.02369): the elements with |z| beyond the tensor's quantile; the norm is over all tensors."""
    d = []
    for x in gradient(weights):
        z = (x - x.mean()) / (x.std(correction=0) + 1e-8)
        kept = x * (z.abs() > torch.quantile(z.abs().flatten(), q))
        d.append(kept if kept.any() else x)
    return gradient(added(weights, [group["rho"] * x / length(d) for group, x in zip(groups, d, strict=True)]))


def gcsam(weights, gradient, groups, memory):
    """Hassan et al. 2025 (arXiv:2501.11584), with the centralization of Yong et al. (arXiv:2004.01461)."""
    d = []
    for x in gradient(weights):
        rows = x.reshape(len(x), -1) if x.dim() > 1 else x
        d.append((rows - rows.mean(1, keepdim=True)).reshape(x.shape) if x.dim() > 1 else x)
    return gradient(added(weights, [group["rho"] * x / length(d) for group, x in zip(groups, d, strict=True)]))


def esam(beta, seed):
    def step(weights, gradient, groups, memory):
        """Du et al. 2022 (arXiv:2110.03141), section 3.1, over whole tensors; the draws are splitmix64's."""
        t = memory["t"] = memory.get("t", -1) + 1
        g = gradient(weights)
        size = length(g)
        drawn = [uniform(seed, t, i) < beta for i in range(len(g))]
        factors = [group["rho"] / beta / size if chosen else 0.0 for group, chosen in zip(groups, drawn, strict=True)]
        return gradient(added(weights, [factor * x for factor, x in zip(factors, g, strict=True)]))

    return step


def uniform(seed, step, position):
    """splitmix64 (Steele et al. 2014), finalized, as a float64 in [0, 1)."""
    mask = 2**64 - 1
    x = (position * 0x9E3779B97F4A7C15 + ((seed * 0x9E3779B1 + step * 0x85EBCA77) & (2**62 - 1))) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return ((x ^ (x >> 31)) >> 11) / 2**53


def momentum_sam(weights, gradient, groups, memory):
    """Becker et al. 2024 (arXiv:2401.12033), algorithm 1; ``memory["momentum"]`` is the base's."""
    v = memory.get("momentum")
    if v is None:
        return gradient(weights)
    return gradient(added(weights, [-group["rho"] * x / length(v) for group, x in zip(groups, v, strict=True)]))


def amp(count=1, inner_lr=1.0, eps=0.5):
    def step(weights, gradient, groups, memory):
        """Zheng et al. 2021 (arXiv:2010.04925), algorithm 1; tensors with rho = 0 do not move."""
        moving = [i for i, group in enumerate(groups) if group["rho"] > 0]
        delta = [torch.zeros_like(w) for w in weights]
        for _ in range(count):
            g = gradient(added(weights, delta))
            for i in moving:
                delta[i] = delta[i] + inner_lr * g[i]
            size = length(delta)
            if size > eps:
                delta = [eps * d / size for d in delta]
        return gradient(added(weights, delta))

    return step


def awp(weights, gradient, groups, memory, gamma=0.01):
    """Wu et al. 2020 (arXiv:2004.05884), equation 8: each matrix by its own norm; tensors with rho = 0 do not move."""
    g = gradient(weights)
    e = [
        gamma * length([w]) * x / length([x]) if w.dim() > 1 and group["rho"] > 0 else torch.zeros_like(w)
        for group, w, x in zip(groups, weights, g, strict=True)
    ]
    return gradient(added(weights, e))


# What a step without an ascent still does with its gradient.
AVERAGES = {friendly: friendly_average, vasso: vasso_average}


def only_in(method, ascends):
    def step(weights, gradient, groups, memory):
        """``method`` in the steps for which ``ascends(step)`` is true, the base otherwise."""
        t = memory["steps"] = memory.get("steps", -1) + 1
        if ascends(t):
            return method(weights, gradient, groups, memory)
        g = gradient(weights)
        if method in AVERAGES:
            AVERAGES[method](g, memory)
        return g

    return step


def at_intervals(method, k):
    return only_in(method, lambda step: step % k == 0)


def aesam(method, total, delay, lambda1=-1.0, lambda2=1.0, delta=0.9):
    def step(weights, gradient, groups, memory):
        """Jiang et al. 2023 (arXiv:2304.14647); ``delay=1``: each step by the decision of the one before."""
        t = memory["steps"] = memory.get("steps", -1) + 1
        g = gradient(weights)
        squares = dot(g, g)
        mu = memory["mu"] = delta * memory.get("mu", 0.0) + (1 - delta) * squares
        memory["s2"] = delta * memory.get("s2", 0.0) + (1 - delta) * (squares - mu) ** 2
        c = t / total * lambda1 + (1 - t / total) * lambda2
        decision = squares >= mu + c * math.sqrt(memory["s2"])
        ascends = memory.get("decision", True) if delay else decision
        memory["decision"] = decision
        memory.setdefault("ascents", []).append(ascends)
        if ascends:
            return method(weights, gradient, groups, memory)
        if method in AVERAGES:
            AVERAGES[method](g, memory)
        return g

    return step


# ---- base optimizers ----


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
