"""Proximal policy optimisation, purely functional: one jitted `step` collects a batch and learns from it.

Source: arXiv 1707.06347, with generalised advantage estimation (arXiv 1506.02438). An episode cut by its time limit is
not a terminal one: the value of its last state is bootstrapped, while advantages do not flow across the cut.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rl.control import normalizer as normalizer_lib
from rl.control import policy as policy_lib
from rl.control.normalizer import Moments, Normalizer
from rl.control.policy import Policy
from rl.envs import Env
from rl.models.mlp import MLP

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Hyper-parameters; T steps of B environments make a batch.

    Attributes:
      envs: B.
      steps: T.
      epochs: passes over a batch.
      minibatches: into which each pass cuts it; divides T * B.
      learning_rate: of Adam.
      discount: gamma.
      gae: lambda of the advantage estimate.
      clip: bound of |ratio - 1|.
      entropy: weight of the entropy bonus.
      value: weight of the value loss.
      max_grad_norm: global norm at which gradients are clipped.
      normalize_observations: by running statistics.
    """

    envs: int = 64
    steps: int = 128
    epochs: int = 4
    minibatches: int = 8
    learning_rate: float = 3e-4
    discount: float = 0.99
    gae: float = 0.95
    clip: float = 0.2
    entropy: float = 0.0
    value: float = 0.5
    max_grad_norm: float = 0.5
    normalize_observations: bool = True

    def __post_init__(self) -> None:
        if (self.envs * self.steps) % self.minibatches:
            raise ValueError(
                f"minibatches must divide envs * steps = {self.envs} * {self.steps} = {self.envs * self.steps}, "
                f"but {self.minibatches} does not: change one of the three"
            )


class State(NamedTuple):
    """Everything that changes; [B] environments."""

    params: dict[str, Any]  # actor, critic
    opt_state: optax.OptState
    normalizer: Normalizer | None
    env_state: Any  # [B, ...]
    obs: jax.Array  # f32 [B, observation], as the environment gave it
    length: jax.Array  # i32 [B], of the running episodes
    total: jax.Array  # f32 [B], their return so far
    key: jax.Array
    iteration: jax.Array  # i32 []


class Batch(NamedTuple):
    """Transitions, [T, B, ...] when collected and [rows, ...] when learned from."""

    obs: jax.Array  # f32 [..., observation], as the policy saw it
    action: jax.Array
    logp_behaviour: jax.Array  # f32 [...], log-probability when it was taken
    advantage: jax.Array  # f32 [...]
    target: jax.Array  # f32 [...], what the value should be


class _Transition(NamedTuple):
    obs: jax.Array  # what the policy saw
    next_obs: jax.Array  # before a reset
    action: jax.Array
    logp: jax.Array
    reward: jax.Array
    terminated: jax.Array
    done: jax.Array  # terminated, or at the time limit
    moments: Moments | None
    finished_total: jax.Array  # return of the episode that ended here, else 0


def gae(
    reward_tb: jax.Array,
    value_tb: jax.Array,
    next_value_tb: jax.Array,
    terminated_tb: jax.Array,
    done_tb: jax.Array,
    discount: float,
    decay: float,
) -> jax.Array:
    """Generalised advantage estimates, f32 [T, B].

        delta_t = r_t + gamma (1 - terminated_t) V(s'_t) - V(s_t)
        A_t     = delta_t + gamma lambda (1 - done_t) A_{t+1}

    Args:
      reward_tb: rewards [T, B].
      value_tb: V(s_t).
      next_value_tb: V(s'_t), s'_t being the state after the step and before any reset.
      terminated_tb: bool, whether s'_t is terminal; a time limit does not make it so.
      done_tb: bool, whether the episode ended at t for either reason.
      discount: gamma.
      decay: lambda.
    """
    delta_tb = reward_tb + discount * jnp.where(terminated_tb, 0.0, next_value_tb) - value_tb

    def back(advantage: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        delta, done = inputs
        advantage = delta + discount * decay * jnp.where(done, 0.0, advantage)
        return advantage, advantage

    return jax.lax.scan(back, jnp.zeros_like(delta_tb[0]), (delta_tb, done_tb), reverse=True)[1]


def clipped_objective(logp: jax.Array, logp_behaviour: jax.Array, advantage: jax.Array, clip: float) -> jax.Array:
    """min(rho A, clip(rho, 1 - eps, 1 + eps) A) with rho = exp(logp - logp_behaviour), elementwise."""
    ratio = jnp.exp(logp - logp_behaviour)
    return jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage)


def loss(params: Any, policy: Policy, critic: MLP, batch: Batch, settings: Settings) -> tuple[jax.Array, Metrics]:
    """-E[clipped objective] + c_v E[(V - target)^2] / 2 - c_e E[entropy], advantages standardised over the rows.

    Returns:
      The loss and its parts: policy_loss, value_loss, entropy, kl (E[rho - 1 - log rho]), clip_fraction.
    """
    distribution = policy.apply(params["actor"], batch.obs)
    logp = policy_lib.log_prob(policy.action, distribution, batch.action)
    advantage = (batch.advantage - batch.advantage.mean()) / (batch.advantage.std() + 1e-8)
    policy_loss = -jnp.mean(clipped_objective(logp, batch.logp_behaviour, advantage, settings.clip))
    value_loss = 0.5 * jnp.mean(jnp.square(critic.apply(params["critic"], batch.obs)[..., 0] - batch.target))
    entropy = jnp.mean(policy_lib.entropy(policy.action, distribution))
    log_ratio = logp - batch.logp_behaviour
    total = policy_loss + settings.value * value_loss - settings.entropy * entropy
    return total, {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy,
        "kl": jnp.mean(jnp.expm1(log_ratio) - log_ratio),
        "clip_fraction": jnp.mean(jnp.abs(jnp.expm1(log_ratio)) > settings.clip),
    }


def optimizer(settings: Settings) -> optax.GradientTransformation:
    """Adam (epsilon 1e-5) on gradients clipped by their global norm."""
    return optax.chain(optax.clip_by_global_norm(settings.max_grad_norm), optax.adam(settings.learning_rate, eps=1e-5))


def init(env: Env, policy: Policy, critic: MLP, settings: Settings, key: jax.Array) -> State:
    """Parameters, optimizer and freshly reset environments.

    Raises:
      ValueError: the policy is deterministic.
    """
    if not policy.stochastic:
        raise ValueError("PPO needs a stochastic policy to take logarithms of: Policy(stochastic=True)")
    actor_key, critic_key, reset_key, key = jax.random.split(key, 4)
    blank = jnp.zeros(env.observation_size, jnp.float32)
    params = {"actor": policy.init(actor_key, blank), "critic": critic.init(critic_key, blank)}
    env_state, obs = jax.vmap(env.reset)(jax.random.split(reset_key, settings.envs))
    return State(
        params=params,
        opt_state=optimizer(settings).init(params),
        normalizer=normalizer_lib.init(env.observation_size) if settings.normalize_observations else None,
        env_state=env_state,
        obs=obs,
        length=jnp.zeros(settings.envs, jnp.int32),
        total=jnp.zeros(settings.envs, jnp.float32),
        key=key,
        iteration=jnp.int32(0),
    )


def make_step(env: Env, policy: Policy, critic: MLP, settings: Settings) -> Callable[[State], tuple[State, Metrics]]:
    """Makes the jitted `state -> (state, metrics)`: T * B environment steps, then epochs of minibatches.

    Metrics: `return_mean` over the `episodes` that ended in this batch (NaN if none did), `env_steps` of this call, and
    the means of `loss`'s parts over all minibatches.
    """

    @jax.jit
    def step(state: State) -> tuple[State, Metrics]:
        collect_key, learn_key = jax.random.split(jax.random.fold_in(state.key, state.iteration))
        state, data = _collect(env, policy, settings, state, collect_key)
        batch = _batch(critic, settings, state, data)
        params, opt_state, parts = _learn(policy, critic, settings, state, batch, learn_key)
        normalizer = state.normalizer
        if normalizer is not None:
            normalizer = normalizer_lib.update(normalizer, data.moments)
        episodes = jnp.sum(data.done)
        metrics = {"return_mean": jnp.sum(data.finished_total) / episodes, "episodes": episodes, **parts}
        metrics["env_steps"] = jnp.int32(settings.envs * settings.steps)
        state = state._replace(params=params, opt_state=opt_state, normalizer=normalizer)
        return state._replace(iteration=state.iteration + 1), metrics

    return step


def _collect(env: Env, policy: Policy, settings: Settings, state: State, key: jax.Array) -> tuple[State, _Transition]:
    """T steps of all environments, each reset when its episode ends."""

    def look(obs: jax.Array) -> tuple[jax.Array, Moments | None]:
        if state.normalizer is None:
            return obs, None
        standardised = normalizer_lib.standardise(state.normalizer, obs)
        return normalizer_lib.clip(standardised), Moments(jnp.float32(1), standardised, jnp.square(standardised))

    def one(carry: tuple, key: jax.Array) -> tuple[tuple, _Transition]:
        env_state, obs, length, total = carry
        action_key, step_key, reset_key = jax.random.split(key, 3)
        seen, moments = look(obs)
        distribution = policy.apply(state.params["actor"], seen)
        action = policy_lib.sample(policy.action, distribution, action_key)
        logp = policy_lib.log_prob(policy.action, distribution, action)
        env_state, next_obs, reward, terminated = env.step(step_key, env_state, action)
        length, total = length + 1, total + reward
        done = terminated | (length >= env.max_steps)
        after = (env_state, next_obs, length, total)
        fresh = (*env.reset(reset_key), jnp.zeros_like(length), jnp.zeros_like(total))
        carry = jax.tree.map(lambda new, old: jnp.where(done, new, old), fresh, after)
        finished = jnp.where(done, total, 0.0)
        next_seen = look(next_obs)[0]
        return carry, _Transition(seen, next_seen, action, logp, reward, terminated, done, moments, finished)

    def all_envs(carry: tuple, t: jax.Array) -> tuple[tuple, _Transition]:
        return jax.vmap(one)(carry, jax.random.split(jax.random.fold_in(key, t), settings.envs))

    carry = (state.env_state, state.obs, state.length, state.total)
    (env_state, obs, length, total), data = jax.lax.scan(all_envs, carry, jnp.arange(settings.steps))
    return state._replace(env_state=env_state, obs=obs, length=length, total=total), data


def _batch(critic: MLP, settings: Settings, state: State, data: _Transition) -> Batch:
    """Advantages and value targets, rows flattened to [T * B]."""
    value_tb = critic.apply(state.params["critic"], data.obs)[..., 0]
    next_value_tb = critic.apply(state.params["critic"], data.next_obs)[..., 0]
    advantage_tb = gae(
        data.reward, value_tb, next_value_tb, data.terminated, data.done, settings.discount, settings.gae
    )
    batch = Batch(data.obs, data.action, data.logp, advantage_tb, advantage_tb + value_tb)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)


def _learn(
    policy: Policy, critic: MLP, settings: Settings, state: State, batch: Batch, key: jax.Array
) -> tuple[Any, optax.OptState, Metrics]:
    """Epochs over shuffled minibatches."""
    tx = optimizer(settings)
    rows = settings.envs * settings.steps

    def minibatch(carry: tuple, index: jax.Array) -> tuple[tuple, Metrics]:
        params, opt_state = carry
        part = jax.tree.map(lambda x: x[index], batch)
        gradient, parts = jax.grad(loss, has_aux=True)(params, policy, critic, part, settings)
        updates, opt_state = tx.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), parts

    def epoch(carry: tuple, epoch_key: jax.Array) -> tuple[tuple, Metrics]:
        order = jax.random.permutation(epoch_key, rows).reshape(settings.minibatches, -1)
        return jax.lax.scan(minibatch, carry, order)

    keys = jax.random.split(key, settings.epochs)
    (params, opt_state), parts = jax.lax.scan(epoch, (state.params, state.opt_state), keys)
    return params, opt_state, jax.tree.map(jnp.mean, parts)
