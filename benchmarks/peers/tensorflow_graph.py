"""The paper's algorithm in TensorFlow 2: the log-weights, a shifted log-mean-exp, Adam, one graph (tf.function).

`--mode xla` compiles the graph.
"""

import math
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import tensorflow as tf
from _protocol import ADAM_EPS, LEARNING_RATE, Settings, serve


def variables(nets) -> list:
    return [[(tf.Variable(weight), tf.Variable(bias)) for weight, bias in net] for net in nets]


def dense(inputs: tf.Tensor, affine) -> tf.Tensor:
    return tf.nn.bias_add(tf.matmul(inputs, affine[0]), affine[1])


def hidden(net, inputs: tf.Tensor) -> tf.Tensor:
    return tf.tanh(dense(tf.tanh(dense(inputs, net[0])), net[1]))


def log_normal(h: tf.Tensor, mean: tf.Tensor | float, std: tf.Tensor | float) -> tf.Tensor:
    log_density = -0.5 * tf.square((h - mean) / std) - tf.math.log(std) - 0.5 * math.log(2 * math.pi)
    return tf.reduce_sum(log_density, -1)


def build(settings: Settings) -> tuple:
    tf.config.threading.set_intra_op_parallelism_threads(settings.threads)
    tf.config.threading.set_inter_op_parallelism_threads(settings.threads)
    tf.random.set_seed(0)
    encoder, decoder = (variables(nets) for nets in settings.initial())
    weights = [tensor for net in encoder + decoder for affine in net for tensor in affine]
    optimizer = keras.optimizers.Adam(LEARNING_RATE, epsilon=ADAM_EPS)
    optimizer.build(weights)
    k, batch = settings.k, settings.batch

    def gaussian(net, inputs: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """(n, batch, inputs) -> (n, batch, outputs); one flat product, which TensorFlow runs fastest."""
        y = hidden(net, tf.reshape(inputs, (-1, inputs.shape[-1])))
        shape = (-1, batch, net[2][1].shape[0])
        return tf.reshape(dense(y, net[2]), shape), tf.reshape(tf.exp(dense(y, net[3])), shape)

    def bound(x: tf.Tensor) -> tf.Tensor:
        h, log_w, states = x, 0.0, []
        for net in encoder:
            mean, std = gaussian(net, h)
            h = mean + std * tf.random.normal((k, batch, mean.shape[-1]))
            log_w -= log_normal(h, mean, std)
            states.append(h)
        log_w += log_normal(states.pop(), 0.0, 1.0)
        for net in decoder[:-1]:
            below = states.pop()
            log_w += log_normal(below, *gaussian(net, h))
            h = below
        logits = dense(hidden(decoder[-1], tf.reshape(h, (k * batch, h.shape[-1]))), decoder[-1][2])
        bce = tf.nn.sigmoid_cross_entropy_with_logits(labels=tf.tile(x, (k, 1)), logits=logits)
        log_w -= tf.reshape(tf.reduce_sum(bce, -1), (k, batch))
        largest = tf.reduce_max(log_w, 0)
        return tf.reduce_mean(tf.math.log(tf.reduce_mean(tf.exp(log_w - largest), 0)) + largest)

    @tf.function(jit_compile=settings.mode == "xla")
    def train(x: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = -bound(x)
        optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return loss

    def set_rate(rate: float) -> None:
        optimizer.learning_rate.assign(rate)

    return tf.constant, lambda x: float(train(x)), set_rate, lambda: [w.numpy() for w in weights]


if __name__ == "__main__":
    serve("tensorflow", build, ["tensorflow-cpu", "tensorflow", "keras"], modes=["graph", "xla"])
