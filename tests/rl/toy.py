"""A training script as small as the harness allows; the tests run it as a process of its own and kill it."""

import time

import jax
import jax.numpy as jnp
import optax

from rl.launch import launch
from rl.run import Run


def initial(config):
    params = {"w": jnp.ones(config.layers, jnp.bfloat16), "b": jnp.zeros(4)}
    return {"params": params, "opt": optimizer(config).init(params), "key": jax.random.key(config.seed), "best": -1e9}


def optimizer(config):
    return optax.adam(config.learning_rate, b1=config.optimizer.b1)


def make_step(config):
    @jax.jit
    def step(state):
        key, noise_key = jax.random.split(state["key"])
        noise = jax.random.normal(noise_key, (4,))
        gradient = jax.tree.map(lambda p: (p * noise[..., : p.shape[-1]]).astype(p.dtype) + p, state["params"])
        updates, opt = optimizer(config).update(gradient, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        fitness = -sum(jnp.sum(jnp.square(p.astype(jnp.float32))) for p in jax.tree.leaves(params)) + noise[0]
        return {**state, "params": params, "opt": opt, "key": key}, {"fitness_mean": fitness, "noise": noise[1]}

    return step


def train(config, workdir, tensorboard):
    step = make_step(config)
    run = Run(workdir, config, total_steps=config.steps, save_every=config.save_every, tensorboard=tensorboard)
    with run:
        state = run.restore(initial(config))
        while run.step < run.total_steps:
            state, metrics = step(state)
            time.sleep(config.pause)
            run.record(state, metrics, work=10)
    return {}


if __name__ == "__main__":
    launch(train)
