"""`objective.bind(model)` under torch.compile, autocast, torch.func, DDP, Lightning: the gradients stay the same."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import zuko
from torch import nn
from torch.distributions import Independent, Normal
from torch.func import functional_call, grad
from torch.nn.parallel import DistributedDataParallel

from mcobjectives import IWAE, VAE, ModelError, Objective
from mcobjectives.evaluation import evaluate, layer_activity
from mcobjectives.likelihoods import bernoulli_log_likelihood

OBJECTIVES = [
    IWAE(k=6),
    IWAE(k=6, gradient="dreg"),
    IWAE(k=6, gradient="vimco"),
    IWAE(k=6, chunk_size=2),
    IWAE(k=6, gradient="dreg", backward_samples=2),
]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 6))
        self.decoder = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 10))

    def posterior(self, x):
        mean, log_std = self.encoder(x).float().chunk(2, -1)  # under autocast: q and its samples in float32
        return Independent(Normal(mean, log_std.exp()), 1)

    def log_prior(self, h):
        return Normal(0.0, 1.0).log_prob(h).sum(-1)

    def log_likelihood(self, x, h):
        return bernoulli_log_likelihood(self.decoder(h), x)


@pytest.fixture
def data():
    torch.manual_seed(0)
    return Model(), torch.rand(12, 10).round()


def eager(objective: Objective, model: Model, x) -> dict[str, torch.Tensor]:
    """The gradients of an ordinary step from seed 1, by the names that `bind` gives the parameters."""
    bound = objective.bind(copy.deepcopy(model))
    torch.manual_seed(1)
    bound(x).backward()
    return {name: p.grad for name, p in bound.named_parameters()}


def agree(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_ddp(data, objective):
    model, x = data
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        replica = DistributedDataParallel(objective.bind(copy.deepcopy(model)))
        for _ in range(2):  # a parameter that DDP found unused would fail the second step
            replica.zero_grad()
            torch.manual_seed(1)
            replica(x).backward()
        found = {name.removeprefix("module."): p.grad for name, p in replica.named_parameters()}
    finally:
        dist.destroy_process_group()
    agree(found, eager(objective, model, x))


def test_a_replicated_model_is_told_to_wrap_the_loss(data):
    """Its .module would train each replica by its own half of the batch alone."""
    model, x = data
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        replica = DistributedDataParallel(copy.deepcopy(model))
        with pytest.raises(ModelError, match=r"DistributedDataParallel\(objective.bind\(model.module\)\)") as error:
            IWAE(k=2)(replica, x)
        assert "its .module" not in str(error.value)
    finally:
        dist.destroy_process_group()
    with pytest.raises(ModelError, match=r"its \.module has: give that"):
        IWAE(k=2)(torch.nn.DataParallel(copy.deepcopy(model)), x)


def test_shapes_can_be_planned_on_the_meta_device():
    """With distributions that do not look at their parameters, as torch's own do."""

    class Planned(torch.nn.Linear):
        def posterior(self, x):
            return Independent(Normal(self(x), 1.0, validate_args=False), 1)

        def log_joint(self, x, h):
            return -((h - x) ** 2).sum(-1)

    model, x = Planned(3, 3).to("meta"), torch.zeros(4, 3, device="meta")
    for objective in (IWAE(k=2), IWAE(k=4, chunk_size=2), VAE(k=2, gradient="vimco")):
        loss = objective(model, x)
        loss.backward()
        assert loss.is_meta and model.weight.grad.shape == (3, 3) and objective.bound(model, x).shape == (4,)


def worker(rank: int, folder: str, objectives: list[Objective], model: Model, x) -> None:
    """One of two processes: its half of the batch, its own seed; it leaves the gradients after DDP's average."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        for number, objective in enumerate(objectives):
            replica = DistributedDataParallel(objective.bind(copy.deepcopy(model)))
            for _ in range(2):
                replica.zero_grad()
                torch.manual_seed(rank)
                replica(x.chunk(2)[rank]).backward()
            torch.save([p.grad for p in replica.parameters()], f"{folder}/{number}-{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_ddp_of_two_processes_averages_the_gradients_of_their_halves(data, tmp_path):
    model, x = data
    torch.multiprocessing.start_processes(worker, (str(tmp_path), OBJECTIVES, model, x), nprocs=2)
    for number, objective in enumerate(OBJECTIVES):
        halves = []
        for rank in (0, 1):
            bound = objective.bind(copy.deepcopy(model))
            torch.manual_seed(rank)
            bound(x.chunk(2)[rank]).backward()
            halves.append([p.grad for p in bound.parameters()])
        for rank in (0, 1):
            found = torch.load(tmp_path / f"{number}-{rank}.pt", weights_only=True)
            for gradient, first, second in zip(found, *halves, strict=True):
                assert gradient.abs().max() > 0 and not torch.allclose(first, second)
                torch.testing.assert_close(gradient, (first + second) / 2)


@pytest.mark.parametrize(
    "objective", [o for o in OBJECTIVES if o.gradient != "dreg" and o.chunk_size is None], ids=repr
)
def test_torch_func(data, objective):
    model, x = data
    bound = objective.bind(model)
    torch.manual_seed(1)
    found = grad(lambda p: functional_call(bound, p, (x,)))({n: p.detach() for n, p in bound.named_parameters()})
    agree(found, eager(objective, model, x))


def test_an_analytic_kl_under_transforms(data):
    model, x = data
    bound = VAE(k=2, analytic_kl=True).bind(model)
    parameters = {name: p.detach() for name, p in bound.named_parameters()}
    torch.manual_seed(1)
    agree(grad(lambda p: functional_call(bound, p, (x,)))(parameters), eager(VAE(k=2, analytic_kl=True), model, x))
    two = {name: torch.stack((p, 2 * p)) for name, p in parameters.items()}
    ensemble = torch.vmap(lambda p: functional_call(bound, p, (x,)), randomness="same")
    with pytest.raises(
        ModelError, match=r"cannot see under vmap whether log_prior is N\(0, I\): give the model a `prior`"
    ):
        ensemble(two)
    model.prior = Independent(Normal(torch.zeros(3), 1.0), 1)
    assert torch.isfinite(ensemble(two)).all()


@pytest.mark.parametrize(
    "options",
    [
        *({"gradient": "dreg"}, {"gradient": "dreg", "backward_samples": 2}),
        *({"chunk_size": 2}, {"chunk_size": 2, "backward_samples": 2}),
    ],
    ids=str,
)
def test_torch_func_is_refused_where_the_backward_pass_evaluates_again(data, options):
    model, x = data
    bound = IWAE(k=6, **options).bind(model)
    with pytest.raises(RuntimeError, match=r"do not go with torch\.func.*use torch\.autograd\.grad"):
        grad(lambda p: functional_call(bound, p, (x,)))({n: p.detach() for n, p in bound.named_parameters()})


def functional(objective: Objective, module: Model, model: Model, x) -> dict[str, torch.Tensor]:
    """The gradients at the parameters of `model` when those of `module` are swapped for them during the call."""
    bound = objective.bind(module)
    parameters = {f"model.{name}": p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    torch.manual_seed(1)
    loss = functional_call(bound, parameters, (x,))
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


@pytest.mark.parametrize("objective", [o for o in OBJECTIVES if o.chunk_size is None], ids=repr)
def test_functional_call_with_autograd(data, objective):
    model, x = data
    agree(functional(objective, Model(), model, x), eager(objective, model, x))


class Flow(Model):
    """Its q looks the module's parameters up whenever a density is evaluated."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = zuko.flows.MAF(features=3, context=6, transforms=1, hidden_features=(8,))

    def posterior(self, x):
        return self.flow(self.encoder(x))


@pytest.mark.parametrize(
    "kind, objective", [(Flow, IWAE(k=6, gradient="dreg")), (Model, IWAE(k=6, chunk_size=2))], ids=["flow", "chunks"]
)
def test_functional_call_raises_where_the_backward_pass_evaluates_again(data, kind, objective):
    """With the module's own parameters, put back by then: a gradient would be silently wrong."""
    _, x = data
    with pytest.raises(RuntimeError, match=r"functional_call"):
        functional(objective, kind(), kind(), x)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_autocast(data, objective):
    model, x = data
    bound = objective.bind(copy.deepcopy(model))
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = bound(x)
    assert loss.dtype == torch.float32
    loss.backward()
    # The noise is the same, the networks' products have eight bits: the gradients are close, not equal.
    for name, expected in eager(objective, model, x).items():
        found = dict(bound.named_parameters())[name].grad
        assert found.dtype == torch.float32
        assert (found - expected).norm() < 0.03 * expected.norm(), name


def conditional_means(model, x):
    """Active units of a posterior whose conditional means are another network's, here the decoder's."""

    class Layered:
        def posterior(self, x):
            q = model.posterior(x)
            q.layer_means = lambda h: (h, model.decoder(h))
            return q

    layer_activity(Layered(), x)


@pytest.mark.parametrize(
    "before",
    [lambda model, x: IWAE(k=3).bound(model, x), lambda model, x: evaluate(model, x, k=50), conditional_means],
    ids=["bound", "evaluate", "layer_activity"],
)
def test_autocast_after_work_without_a_graph(data, before):
    """torch 2.9 keeps what it cast without a graph for code that has one."""
    model, x = data
    model = copy.deepcopy(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before(model, x)
        loss = IWAE(k=3)(model, x)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("objective", [*OBJECTIVES, VAE(k=2, analytic_kl=True)], ids=repr)
def test_compile(data, objective):
    model, x = data
    torch._dynamo.reset()
    copied = objective.bind(copy.deepcopy(model))
    # The pathwise scaling of DReG and STL breaks the graph, and so do the check that a prior is N(0, I), and chunks.
    whole = objective.gradient != "dreg" and not objective.analytic_kl and objective.chunk_size is None
    compiled = torch.compile(copied, fullgraph=whole, options={"fallback_random": True})
    torch.manual_seed(1)
    compiled(x).backward()
    agree({name: p.grad for name, p in copied.named_parameters()}, eager(objective, model, x), 1e-4)


def test_lightning(data):
    lightning = pytest.importorskip("lightning")
    model, x = data

    class Training(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.bound = IWAE(k=6, gradient="dreg").bind(copy.deepcopy(model))

        def training_step(self, batch, batch_idx):
            return self.bound(batch[0])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_steps=1, accelerator="cpu", enable_model_summary=False, **quiet)
    training = Training()
    torch.manual_seed(1)
    trainer.fit(training, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=12))
    moved = [
        p for p, before in zip(training.parameters(), model.parameters(), strict=True) if not torch.equal(p, before)
    ]
    assert len(moved) == len(list(model.parameters()))


class Chain(nn.Module):
    """q(h1 | x) q(h2 | h1): the upper network is evaluated again for the gradient."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.decoder = nn.Linear(10, 4), nn.Linear(4, 4), nn.Linear(4, 10)

    def posterior(self, x):
        model = self

        class Posterior:
            def rsample(self, shape):
                h1 = Normal(model.first(x).float(), 0.5).rsample(shape)
                return h1, Normal(model.second(h1).float(), 0.5).rsample()

            def sample(self, shape):
                with torch.no_grad():
                    return self.rsample(shape)

            def log_prob(self, h):
                q1, q2 = Normal(model.first(x).float(), 0.5), Normal(model.second(h[0]).float(), 0.5)
                return q1.log_prob(h[0]).sum(-1) + q2.log_prob(h[1]).sum(-1)

        return Posterior()

    def log_prior(self, h):
        return sum(Normal(0.0, 1.0).log_prob(part).sum(-1) for part in h)

    def log_likelihood(self, x, h):
        return Normal(self.decoder(h[1]).float(), 1.0).log_prob(x).sum(-1)


@pytest.mark.parametrize(
    "options",
    [{"gradient": "dreg"}, {"gradient": "vimco"}, {"gradient": "dreg", "chunk_size": 2}, {"backward_samples": 3}],
)
def test_autocast_of_several_layers(options):
    torch.manual_seed(0)
    model, x = Chain(), torch.rand(12, 10).round()
    objective, found = IWAE(k=6, **options), []
    for enabled in (False, True):
        model.zero_grad()
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = objective(model, x)
        loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (found[1] - found[0]).norm() < 0.03 * found[0].norm()
