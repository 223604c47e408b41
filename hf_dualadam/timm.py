"""Makes the optimizers' names known to timm: ``create_optimizer_v2(model, opt="dualadam")`` after importing this.

Under ``hf-dualadam``, timm's own ``train.py`` takes ``--opt dualadam`` and ``--opt-kwargs switch_rate=1e-4``.
"""

from __future__ import annotations

import inspect

from timm.optim import _optim_factory

from .optimizers import OPTIMIZERS


def register() -> None:
    """Enter the optimizers into timm's registry; done by importing this module, may be called any number of times."""
    for name, optimizer_cls in OPTIMIZERS.items():
        if name in _optim_factory.list_optimizers():
            continue
        arguments = inspect.signature(optimizer_cls).parameters
        _optim_factory.default_registry.register(
            _optim_factory.OptimInfo(
                name=name,
                opt_class=optimizer_cls,
                description=(inspect.getdoc(optimizer_cls) or name).splitlines()[0],
                has_eps="eps" in arguments,
                has_betas="betas" in arguments,
            )
        )


register()
