r"""Lean convolutions, and residual networks made of them.

A convolution with a k x k kernel couples every output channel with every input channel at every one of its k*k
positions.  The lean operator of Ephrath, Ruthotto, Haber and Treister ("LeanResNet: A Low-cost yet Effective
Convolutional Residual Networks", ICML workshop 2019, `arXiv 1904.06952 <https://arxiv.org/abs/1904.06952>`_) keeps the
coupling at the centre, and lets each channel see its neighbourhood alone.  It is a sum, applied to one input::

    y = S x + P x            S: a small stencil for each channel            P: 1 x 1, couples all channels

    stencil       "full"         "5-point"      "4-point"
                  o o o             o              o
                  o o o           o o o          o   o
                  o o o             o              o

    weights for C channels: 9 C, 5 C or 4 C of the stencils and C*C of the 1 x 1 part, instead of 9*C*C

The centre of a stencil lies where the 1 x 1 part already has a weight (its diagonal), so "4-point" describes the same
operators as "5-point" with C parameters less.  It is the stencil of that paper.

Ephrath, Eliasof, Ruthotto, Haber and Treister ("LeanConvNets: Low-cost Yet Effective Convolutional Neural Networks",
IEEE JSTSP 14(4), 2020, `arXiv 1910.13157 <https://arxiv.org/abs/1910.13157>`_) let S couple groups of channels, which
trades cost for accuracy; here that is ``group_size``.  Where all channels are one group, both parts are run as one
convolution.

`LeanConv2d` is the operator, `leanify` puts it into any network, and `lean_resnet` makes residual networks of it.
"""

from __future__ import annotations

from lrcnn_lightning.models.lean.conversion import leanify
from lrcnn_lightning.models.lean.convolution import LeanConv2d
from lrcnn_lightning.models.lean.network import LeanResNet, lean_resnet
from lrcnn_lightning.models.lean.option import Stencil

__all__ = ["LeanConv2d", "LeanResNet", "Stencil", "lean_resnet", "leanify"]
