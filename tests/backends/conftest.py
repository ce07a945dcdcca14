"""One torch thread per test process: tensors here are tiny, and idle OpenMP threads spin."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
