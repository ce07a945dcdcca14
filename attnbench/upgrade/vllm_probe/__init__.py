"""Runs an installed vLLM's own selector for a chosen compute capability, without its GPU.

This package runs inside the environment of the vLLM that is asked, in a process of its own: it
imports nothing of attnbench and nothing beyond the standard library, torch and vLLM. The rest of
attnbench starts it through `attnbench.upgrade.probe`.
"""
