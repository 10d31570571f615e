from __future__ import annotations

import logging

import torch

torch.set_num_threads(1)

# pytest listens to every logger at every level, which makes torch write a trace of each capture.
logging.getLogger("torch.__trace").disabled = True
