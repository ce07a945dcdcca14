"""attnbench: which attention kernel runs, how fast it is, and what an upgrade will do to it."""

__version__ = "0.1.0"
