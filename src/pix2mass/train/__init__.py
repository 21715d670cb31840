"""Training: ``pretrain`` makes network 1 from unlabelled images, ``train`` makes one network 2 per fold from labels.

Both are short callers of one ``fit``. Every random number is drawn from the seed and the epoch, never from what ran
before, so that a killed and resumed training ends where an undisturbed one does.
"""

from __future__ import annotations

from pix2mass.train.blend import RichnessBlend
from pix2mass.train.network1 import band_confusion, leave_one_group_out, load_encoder, pretrain, seen_before
from pix2mass.train.network2 import train

__all__ = [
    "RichnessBlend",
    "band_confusion",
    "leave_one_group_out",
    "load_encoder",
    "pretrain",
    "seen_before",
    "train",
]
