"""NumPyro: SVI with RenyiELBO(alpha=0), the whole update jitted and its state donated."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from _protocol import ADAM_EPS, LEARNING_RATE, Settings, serve
from numpyro.infer import SVI, RenyiELBO


def hidden(net, inputs: jax.Array) -> jax.Array:
    for weight, bias in net[:2]:
        inputs = jnp.tanh(inputs @ weight + bias)
    return inputs


def gaussian(net, inputs: jax.Array) -> dist.Distribution:
    y = hidden(net, inputs)
    (mean_weight, mean_bias), (std_weight, std_bias) = net[2:]
    return dist.Normal(y @ mean_weight + mean_bias, jnp.exp(y @ std_weight + std_bias)).to_event(1)


def build(settings: Settings) -> tuple[Callable, Callable]:
    encoder, decoder = settings.initial()
    top = len(encoder)

    def model(x: jax.Array) -> None:
        nets = numpyro.param("decoder", decoder)
        with numpyro.plate("batch", len(x)):
            h = numpyro.sample(f"h{top}", dist.Normal(0, 1).expand([50]).to_event(1))
            for i, net in zip(range(top - 1, 0, -1), nets, strict=False):
                h = numpyro.sample(f"h{i}", gaussian(net, h))
            weight, bias = nets[-1][2]
            logits = hidden(nets[-1], h) @ weight + bias
            numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x: jax.Array) -> None:
        nets = numpyro.param("encoder", encoder)
        h = x
        with numpyro.plate("batch", len(x)):
            for i, net in enumerate(nets, 1):
                h = numpyro.sample(f"h{i}", gaussian(net, h))

    optimizer = numpyro.optim.Adam(LEARNING_RATE, eps=ADAM_EPS)
    svi = SVI(model, guide, optimizer, RenyiELBO(alpha=0, num_particles=settings.k))
    state = svi.init(jax.random.PRNGKey(0), jnp.asarray(settings.batches(1)[0]))
    update = jax.jit(svi.update, donate_argnums=0)

    def step(x: jax.Array) -> float:
        nonlocal state
        state, loss = update(state, x)
        jax.block_until_ready(state)
        return float(loss) / len(x)

    return jnp.asarray, step


if __name__ == "__main__":
    serve("numpyro", build, ["jax", "jaxlib", "numpyro"])
