"""What does not fit is refused with an error that says what and why, before any compute where that can be."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch.distributions import (
    AffineTransform,
    Bernoulli,
    Categorical,
    Exponential,
    GeneralizedPareto,
    HalfNormal,
    Independent,
    LogNormal,
    MixtureSameFamily,
    Normal,
    OneHotCategoricalStraightThrough,
    Pareto,
    SigmoidTransform,
    TransformedDistribution,
    Uniform,
)
from toys import F64, Discrete, Gaussian1D, LinearGaussian, Mixed, Toy, TwoLayers

from mcobjectives import (
    IWAE,
    MIWAE,
    VAE,
    LAlpha,
    Model,
    ModelError,
    Objective,
    PluginError,
    Posterior,
    Power,
    Split,
    get_objective,
    objective_names,
    parameterless,
)
from mcobjectives.estimators import require_smooth
from mcobjectives.evaluation import evaluate, layer_activity
from mcobjectives.sampling import moving_support

X = torch.tensor([0.9, -0.4, 2.0, 0.1], dtype=F64)
PATHWISE = ["reparam", "stl", "dreg"]
pytestmark = pytest.mark.filterwarnings("ignore:gradient='stl' is biased")


def never(*_):
    raise AssertionError("computed before the check")


def test_distributions_and_toys_are_structurally_models_and_posteriors():
    assert isinstance(LinearGaussian(), Model) and isinstance(Toy(), Model) and not isinstance(object(), Model)
    assert isinstance(Normal(0.0, 1.0), Posterior) and isinstance(TwoLayers().posterior(X), Posterior)


# Missing methods.


def test_a_wrapped_model_is_told_apart():
    average = torch.optim.swa_utils.AveragedModel(Gaussian1D())
    with pytest.raises(ModelError, match=r"needs AveragedModel to have .*posterior: its \.module has: give that"):
        IWAE(k=2)(average, X)
    assert torch.isfinite(IWAE(k=2)(average.module, X))


def test_a_posterior_is_named_with_what_it_is_made_of():
    model = Toy()
    model.posterior = lambda x: Independent(Bernoulli(logits=x.unsqueeze(-1)), 1)
    with pytest.raises(ModelError, match=r"rsample, which Independent\(Bernoulli\) does not have"):
        IWAE(k=2)(model, X)


def test_one_data_point_without_a_batch_axis_is_said():
    with pytest.raises(ModelError, match=r"has shape \(2,\), expected .*: give x a batch axis"):
        IWAE(k=2)(Toy(), X[0])


def test_a_model_without_a_posterior_is_named():
    class Nothing:
        log_joint = staticmethod(never)

    for objective in (IWAE(k=2), VAE(k=1, analytic_kl=True)):
        with pytest.raises(ModelError, match=r"needs Nothing to have the method\(s\) posterior"):
            objective(Nothing(), X)


@pytest.mark.parametrize("missing", ["log_likelihood", "log_prior", "both"])
def test_a_model_needs_its_joint_or_both_its_parts(missing):
    class Part:
        posterior = staticmethod(never)

    for name in {"log_likelihood", "log_prior"} - {missing}:
        if missing != "both":
            setattr(Part, name, staticmethod(never))
    expected = "log_likelihood, log_prior" if missing == "both" else missing
    for use in (IWAE(k=2), IWAE(k=2).bound):
        with pytest.raises(ModelError, match=rf"Part to have the method\(s\) {expected}: .*log_joint"):
            use(Part(), X)


@pytest.mark.parametrize("objective", [LAlpha(k=2, alpha=0.5), IWAE(k=2, kl_weight=0.5)], ids=repr)
def test_tempering_needs_both_parts_and_says_so_before_any_compute(objective):
    model = Toy(posterior=never, log_joint=never)
    with pytest.raises(ModelError, match=r"a tempered objective needs Toy .*log_likelihood, log_prior"):
        objective(model, X)


def test_l_alpha_at_one_is_content_with_the_joint():
    torch.manual_seed(0)
    expected = VAE(k=3)(Toy(), X)
    torch.manual_seed(0)
    assert LAlpha(k=3, alpha=1.0)(Toy(), X) == expected


def test_a_posterior_that_cannot_be_sampled_or_evaluated_is_named():
    class Mute:
        def log_prob(self, h): ...

    class Blind:
        def rsample(self, shape): ...

    with pytest.raises(ModelError, match="Mute has neither sample nor rsample"):
        IWAE(k=2, gradient="score")(Toy(posterior=lambda x: Mute(), log_joint=never), X)
    with pytest.raises(ModelError, match=r"the posterior Blind has no log_prob\(h\)"):
        IWAE(k=2)(Toy(posterior=lambda x: Blind(), log_joint=never), X)


# Discrete and mixed latents.

UNDIFFERENTIABLE = [
    lambda x: Bernoulli(logits=x),
    lambda x: Independent(Bernoulli(logits=x.unsqueeze(-1)), 1),
    lambda x: Categorical(logits=torch.stack([x, -x], -1)),
    lambda x: MixtureSameFamily(Categorical(torch.ones(2)), Normal(x.unsqueeze(-1) + torch.zeros(2), 1.0)),
]


@pytest.mark.parametrize("gradient", PATHWISE)
@pytest.mark.parametrize("posterior", UNDIFFERENTIABLE)
@pytest.mark.parametrize("extra", [{}, {"chunk_size": 1}, {"backward_samples": 1}], ids=str)
def test_pathwise_on_a_posterior_without_rsample_raises_before_compute(posterior, gradient, extra):
    model = Toy(posterior=lambda x: posterior(x.requires_grad_()), log_joint=never)
    with pytest.raises(ModelError, match=r'needs rsample, which .* does not have: use gradient="score" or "vimco"'):
        IWAE(k=2, gradient=gradient, **extra)(model, X.clone())


@pytest.mark.parametrize("gradient", PATHWISE)
@pytest.mark.parametrize("extra", [{}, {"chunk_size": 1}, {"backward_samples": 1}], ids=str)
def test_pathwise_on_a_mixed_latent_raises_before_the_joint(gradient, extra):
    model = Mixed()
    model.log_joint = never if not extra.get("backward_samples") else model.log_joint
    with pytest.raises(ModelError, match=r"part\(s\) \[0\] of h \(2 in all\) carry no gradient.*score.*vimco"):
        IWAE(k=2, gradient=gradient, **extra)(model, X)


class Named:
    """The posterior of `Mixed`, with names for the parts of h, the second a tuple of one."""

    def __init__(self, pair):
        self.pair = pair

    def rsample(self, shape):
        coin, z = self.pair.rsample(shape)
        return {"coin": coin, "layer": (z,)}

    def log_prob(self, h):
        return self.pair.log_prob((h["coin"], h["layer"][0]))


@pytest.mark.parametrize("frozen", [False, True])
def test_parts_of_h_without_a_gradient_are_told_by_their_names(frozen):
    mixed = Mixed()
    for parameter in (mixed.q_b, mixed.q_m, mixed.q_n, mixed.q_r):
        parameter.requires_grad_(not frozen)
    model = Toy(posterior=lambda x: Named(mixed.posterior(x)), log_joint=never)
    names = "'coin', 'layer'" if frozen else "'coin'"
    with pytest.raises(ModelError, match=rf"^part\(s\) {names} of h carry no gradient"):
        IWAE(k=2)(model, X)


@pytest.mark.parametrize("gradient", ["score", "vimco", "rws"])
@pytest.mark.parametrize("make", [Discrete, Mixed])
def test_discrete_and_mixed_latents_train_by_the_score_family(make, gradient):
    model = make()
    IWAE(k=3, gradient=gradient)(model, X).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_the_bound_needs_no_rsample():
    assert torch.isfinite(IWAE(k=3).bound(Discrete(), X)).all()
    assert torch.isfinite(IWAE(k=3, gradient="dreg").bound(Mixed(), X)).all()
    with torch.no_grad():
        assert torch.isfinite(IWAE(k=3, gradient="dreg")(Discrete(), X))


def test_a_frozen_layer_of_several_is_refused_with_how_to_freeze_it():
    model = TwoLayers()
    for parameter in (model.q_m1, model.q_r1, model.shared):
        parameter.requires_grad_(False)
    with pytest.raises(ModelError, match="frozen is left out of the optimiser"):
        IWAE(k=2)(model, X)


class Detaching:
    """An rsample that silently cuts the gradient."""

    def __init__(self, posterior):
        self.posterior, self.log_prob = posterior, posterior.log_prob

    def rsample(self, shape):
        return self.posterior.rsample(shape).detach()


@pytest.mark.parametrize("gradient", PATHWISE)
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_an_rsample_that_detaches_raises(gradient, chunk_size):
    loc = torch.nn.Parameter(torch.zeros(4, dtype=F64))
    model = Toy(posterior=lambda x: Detaching(Normal(loc, 1.0)), log_joint=never)
    with pytest.raises(ModelError, match=r"part\(s\) \[0\] of h \(1 in all\) carry no gradient"):
        IWAE(k=2, gradient=gradient, chunk_size=chunk_size)(model, X)


@pytest.mark.parametrize("gradient", PATHWISE)
def test_a_fixed_posterior_needs_no_gradient(gradient):
    scale = torch.nn.Parameter(torch.ones((), dtype=F64))
    model = Toy(posterior=lambda x: Normal(x, 1.0), log_joint=lambda x, h: Normal(x, scale).log_prob(h))
    IWAE(k=3, gradient=gradient)(model, X).backward()
    assert scale.grad.abs() > 0


# Shapes, devices, numbers.


def shaped(log_p, log_q):
    """A model whose log-densities have the given shapes."""

    class Shaped(Normal):
        def log_prob(self, h):
            return torch.zeros(log_q, dtype=F64)

    return Toy(
        posterior=lambda x: Shaped(torch.zeros(4, dtype=F64), 1.0),
        log_joint=lambda x, h: torch.zeros(log_p, dtype=F64),
    )


@pytest.mark.parametrize(
    ("log_p", "log_q", "message"),
    [
        (
            (3, 4, 7),
            (3, 4),
            r"log p\(x, h\) has shape \(3, 4, 7\), expected \(k, batch\) with k = 3: sum over the event",
        ),
        ((3, 4), (3, 4, 7), r"log q\(h \| x\) has shape \(3, 4, 7\), expected .*Independent"),
        ((4,), (3, 4), r"log p\(x, h\) has shape \(4,\)"),
        ((), (3, 4), r"log p\(x, h\) has shape \(\)"),
        ((3, 4), (3, 1), r"log p\(x, h\) has shape \(3, 4\) and log q\(h \| x\) \(3, 1\)"),
        ((4, 3), (4, 3), r"\(4, 3\).*expected both to be \(k, batch\) with k = 3"),
        ((1, 4), (3, 4), r"\(1, 4\) and log q\(h \| x\) \(3, 4\)"),
        ((3, 0), (3, 0), "the batch is empty"),
    ],
)
@pytest.mark.parametrize("extra", [{}, {"gradient": "score"}, {"backward_samples": 1}], ids=str)
def test_wrong_shapes_are_reported_with_the_shape_that_was_expected(log_p, log_q, message, extra):
    with pytest.raises(ModelError, match=message):
        IWAE(k=3, **extra)(shaped(log_p, log_q), X)
    with pytest.raises(ModelError, match=message):
        IWAE(k=3).bound(shaped(log_p, log_q), X)


def test_an_unsummed_event_dimension_of_real_distributions_is_reported():
    class Unsummed(LinearGaussian):
        def log_likelihood(self, x, h):
            return Normal(h @ self.weight.T + self.bias, 1.0).log_prob(x)

    for use in (IWAE(k=3), VAE(k=3)):
        with pytest.raises(ValueError, match="sum over the event dimensions"):
            use(Unsummed(), LinearGaussian().data(3))  # three by three would broadcast


def test_an_empty_batch_is_refused_by_every_objective():
    for name in objective_names():
        with pytest.raises(ModelError, match="the batch is empty"):
            get_objective(name)()(LinearGaussian(), torch.zeros(0, 3, dtype=F64))


def test_an_empty_batch_of_several_parts_is_refused_with_their_shapes():
    parts = {"x": torch.zeros(0, 3, dtype=F64), "y": torch.zeros(0)}
    with pytest.raises(ModelError, match=r"the batch is empty: x has shape \(0, 3\), \(0,\)"):
        IWAE(k=2)(LinearGaussian(), parts)


def test_an_empty_tensor_beside_data_of_another_kind_is_no_empty_batch():
    class Lists(LinearGaussian):
        def posterior(self, x):
            return super().posterior(torch.tensor(x["x"], dtype=F64))

        def log_likelihood(self, x, h):
            return super().log_likelihood(torch.tensor(x["x"], dtype=F64), h)

    parts = {"x": LinearGaussian().data().tolist(), "missing": torch.zeros(0, 2)}
    assert IWAE(k=2)(Lists(), parts).isfinite()


@dataclass
class Opaque:
    h: torch.Tensor


@pytest.mark.parametrize(
    ("wrapped", "named"), [(lambda h: (h, None), "NoneType"), (lambda h: [h, 3], "int"), (Opaque, "Opaque")]
)
@pytest.mark.parametrize(
    "use",
    [
        *(IWAE(k=4, **options) for options in ({}, {"gradient": "vimco"}, {"chunk_size": 2}, {"backward_samples": 2})),
        lambda model, x: evaluate(model, x, k=30),
        layer_activity,
    ],
    ids=["whole", "vimco", "chunks", "few", "evaluate", "layer_activity"],
)
def test_a_part_of_h_that_is_no_tensor_is_named(wrapped, named, use):
    class Wrapped(LinearGaussian):
        def posterior(self, x):
            q = super().posterior(x)

            class Posterior:
                def rsample(self, shape):
                    return wrapped(q.rsample(shape))

                def log_prob(self, h):
                    return q.log_prob(h[0])

            return Posterior()

    with pytest.raises(ModelError, match=f"h must be a tensor, or .*, a part of it is {named}$"):
        use(Wrapped(), LinearGaussian().data())


def test_densities_on_two_devices_are_reported():
    model = Toy(log_joint=lambda x, h: torch.zeros(2, 4, device="meta"))
    with pytest.raises(ModelError, match=r"log p\(x, h\) is on meta and log q\(h \| x\) on cpu"):
        IWAE(k=2)(model, X)


def spoiled(term, value, where):
    class Spoiled(Normal):
        def log_prob(self, h):
            return super().log_prob(h) + (spoil if term == "q" else 0)

    spoil = torch.zeros(3, 4, dtype=F64)
    for i, j in where:
        spoil[i, j] = value
    return Toy(
        posterior=lambda x: Spoiled(torch.zeros(4, dtype=F64), 1.0),
        log_joint=lambda x, h: -(h**2) + (spoil if term == "p" else 0),
    )


@pytest.mark.parametrize(
    ("term", "value", "where", "message"),
    [
        ("p", torch.nan, [(0, 0), (2, 1)], r"log p\(x, h\) is NaN at 2 of 12 samples$"),
        ("q", torch.nan, [(1, 3)], r"log q\(h \| x\) is NaN at 1 of 12 samples$"),
        ("p", torch.inf, [(0, 0), (1, 1), (2, 2)], r"log p\(x, h\) is \+inf at 3 of 12 samples$"),
        ("q", -torch.inf, [(0, 0)], r"log q\(h \| x\) is -inf at 1 of 12 samples$"),
    ],
)
@pytest.mark.parametrize("extra", [{}, {"gradient": "dreg"}, {"chunk_size": 3}, {"backward_samples": 1}], ids=str)
def test_nan_and_infinite_densities_are_counted_and_attributed(term, value, where, message, extra):
    with pytest.raises(ValueError, match=f"NaN or \\+inf log-weights: {message}"):
        IWAE(k=3, **extra)(spoiled(term, value, where), X)
    with pytest.raises(ValueError, match=message):
        IWAE(k=3).bound(spoiled(term, value, where), X)


def test_both_terms_at_fault_are_both_named():
    class Both(Toy):
        def log_joint(self, x, h):
            return h * torch.nan

        def posterior(self, x):
            return Normal(self.loc + torch.tensor([0.0, 0.0, 0.0, torch.nan], dtype=F64), 1.0, validate_args=False)

    with pytest.raises(
        ValueError, match=r"log p\(x, h\) is NaN at 12 of 12 samples; log q\(h \| x\) is NaN at 3 of 12"
    ):
        IWAE(k=3)(Both(), X)


def test_zero_over_zero_is_named():
    class Empty(Normal):
        def log_prob(self, h):
            return h * 0 - torch.inf

    model = Toy(posterior=lambda x: Empty(x, 1.0), log_joint=lambda x, h: h * 0 - torch.inf)
    with pytest.raises(ValueError, match="undefined at 8 samples where both are -inf"):
        IWAE(k=2)(model, X)


@pytest.mark.parametrize("gradient", ["reparam", "dreg", "score"])
def test_all_weights_zero_for_a_data_point_is_reported(gradient):
    nothing = torch.zeros(4, dtype=F64)
    nothing[1] = -torch.inf
    model = Toy(log_joint=lambda x, h: -(h**2) + nothing)
    message = "not finite for 1 of 4 data points: all 3 weights are zero for 1 of them"
    for make in (IWAE(k=3), Power(k=3, p=0.5), MIWAE(3, 1)):
        objective = replace(make, gradient=gradient)
        for use in (objective, objective.bound):
            with pytest.raises(ValueError, match=message):
                use(model, X)


def test_some_weights_zero_are_fine_for_iwae_and_reported_by_vae():
    some = torch.zeros(3, 1, dtype=F64)
    some[1] = -torch.inf
    model = Toy(log_joint=lambda x, h: -(h**2) + some)
    assert torch.isfinite(IWAE(k=3)(model, X))
    with pytest.raises(ValueError, match="not finite for 4 of 4 data points: some of their weights are zero"):
        VAE(k=3)(model, X)


def test_a_reduce_that_leaves_log_space_is_not_blamed_on_the_model():
    @dataclass(frozen=True)
    class Naive(Objective):
        k: int = 3

        def reduce(self, log_w):
            return log_w.exp().mean(0).log()

    model = Toy(log_joint=lambda x, h: -(h**2) - 2000)
    with pytest.raises(ValueError, match="not finite for 4 of 4 data points: its reduce leaves what floats hold"):
        Naive(k=3)(model, X)


@pytest.mark.parametrize("gradient", ["stl", "dreg"])
def test_a_density_that_does_not_depend_on_h_has_no_path(gradient):
    """A point estimate: q's log-density is a constant."""

    class Point(Toy):
        def posterior(self, x):
            posterior = Normal(self.loc + 0 * x, 1.0)
            posterior.log_prob = torch.zeros_like
            return posterior

    results = []
    for name in ("reparam", gradient):
        model = Point()
        torch.manual_seed(0)
        VAE(k=2, gradient=name)(model, X).backward()
        results.append(model.loc.grad)
    torch.testing.assert_close(*results)


class _Fused(torch.autograd.Function):
    """log-mean-exp whose backward pass keeps the softmax as a number."""

    @staticmethod
    def forward(ctx, log_w):
        ctx.w = log_w.softmax(0)
        return log_w.logsumexp(0)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.w


def test_slopes_that_cannot_be_differentiated_again_are_refused():
    @dataclass(frozen=True)
    class Kernel(Objective):
        k: int = 3

        def reduce(self, log_w):
            return _Fused.apply(log_w)

    assert Kernel(k=3).gradient == "reparam"
    with pytest.raises(ValueError, match="vary but cannot be differentiated again"):
        Kernel(k=3, gradient="dreg")

    def own(objective, log_w):
        require_smooth(objective, "own")
        g = objective.slopes(log_w)
        return g, g - objective.curvatures(log_w), None

    with pytest.raises(ValueError, match="gradient='own' needs second derivatives of Kernel"):
        Kernel(k=3, gradient=own)
    assert Kernel(k=3, gradient="stl").gradient == "stl"


@pytest.mark.parametrize("make", [lambda m, s: Uniform(m, m + s), lambda m, s: Pareto(s, m.abs() + 3)])
def test_a_support_that_moves_with_q_is_refused_but_for_reparam(make):
    class Moving(Toy):
        def posterior(self, x):
            return make(self.loc + x, 1.5 + self.loc.exp())

    model = Moving(log_joint=lambda x, h: -(h**2) + x)
    assert torch.isfinite(IWAE(k=3)(model, X))
    for gradient in ("dreg", "stl", "score", "vimco"):
        objective = IWAE(k=3, gradient=gradient)
        with pytest.raises(ModelError, match="whose support moves with its parameters: use gradient='reparam'"):
            objective(model, X)
        assert torch.isfinite(objective.bound(model, X)).all()
    both = Split(generative=IWAE(k=3), inference=VAE(k=3))
    with pytest.raises(ModelError, match=r"^Split is wrong for .*: use an objective without weights of its own"):
        both(model, X)


def test_weights_of_its_own_that_fail_are_the_objectives_fault():
    @dataclass(frozen=True)
    class Own(Objective):
        k: int = 3

        def reduce(self, log_w):
            return log_w.mean(0)

        def weights(self, log_w):
            raise KeyError("lost")

    with pytest.raises(PluginError, match=r"^the weights of Own do not work: KeyError: 'lost'"):
        Own()


def test_straight_through_samples_are_warned_of(monkeypatch):
    class Straight(Toy):
        def posterior(self, x):
            logits = torch.stack([self.loc + x, -x], -1)
            return OneHotCategoricalStraightThrough(logits=logits)

    monkeypatch.setattr("mcobjectives.messages.warned", set())
    model = Straight(log_joint=lambda x, h: h[..., 0] * x)
    with pytest.warns(UserWarning, match="straight through its samples is biased: use gradient='vimco'"):
        IWAE(k=3, gradient="dreg")(model, X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        IWAE(k=3, gradient="dreg")(model, X)  # said once
        IWAE(k=3, gradient="vimco")(model, X)


def test_samples_that_cannot_have_a_gradient_are_not_marked():
    with pytest.raises(ModelError, match=r"parameterless\(h\) needs floating-point samples, got torch.int64"):
        parameterless(torch.zeros(3, dtype=torch.long))


def test_nothing_is_checked_away_from_a_users_reduce():
    @dataclass(frozen=True)
    class Broken(Objective):
        k: int = 3

        def reduce(self, log_w):
            return log_w.mean(0) * torch.nan

    with pytest.raises(ValueError, match="the bound of Broken is not finite for 4 of 4"):
        Broken()(Toy(), X)


REDUCE = {
    "keeps the axis": (lambda w: w.logsumexp(0, keepdim=True), r"shape \(1, \d\) for log_w of shape \(3, \d\)"),
    "another axis": (lambda w: w.logsumexp(1), r"shape \(3,\) for log_w"),
    "over the batch": (lambda w: w.mean(), r"shape \(\) for log_w"),
    "numpy": (lambda w: torch.tensor(w.detach().numpy().mean(0)), "no gradient: .*without detach and NumPy"),
}


@pytest.mark.parametrize("options", [{}, {"gradient": "vimco"}, {"chunk_size": 2}, {"backward_samples": 2}], ids=str)
@pytest.mark.parametrize("name", REDUCE)
def test_a_users_reduce_of_another_shape_or_without_a_gradient_is_reported(name, options):
    function, message = REDUCE[name]

    @dataclass(frozen=True)
    class Users(Objective):
        k: int = 3

        def reduce(self, log_w):
            return function(log_w)

    with pytest.raises(ValueError, match=message):
        Users(**options)(Toy(), X)


def test_an_objective_without_k_is_reported():
    @dataclass(frozen=True)
    class Named(Objective):
        samples: int = 3

        def reduce(self, log_w):
            return log_w.mean(0)

    with pytest.raises(ValueError, match="k must be an integer of at least 1, got None"):
        Named()


def test_an_abstract_objective_cannot_be_made():
    with pytest.raises(TypeError, match="reduce"):
        Objective()
    assert {f.name for f in fields(Objective)} == {"gradient", "chunk_size", "backward_samples", "kl_weight"}


def test_opaque_data_is_the_models_own_affair():
    class Opaque(Gaussian1D):
        def posterior(self, x):
            return super().posterior(x["pixels"][0])

        def log_likelihood(self, x, h):
            return super().log_likelihood(x["pixels"][0], h)

    torch.manual_seed(0)
    expected = IWAE(k=3)(Gaussian1D(), X)
    torch.manual_seed(0)
    assert IWAE(k=3)(Opaque(), {"pixels": (X, "label")}) == expected


def _affine(loc, scale, base=None):
    base = Uniform(torch.zeros(3), torch.ones(3)) if base is None else base
    return TransformedDistribution(base, [AffineTransform(loc, scale)])


def test_a_support_that_is_moved_by_a_transform_is_seen_and_a_fixed_one_left_alone():
    a, b = torch.tensor(0.3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    one = torch.ones(3)
    moving = [
        _affine(a * one, b * one),
        _affine(0.0, b * one),
        Independent(_affine(a * one, 1.0), 1),
        _affine(a, 1.0, Exponential(one)),
    ]
    fixed = [
        _affine(0.0, b, Exponential(one)),
        _affine(a, b, Normal(a * one, b)),
        LogNormal(a, b),
        TransformedDistribution(Uniform(0 * one, one), [SigmoidTransform().inv, AffineTransform(a, b)]),
        GeneralizedPareto(0 * one, b * one, 0.2 * one),
    ]
    assert [moving_support(q) for q in moving] == [True] * 4
    assert [moving_support(q) for q in fixed] == [False] * 5


@pytest.mark.parametrize("gradient", ["dreg", "stl", "score", "vimco"])
def test_a_moving_support_is_found_inside_an_independent(gradient):
    class Moving(Toy):
        def posterior(self, x):
            low = (self.loc + x).unsqueeze(-1)
            return Independent(Uniform(low, low + 1.5), 1)

    model = Moving(log_joint=lambda x, h: -(h[..., 0] ** 2) + x)
    with pytest.raises(ModelError, match=r"Independent\(Uniform\), whose support moves with its parameters"):
        IWAE(k=3, gradient=gradient)(model, X)


class Half(Toy):
    """h ~ HalfNormal(1), under a Normal q that reaches below its edge."""

    def log_joint(self, x, h):
        return HalfNormal(torch.ones((), dtype=F64), validate_args=False).log_prob(h) - (x - h) ** 2


@pytest.mark.parametrize("options", [{}, {"chunk_size": 5}, {"backward_samples": 4}, {"gradient": "dreg"}])
def test_an_edge_of_p_inside_q_is_warned_of_where_a_gradient_does_not_see_it(monkeypatch, options):
    monkeypatch.setattr("mcobjectives.messages.warned", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for gradient in ("vimco", "score"):
            IWAE(k=40, gradient=gradient)(Half(), X)
        IWAE(k=40, **options).bound(Half(), X)
    with pytest.warns(
        UserWarning, match="p's support ends inside q's .* biased, .* use a q on p's support, or gradient="
    ):
        IWAE(k=40, **options)(Half(), X)


def test_what_data_points_share_is_named_where_each_keeps_other_samples():
    class Shared(Toy):
        def posterior(self, x):
            return Pair(Normal(self.loc.expand(1), 1.0), Normal(self.loc + 0 * x, 1.0))

        def log_joint(self, x, h):
            return -(h[0] ** 2) / 2 - (h[1] ** 2) / 2 - (x - h[0] - h[1]) ** 2

    class Pair:
        def __init__(self, *parts):
            self.parts = parts

        def rsample(self, shape):
            return tuple(part.rsample(shape) for part in self.parts)

        def log_prob(self, h):
            return self.parts[0].log_prob(h[0]) + self.parts[1].log_prob(h[1])

    assert torch.isfinite(IWAE(k=5, gradient="dreg")(Shared(), X))
    with pytest.raises(ModelError, match=r"to be \(k, batch, ...\), got \(5, 1\), \(5, 4\) for 4 data points: expand"):
        IWAE(k=5, backward_samples=2)(Shared(), X)
    with pytest.raises(ModelError, match=r"got \(3, 1\), \(3, 4\) for 4 data points: expand"):
        IWAE(k=5, backward_samples=2, chunk_size=3)(Shared(), X)
