"""Plug-ins shipped with attnbench: found by entry point only, as anybody's would be."""
