"""Every objective with every estimator, and whether a loss in chunks is the loss."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from toys import F64, Curved, Jackknife, assert_same, loss_gradient, registered

from mcobjectives import IWAE, MIWAE, Split

ESTIMATORS = ["reparam", "stl", "dreg", "score", "vimco", "rws"]


X = torch.tensor([0.9, -0.4, 2.0], dtype=F64)


def with_every_estimator(*objectives):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [replace(o, gradient=g) for o in objectives for g in ESTIMATORS if o.smooth or g not in ("stl", "dreg")]


def assert_same_in_chunks(objective, model, x, sizes, tolerance=1e-10):
    value, gradient = loss_gradient(objective, model, x)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    bound = objective.bound(model, x)
    for size in sizes:
        chunked = replace(objective, chunk_size=size)
        found, found_gradient = loss_gradient(chunked, model, x)
        assert torch.equal(torch.get_rng_state(), state)  # so that seeds compose: the next draw is the same too
        torch.testing.assert_close(found, value, rtol=0, atol=tolerance)
        assert_same(found_gradient, gradient, tolerance)
        torch.manual_seed(0)
        torch.testing.assert_close(chunked.bound(model, x), bound, rtol=0, atol=tolerance)


EVERY = [
    *with_every_estimator(*registered(6), Curved(k=6), Jackknife(k=6), IWAE(k=6, kl_weight=0.6)),
    *[Split(IWAE(k=6), inference) for inference in with_every_estimator(MIWAE(2, 3))],
]
