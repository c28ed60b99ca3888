"""The paper's one-layer model as Pyro programs: SVI ends where the library's own loop does."""

import pytest
import torch

from mcobjectives import IWAE
from mcobjectives.evaluation import evaluate
from mcobjectives_examples.binarisation import test_set
from mcobjectives_examples.datasets import load
from mcobjectives_examples.models import PaperModel, paper_model

pyro = pytest.importorskip("pyro")
import pyro.distributions as dist  # noqa: E402
from pyro.infer import SVI  # noqa: E402

from mcobjectives.pyro import ObjectiveELBO  # noqa: E402

PASSES, BATCH, RATE = 6, 100, 2e-3


def batches(images: torch.Tensor):
    generator = torch.Generator().manual_seed(0)
    for _ in range(PASSES):
        yield from images[torch.randperm(len(images), generator=generator)].split(BATCH)


def by_svi(vae: PaperModel, images: torch.Tensor, objective: IWAE) -> None:
    def guide(x):
        pyro.module("vae", vae)
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Normal(*vae.encoder[0](x)).to_event(1))

    def model(x):
        pyro.module("vae", vae)
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Normal(torch.zeros(50), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=vae.decoder(h), validate_args=False).to_event(1), obs=x)

    pyro.clear_param_store()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": RATE}), loss=ObjectiveELBO(objective))
    for x in batches(images):
        svi.step(x)


def natively(vae: PaperModel, images: torch.Tensor, objective: IWAE) -> None:
    optimiser = torch.optim.Adam(vae.parameters(), lr=RATE)
    for x in batches(images):
        optimiser.zero_grad()
        objective(vae, x).backward()
        optimiser.step()


@pytest.mark.parametrize("gradient", ["reparam", "dreg"])
def test_svi_of_the_one_layer_model_reaches_the_nll_of_the_native_loop(gradient):
    digits = load("digits")
    images, held_out = (digits.train > 0.5).float(), test_set(digits.test, "once")
    nlls = []
    for train in (natively, by_svi):
        torch.manual_seed(0)
        vae = paper_model(1, images.mean(0))
        before = evaluate(vae, held_out, k=200).nll
        torch.manual_seed(1)
        train(vae, images, IWAE(k=5, gradient=gradient))
        torch.manual_seed(2)
        nlls.append(evaluate(vae, held_out, k=200).nll)
    assert nlls[0] < before - 5  # both have learnt something to compare
    assert abs(nlls[0] - nlls[1]) < 0.05
