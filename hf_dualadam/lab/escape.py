"""Simulate escape times from a minimum with the optimizer classes: the theory behind InvAdam and DualAdam.

Near a minimum of sharpness H (second derivative of the loss), a minibatch gradient of batch size B carries noise of
variance C = H / B. An optimizer that multiplies the gradient by a mobility P then moves like a particle at temperature

    T = eta * P * C / 2                                   eta: learning rate

and crosses a barrier of height dL after, on average,

    tau = tau_0 * exp(dL / T) = tau_0 * exp(2 * B * dL / (eta * P * H))            [steps]

    1 / tau_0 = w_a / (2 pi) * (sqrt(gamma^2 / 4 + w_b^2) - gamma / 2) / w_b

(Kramers 1940), where w_a^2 = eta P gamma H at the minimum, w_b^2 = eta P gamma |H_b| at the top of the barrier, and
gamma = -log(beta1) is the friction per step of a first moment with decay beta1. The optimizers differ only in P, where
the second moment v equals C near the minimum:

    SGD       P = 1                                  log(tau / tau_0) ~ H^-1
    Adam      P = v^(-1/2)                           log(tau / tau_0) ~ H^(-1/2)
    InvAdam   P = v^(1/2)                            log(tau / tau_0) ~ H^(-3/2)
    DualAdam  P = (1 - alpha) v^(-1/2) + alpha v^(1/2)       -(1/2 + alpha) at H = B, the local slope

Sources: Shi, Chen, Jin and Zhou, arXiv 2603.07122; Xie, Sato and Sugiyama, arXiv 2002.03495 (SGD); Xie et al., arXiv
2006.15815 (Adam); Kramers, Physica 7 (1940).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from scipy import optimize, stats
from torch import Tensor

from ..optimizers import DualAdam, InvAdam

BETAS = (0.9, 0.999)
BATCH_SIZE = 1.0  # B; at 1 the noise variance H / B is near 1, where both of DualAdam's updates matter
BARRIER = 0.2  # dL; with a small B * dL the slope of the barrier does not raise v (see `escape_times`)
# dL / T of the simulated sharpnesses. The theory assumes a barrier of several temperatures; the lower ones show
# where it fails.
FITTED = (3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0, 6.5, 7.0)
OUTSIDE = (0.5, 1.0, 1.5, 2.0)
MIDDLE = 5.0  # dL / T at H = B, the same for all optimizers; it determines their learning rates
MIN_ESCAPES = 10  # with fewer, the mean escape time of a point is too uncertain to fit
_RELAX = 100  # steps before counting starts: several relaxation times
_CHECK_EVERY = 10  # steps between checks for escapes, which take far longer
_SWITCH_RATE = 1e-7  # DualAdam's alpha falls by only 0.001 in 10,000 steps
_WARM_STEPS = 1e6  # step count at the start, where Adam's bias corrections are 1


class Rule(NamedTuple):
    """An optimizer of the study: ``sgd``, ``adam``, ``invadam`` or ``dualadam`` at a fixed ``alpha``."""

    name: str
    alpha: float | None  # weight of the inverse update; None for SGD, which has no second moment

    @property
    def slope(self) -> float:
        """Theoretical slope of log(log(tau / tau_0)) against log(H), at H = B."""
        return -1.0 if self.alpha is None else -(0.5 + self.alpha)

    def mobility(self, sharpness):
        """P near a minimum of that sharpness (a number or a tensor)."""
        if self.alpha is None:
            return 1.0 + 0.0 * sharpness
        root = (sharpness / BATCH_SIZE) ** 0.5
        return (1 - self.alpha) / root + self.alpha * root

    def sharpness_at(self, ratio: float) -> float:
        """The sharpness H at which the barrier is ``ratio`` temperatures high."""
        # dL / T is MIDDLE / (P * H / B), as the learning rate makes it MIDDLE at H = B, where P = 1.
        return optimize.brentq(lambda h: self.mobility(h) * h / BATCH_SIZE - MIDDLE / ratio, 1e-6, 1e6)


RULES = (
    Rule("sgd", None),
    Rule("adam", 0.0),
    Rule("invadam", 1.0),
    Rule("dualadam", 0.25),
    Rule("dualadam", 0.5),
    Rule("dualadam", 0.75),
)
LEARNING_RATE = 2 * BARRIER / MIDDLE  # of every optimizer: P = 1 at H = B for all of them


class EscapeTime(NamedTuple):
    """One measured point: the particles of one sharpness, optimizer and seed."""

    optimizer: str
    alpha: float | None
    seed: int
    sharpness: float  # H, curvature of the loss at the minimum
    learning_rate: float
    theory: float  # dL / T: log_ratio according to the theory
    escapes: int  # number of particles that escaped
    mean_escape_steps: float  # tau; infinite if none escaped
    attempt_steps: float  # tau_0, from the theory
    log_ratio: float  # log(tau / tau_0), what the slopes are fitted to
    fitted: bool  # within the range of the theory


def build_optimizer(rule: Rule, param: Tensor, noise_variance: Tensor) -> torch.optim.Optimizer:
    """Build the optimizer of a rule with converged moments, as the theory assumes.

    All rules average the gradient over the same window (SGD by ``momentum`` = ``dampening``), so only P differs.

    Args:
        rule: which optimizer.
        param: positions of the particles, any shape.
        noise_variance: C, shaped like ``param``; the second moments start there.

    Returns:
        The optimizer.
    """
    beta1 = BETAS[0]
    step = _WARM_STEPS
    if rule.name == "sgd":
        optimizer = torch.optim.SGD([param], lr=LEARNING_RATE, momentum=beta1, dampening=beta1)
    elif rule.name == "dualadam":
        optimizer = DualAdam([param], lr=LEARNING_RATE, betas=BETAS, switch_rate=_SWITCH_RATE)
        step = (1 - rule.alpha) / _SWITCH_RATE
    else:
        optimizer_class = {"adam": torch.optim.Adam, "invadam": InvAdam}[rule.name]
        optimizer = optimizer_class([param], lr=LEARNING_RATE, betas=BETAS)
    if rule.name == "sgd":
        state = {"momentum_buffer": torch.zeros_like(param)}
    else:
        state = {
            "step": torch.tensor(step, dtype=torch.float32),
            "exp_avg": torch.zeros_like(param),
            "exp_avg_sq": noise_variance.clone(),
        }
    optimizer.load_state_dict({"state": {0: state}, "param_groups": optimizer.state_dict()["param_groups"]})
    return optimizer


def attempt_steps(rule: Rule, sharpness: float) -> float:
    """Prefactor tau_0 of the mean escape time, in steps: Kramers' formula of the module's docstring.

    Args:
        rule: which optimizer.
        sharpness: H. At the top of the barrier of :func:`escape_times`'s double well the curvature is -H/2.
    """
    gamma = -math.log(BETAS[0])
    at_minimum = math.sqrt(LEARNING_RATE * rule.mobility(sharpness) * gamma * sharpness)
    at_top = at_minimum / math.sqrt(2)
    return 2 * math.pi / at_minimum * at_top / (math.sqrt(gamma**2 / 4 + at_top**2) - gamma / 2)


@torch.no_grad()
def escape_times(rule: Rule, particles: int = 1024, steps: int = 10_000, seed: int = 0) -> list[EscapeTime]:
    """Measure the mean escape time of one optimizer at each sharpness of ``OUTSIDE`` and ``FITTED``.

    Every element of one tensor is a particle in the double well dL * ((x/w)^2 - 1)^2, whose sharpness is
    H = 8 dL / w^2, with gradient noise of variance H / B. It starts in the minimum at w and has escaped when it
    reaches the one at -w. The mean of an exponential waiting time is estimated as (particle steps waited) /
    (escapes), which also counts the particles that are still waiting.

    Args:
        rule: which optimizer.
        particles: particles per sharpness, >= 1. Default 1024.
        steps: optimizer steps, >= 1. Default 10,000.
        seed: of the noise, which also differs between rules. Default 0.

    Returns:
        One point per sharpness.
    """
    ratios = OUTSIDE + FITTED
    sharpness = torch.tensor([[rule.sharpness_at(ratio)] for ratio in ratios])
    noise_variance = (sharpness / BATCH_SIZE).expand(-1, particles)
    noise_std = noise_variance.sqrt()
    width = (8 * BARRIER / sharpness).sqrt()
    x = torch.nn.Parameter(width.expand(-1, particles).clone())
    x.grad = torch.empty_like(x)
    optimizer = build_optimizer(rule, x, noise_variance)
    generator = torch.Generator().manual_seed(seed * len(RULES) + RULES.index(rule))

    waiting = torch.ones_like(x, dtype=torch.bool)
    waited = torch.zeros(len(ratios), dtype=torch.int64)  # particle steps
    escapes = torch.zeros_like(waited)
    for step in range(1, _RELAX + steps + 1):
        u = x / width
        x.grad.normal_(generator=generator).mul_(noise_std).add_(4 * BARRIER / width * (u**3 - u))
        optimizer.step()
        if step % _CHECK_EVERY == 0:
            before = waiting.sum(1)
            waiting &= x > -width
            if step > _RELAX:
                waited += before * _CHECK_EVERY
                escapes += before - waiting.sum(1)

    points = []
    for index, ratio in enumerate(ratios):
        h, count = float(sharpness[index]), int(escapes[index])
        tau = int(waited[index]) / count if count else math.inf
        tau_0 = attempt_steps(rule, h)
        fitted = ratio in FITTED and count >= MIN_ESCAPES
        log_ratio = math.log(tau / tau_0) if tau > 0 else math.nan
        points.append(EscapeTime(*rule, seed, h, LEARNING_RATE, ratio, count, tau, tau_0, log_ratio, fitted))
    return points


def fit_slope(points: list[EscapeTime]) -> dict[str, float | list[float] | int]:
    """Least-squares slope of log(log(tau / tau_0)) against log(H) over the points marked as fitted.

    Args:
        points: of one rule, any seeds.

    Returns:
        ``slope``, ``ci95`` (its 95 % confidence interval, from the scatter of the points) and ``points`` (how many).

    Raises:
        ValueError: fewer than three points can be fitted.
    """
    fitted = [point for point in points if point.fitted]
    if len(fitted) < 3:
        raise ValueError(
            f"{len(fitted)} sharpnesses of {points[0].optimizer} had {MIN_ESCAPES} escapes or more; a slope "
            "needs 3: increase particles or steps."
        )
    x = [math.log(point.sharpness) for point in fitted]
    y = [math.log(point.log_ratio) for point in fitted]
    line = stats.linregress(x, y)
    slope, half = float(line.slope), float(line.stderr * stats.t.ppf(0.975, len(fitted) - 2))
    return {"slope": slope, "ci95": [slope - half, slope + half], "points": len(fitted)}


class ValleyWalk(NamedTuple):
    """Paths of particles over :func:`two_valleys`."""

    paths: Tensor  # (steps + 1, particles shown, 2)
    share_flat: float  # fraction of all particles in the flat valley at the end


SHARP, FLAT = 2.0, 0.5  # sharpness of the two valleys


def two_valleys(position: Tensor) -> Tensor:
    """A loss over the plane: a sharp valley at x < 0 and a flat one at x > 0, of equal depth.

    Args:
        position: (..., 2), x and y.

    Returns:
        The loss, (...,).
    """
    x, y = position.unbind(-1)
    curvature = _valley_curvature(position)
    width = torch.where(x < 0, (8 * BARRIER / SHARP) ** 0.5, (8 * BARRIER / FLAT) ** 0.5)
    return BARRIER * ((x / width) ** 2 - 1) ** 2 + 0.5 * curvature * y**2


def _valley_curvature(position: Tensor) -> Tensor:
    return SHARP + (FLAT - SHARP) * torch.sigmoid(8 * position[..., 0])


def walk_valleys(rule: Rule, particles: int = 512, steps: int = 3000, seed: int = 0, shown: int = 3) -> ValleyWalk:
    """Start particles at the bottom of the sharp valley of :func:`two_valleys`, with noise of variance H / B.

    Args:
        rule: which optimizer; all use the same learning rate.
        particles: number of particles. Default 512.
        steps: optimizer steps. Default 3000.
        seed: of the noise. Default 0.
        shown: number of particles whose paths are kept. Default 3.

    Returns:
        Paths, and the fraction of particles that end in the flat valley.
    """
    start = torch.tensor([-((8 * BARRIER / SHARP) ** 0.5), 0.0])
    position = torch.nn.Parameter(start.repeat(particles, 1))
    noise_variance = torch.full_like(position, SHARP / BATCH_SIZE)
    optimizer = build_optimizer(rule, position, noise_variance.detach())
    generator = torch.Generator().manual_seed(seed)
    paths = [position.detach()[:shown].clone()]
    for _ in range(steps):
        optimizer.zero_grad()
        two_valleys(position).sum().backward()
        noise_std = (_valley_curvature(position.detach()) / BATCH_SIZE).sqrt()[:, None]
        position.grad += noise_std * torch.randn(position.shape, generator=generator)
        optimizer.step()
        paths.append(position.detach()[:shown].clone())
    return ValleyWalk(torch.stack(paths), float((position[:, 0] > 0).float().mean()))
