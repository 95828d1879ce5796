"""dnas: a network inside a budget, searched by gradient descent, exported as a plain timm model."""

__version__ = "0.1.0"
