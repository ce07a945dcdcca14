"""asv owns commits, environments, A/B and publishing; attnbench owns the sweep and the truth.

Nothing is imported here: asv's children import `suite_support` once per parameter combination.
"""
