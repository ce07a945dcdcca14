"""Families that a followed program's chains name, declared for selection: capabilities, no kernels.

One module per followed version. The facts come from that version's own files (each class names
where); nothing is copied. `attnbench explain --device sm90` can so give vLLM's answer on a machine
with neither the GPU nor vLLM; running one of these is refused, and says so.
"""
