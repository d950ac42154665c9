"""One post-copy destination for every VMM."""

__version__ = "0.1.0"
