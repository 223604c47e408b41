"""DualAdam in the paper's notation, one number at a time, in Python floats; shares no code with the package."""

import math


def dualadam(theta, grads, *, eta, beta1=0.9, beta2=0.999, eps=1e-8, lam=0.0, rate=0.01, start=0, m=0.0, v=0.0):
    """Final theta after one step per gradient, for a single number."""
    for t, g in enumerate(grads, start + 1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        m_hat = m / (1 - beta1**t)
        d = math.sqrt(v / (1 - beta2**t)) + eps
        alpha = max(0.0, 1 - t * rate)
        if alpha < rate:
            alpha = 0.0
        theta = theta - eta * lam * theta
        theta = theta - eta * ((1 - alpha) * m_hat / d + alpha * m_hat * d)
    return theta


def dualadam_normalized(theta, grads, *, eta, beta1=0.9, beta2=0.999, eps=1e-8, lam=0.0, rate=0.01):
    """The same for a tensor, given as a list of numbers, with the inverse part rescaled to the RMS of Adam's."""
    n = len(theta)
    m, v = [0.0] * n, [0.0] * n
    for t, g in enumerate(grads, 1):
        m = [beta1 * a + (1 - beta1) * b for a, b in zip(m, g)]
        v = [beta2 * a + (1 - beta2) * b * b for a, b in zip(v, g)]
        m_hat = [a / (1 - beta1**t) for a in m]
        d = [math.sqrt(a / (1 - beta2**t)) + eps for a in v]
        alpha = max(0.0, 1 - t * rate)
        if alpha < rate:
            alpha = 0.0
        adam = [a / b for a, b in zip(m_hat, d)]
        inverse = [a * b for a, b in zip(m_hat, d)]
        rms_adam = math.sqrt(sum(a * a for a in adam) / n)
        rms_inverse = math.sqrt(sum(a * a for a in inverse) / n)
        ratio = rms_adam / rms_inverse if rms_inverse > 0 else 0.0
        theta = [
            x - eta * lam * x - eta * ((1 - alpha) * a + alpha * ratio * i) for x, a, i in zip(theta, adam, inverse)
        ]
    return theta
