"""Parts of a network that do not learn."""

from fnmatch import fnmatchcase

from torch import nn

from dnas.spec.checks import UserError, near_names

BatchNorm = nn.modules.batchnorm._BatchNorm  # of every dimension, and timm's with an activation


def _matches(name: str, patterns: str) -> bool:
    """Whether a pattern matches this name, or that of a module around it."""
    parts = name.split(".")
    around = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    return any(fnmatchcase(outer, pattern) for outer in around for pattern in patterns.split(",") if pattern)


def freeze(model: nn.Module, patterns: str) -> None:
    """Put a network into training mode, but for its frozen parts.

    ``patterns`` are shell patterns (``*`` is any text, ``?`` one letter) with commas between them, on the names of
    modules and parameters. A matching module is frozen with all that is in it: its parameters get no gradient, and its
    batch norms are in eval mode, so that their statistics stay, too.
    """
    model.train()
    for name, p in model.named_parameters():
        if _matches(name, patterns):
            p.requires_grad_(False)
    for name, module in model.named_modules():
        if isinstance(module, BatchNorm) and _matches(name, patterns):
            module.eval()


def check_patterns(model: nn.Module, patterns: str) -> None:
    """Raise UserError for a pattern that matches nothing in this network, or patterns that leave nothing to learn."""
    parameters = [name for name, _ in model.named_parameters()]
    for pattern in patterns.split(",") if patterns else ():
        if not any(_matches(name, pattern) for name in parameters):
            names = [name for name, _ in model.named_modules() if name]
            raise UserError(f"--freeze {pattern!r} matches no module with weights; {near_names(pattern, names)}")
    if all(_matches(name, patterns) for name in parameters):
        raise UserError(f"--freeze {patterns!r} matches every module: nothing is left to learn")
