"""Triton kernels, written for this project. Host code that launches them: `triton_launch.py`.

Functions here are Triton's language, not Python: one program works on one tile of query rows.

    rows.py       which request, token and head each row of a tile is
    softmax.py    running softmax of a tile, in base 2
    attention.py  paged (or dense) variable-length attention
    latent.py     MLA in its absorbed form over the latent cache
    merge.py      merges the segments of a split context
    cache.py      writes new keys and values, or latents, to their slots
"""
