"""Register the optimizers with timm: importing this module enables ``create_optimizer_v2(model, opt="dualadam")``.

Under ``hf-dualadam``, timm's own ``train.py`` takes ``--opt dualadam`` and ``--opt-kwargs switch_rate=1e-4``.
"""

from __future__ import annotations

import inspect

from timm.optim import _optim_factory

from .optimizers import OPTIMIZERS


def register() -> None:
    """Add the optimizers to timm's registry. Importing this module calls it; it may be called repeatedly."""
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
