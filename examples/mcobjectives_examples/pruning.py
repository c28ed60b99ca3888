"""A trained model without its inactive units, as a smaller model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mcobjectives_examples.models import PaperModel


@torch.no_grad()
def pruned(model: PaperModel, units: Sequence[Sequence[int]]) -> PaperModel:
    """The model that has only these units of each stochastic layer, from x upwards, in p and q alike.

    A unit that is left out is no variable any more: its mean and standard deviation are deleted from q and p, and
    what read it loses that column. A layer may be left without units: what is above it then knows nothing of x, and
    with none at all p(x) is the decoder's bias. The result shares nothing with the model.

    Raises:
        ValueError: unless there is one list of distinct existing units per layer.

    Example:
        >>> model = PaperModel(torch.full((9,), 0.3), hidden=[8], latent=[5])
        >>> pruned(model, [[0, 3]]).posterior(torch.zeros(4, 9)).mean.shape
        torch.Size([4, 2])
    """
    layers: Any = model.encoder
    widths = [layer.mean.out_features for layer in layers]
    if len(units) != len(widths):
        raise ValueError(f"units must be one list for each of {len(widths)} layers, got {len(units)}")
    for kept, width in zip(units, widths, strict=True):
        if len(set(kept)) != len(kept) or not set(kept) <= set(range(width)):
            raise ValueError(f"units of a layer must be distinct and from 0 to {width - 1}, got {kept!r}")
    small: Any = copy.deepcopy(model)
    for i, kept in enumerate(units):
        _keep_outputs(small.encoder[i], kept)
        if i > 0:
            _keep_inputs(small.encoder[i].body[0], units[i - 1])
            _keep_outputs(small.prior_layers[i - 1], units[i - 1])
            _keep_inputs(small.prior_layers[i - 1].body[0], kept)
    _keep_inputs(small.decoder[0], units[0])
    return small


def _keep_outputs(layer: Any, kept: Sequence[int]) -> None:
    for linear in (layer.mean, layer.log_std):
        linear.weight = nn.Parameter(linear.weight[list(kept)])
        linear.bias = nn.Parameter(linear.bias[list(kept)])
        linear.out_features = len(kept)


def _keep_inputs(linear: Any, kept: Sequence[int]) -> None:
    linear.weight = nn.Parameter(linear.weight[:, list(kept)])
    linear.in_features = len(kept)
