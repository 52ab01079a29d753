"""Control experiments: the command, its results, resuming, configs, and the three methods on one environment."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eggroll
from experiments import build, control, pretrain
from rl import config as config_lib
from rl import envs
from rl.control import evolution, ppo
from rl.run import Run, RunError

ROOT = Path(__file__).parents[2]
TINY = ["max_steps=25", "eval_episodes=8", "eval_every=2", "save_every=2", "policy.hidden=(8,)"]
TINY_ES = [*TINY, "es.members=16", "steps=4"]
TINY_PPO = [*TINY, "ppo.envs=4", "ppo.steps=16", "ppo.minibatches=4", "ppo.epochs=2", "steps=3"]
ENVIRONMENTS = {
    "acrobot": "Acrobot-v1",
    "ant": "brax/ant",
    "cartpole": "CartPole-v1",
    "minatar": "Breakout-MinAtar",
    "mountaincar_continuous": "MountainCarContinuous-v0",
    "pendulum": "Pendulum-v1",
}


def load(name, overrides=()):
    file, _, variant = name.partition(":")
    return config_lib.load(f"{ROOT}/configs/control_{file}.py:{variant}", overrides)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def variants(name):
    with pytest.raises(config_lib.ConfigError, match="unknown variant 'nonsense'; known: ") as error:
        load(f"{name}:nonsense")
    return str(error.value).rpartition("known: ")[2].split("\n")[0].split(", ")


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_every_variant_loads(name):
    assert sorted(path.stem for path in (ROOT / "configs").glob("control_*.py")) == sorted(
        f"control_{name}" for name in ENVIRONMENTS
    )
    known = variants(name)
    assert known[0] == "eggroll" and load(name) == load(f"{name}:eggroll")
    for variant in known:
        config = load(f"{name}:{variant}")
        assert config.env == ENVIRONMENTS[name] and config.method in control.METHODS
        if config.method == "ppo":
            ppo.Settings(**config.ppo.to_dict())
        else:
            assert build.strategy(config).population.size == config.es.members
    if name in ("cartpole", "pendulum"):
        compared = {"eggroll", "eggroll_independent", "eggroll_rank4", "openes", "ppo"}
        assert compared | {"paper", "paper_openes", "paper_ppo"} == set(known)


# arXiv 2511.16652, appendix N.4: det policy, lr, lr_decay, n_par_evals, pop, opt, rank, rank_transform, sigma, sigma_decay
PUBLISHED_ES = {
    "cartpole:paper": (False, 0.1, 0.9995, 1, 2048, "sgd", 4, False, 0.2, 0.999),
    "cartpole:paper_openes": (True, 0.1, 0.9995, 4, 512, "adamw", None, True, 0.5, 0.9995),
    "pendulum:paper": (False, 0.01, 0.995, 1, 4096, "adam", 4, False, 0.05, 0.995),
    "pendulum:paper_openes": (True, 0.01, 0.995, 4, 4096, "adamw", None, False, 0.05, 1),
    "ant:paper": (False, 0.01, 0.9995, 1, 2048, "adam", 1, False, 0.05, 0.9995),
    "ant:paper_openes": (False, 0.1, 0.995, 8, 512, "adam", None, False, 0.05, 0.9995),
}
# clip, ent, gae, gamma, lr, grad_norm, envs, epochs, minibatches, steps, vf
PUBLISHED_PPO = {
    "cartpole:paper_ppo": (0.2, 1e-4, 0.9, 0.995, 3e-4, 0.5, 256, 4, 32, 128, 0.5),
    "pendulum:paper_ppo": (0.1, 1e-3, 0.95, 0.999, 3e-4, 1, 256, 16, 16, 256, 1),
    "ant:paper_ppo": (0.2, 0, 0.95, 0.995, 3e-4, 0.5, 64, 8, 32, 128, 1),
}


@pytest.mark.parametrize("name", PUBLISHED_ES)
def test_published_settings_of_evolution(name):
    deterministic, rate, decay, episodes, members, optimizer, rank, ranked, sigma, sigma_decay = PUBLISHED_ES[name]
    config = load(name)
    assert (config.policy.hidden, config.policy.stochastic) == ((256, 256, 256), not deterministic)
    assert (config.episodes, config.es.members, config.es.population) == (episodes, members, "antithetic")
    assert config.method == ("openes" if rank is None else "eggroll") and config.es.rank == (rank or 1)
    assert config.es.shaping == ("centred_rank" if ranked else "zscore")
    assert (config.es.sigma, config.es.sigma_decay, config.optimizer.name) == (sigma, sigma_decay, optimizer)
    if optimizer == "sgd":  # the rate is in the convention of the authors' library, at sigma's of each generation
        for t in (0, 100):
            ours = config.optimizer.learning_rate * config.optimizer.decay**t
            converted = eggroll.convert_learning_rate(
                ours, source="textbook", target="hyperscale", sigma=sigma * sigma_decay**t, members=members
            )
            np.testing.assert_allclose(converted, rate * decay**t, rtol=1e-9)
    else:
        assert (config.optimizer.learning_rate, config.optimizer.decay) == (rate, decay)
    # Decays are per generation.
    np.testing.assert_allclose(build.strategy(config).sigma(100), sigma * sigma_decay**100, rtol=1e-5)


@pytest.mark.parametrize("name", PUBLISHED_PPO)
def test_published_settings_of_ppo(name):
    config = load(name)
    c = config.ppo
    order = (c.clip, c.entropy, c.gae, c.discount, c.learning_rate, c.max_grad_norm, c.envs, c.epochs)
    assert (*order, c.minibatches, c.steps, c.value) == PUBLISHED_PPO[name]
    assert config.policy.hidden == (256, 256, 256) and config.policy.normalize_observations


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method='a2c'", "unknown method 'a2c'; known: eggroll, openes, ppo"),
        ("optimizer.name='lyon'", "unknown optimizer.name 'lyon'; known: adam, adamw, sgd, sign_sgd, lion"),
        ("es.shaping='rank'", "unknown es.shaping 'rank'; known: zscore"),
        ("es.population='grid'", "unknown es.population 'grid'; known: crossed, antithetic, independent"),
        ("es.members=17", "17 members"),
        ("es.members=0", "config.es.members must be at least 1, not 0"),
        ("episodes=0", "config.episodes must be at least 1, not 0"),
        ("eval_every=0", "config.eval_every must be at least 1, not 0"),
        ("eval_episodes=-1", "config.eval_episodes must be at least 1, not -1"),
        ("policy.hidden=(8,0)", r"config.policy.hidden must be at least 1, not \(8, 0\)"),
        ("es.sigma=-0.1", "config.es.sigma must be greater than 0, not -0.1"),
        ("es.sigma_decay=0", "config.es.sigma_decay must be greater than 0, not 0.0"),
        ("optimizer.learning_rate=0", "config.optimizer.learning_rate must be greater than 0, not 0.0"),
        ("es.rank=3", "rank 3 > 2"),
    ],
)
def test_bad_settings_are_one_clear_error(override, message):
    config = load("cartpole", [override.replace("'", "")])
    with pytest.raises(config_lib.ConfigError, match=message):
        control.make_learner(config, envs.make(config.env))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["eggroll", "openes", "ppo"])
def test_run_resume_and_result(variant, tmp_path):
    overrides = TINY_PPO if variant == "ppo" else TINY_ES
    result = control.train(load(f"cartpole:{variant}", overrides), tmp_path / "whole")
    metrics = rows(tmp_path / "whole" / "metrics.jsonl")
    steps = 3 if variant == "ppo" else 4
    assert [row["step"] for row in metrics] == list(range(1, steps + 1))
    assert [row["step"] for row in metrics if "eval_return" in row] == sorted({2, steps})
    assert json.loads((tmp_path / "whole" / "result.json").read_text()) == result
    assert (result["method"], result["episodes"], result["env_steps"]) == (variant, 8, metrics[-1]["env_steps"])
    assert 8 <= result["lowest"] <= result["score"] <= 25 and result["seconds"] > 0
    if variant == "ppo":
        assert result["env_steps"] == 3 * 4 * 16
    else:
        # In CartPole the return of an episode is its length.
        np.testing.assert_allclose(metrics[0]["env_steps"], 16 * metrics[0]["fitness_mean"], rtol=1e-6)
        assert metrics[0]["length_mean"] == metrics[0]["fitness_mean"]
    # Resuming a finished run changes nothing but the clock.
    again = control.train(load(f"cartpole:{variant}", overrides), tmp_path / "whole")
    assert again == result and rows(tmp_path / "whole" / "metrics.jsonl") == metrics


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["eggroll", "ppo"])
def test_an_interrupted_run_ends_bit_equal(variant, tmp_path, monkeypatch):
    config = load(f"cartpole:{variant}", TINY_PPO if variant == "ppo" else TINY_ES)
    control.train(config, tmp_path / "whole")
    record = Run.record

    def failing(run, *args, **kwargs):
        if run.step == 2:
            raise KeyboardInterrupt
        record(run, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "record", failing)
        with pytest.raises(KeyboardInterrupt):
            control.train(config, tmp_path / "broken")
    control.train(config, tmp_path / "broken")
    metrics, leaves = zip(*(final(tmp_path / name) for name in ("whole", "broken")), strict=True)
    assert metrics[0] == metrics[1] and leaves[0] == leaves[1]


def final(workdir):
    """The metrics, and shape, dtype and checksum of every leaf of the newest checkpoint."""
    newest = max(path for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
    return (workdir / "metrics.jsonl").read_bytes(), json.loads((newest / "meta.json").read_text())["leaves"]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["eggroll", "ppo"])
def test_the_step_compiles_once_and_depends_on_the_seed_alone(variant):
    def train(seed):
        config = load(f"pendulum:{variant}", [*(TINY_PPO if variant == "ppo" else TINY_ES), f"seed={seed}"])
        learner = control.make_learner(config, envs.make(config.env, 25))
        state = learner.state
        for _ in range(3):
            state, metrics = learner.step(state)
        programs = (learner.step,) if variant == "ppo" else learner.step.args
        assert [program._cache_size() for program in programs] == [1] * len(programs)
        return [np.asarray(x) for x in jax.tree.leaves(learner.actor(state))]

    first, same, other = train(0), train(0), train(1)
    assert all(np.array_equal(a, b) for a, b in zip(first, same, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.slow
def test_common_random_numbers_and_episodes_of_their_own():
    env = envs.make("CartPole-v1", max_steps=60)

    def one_generation(**changes):
        overrides = [*TINY_ES, "es.sigma=1e-9", "episodes=3", *(f"{k}={v}" for k, v in changes.items())]
        learner = control.make_learner(load("cartpole", overrides), env)
        state, metrics = learner.step(learner.state)
        return metrics, state

    shared, state = one_generation()
    # Without noise in the parameters, members that play the same episodes score the same.
    assert float(shared["fitness_std"]) > 0 and int(shared["dead_groups"]) == 3
    own, _ = one_generation(common_random_numbers=False)
    assert int(own["dead_groups"]) == 0
    # All members' observations were counted.
    assert float(state.normalizer.count) == int(shared["env_steps"]) > 3 * 16 * 8


@pytest.mark.slow
def test_a_member_without_a_finite_return_is_counted_and_the_rest_goes_on():
    """A reward that is undefined where the action is large."""
    kind = envs.Continuous((-1.0,), (1.0,))

    def step(key, state, action):
        reward = jnp.where(action[0] > 0.3, jnp.nan, -jnp.square(action[0] - 0.2))
        return state, state, reward, jnp.bool_(False)

    env = envs.Env("partial", 1, kind, 2, lambda key: (jnp.ones(1), jnp.ones(1)), step)
    learner = control.make_learner(load("pendulum", [*TINY_ES, "es.sigma=0.5", "es.members=64"]), env)
    state, metrics = learner.step(learner.state)
    assert 0 < int(metrics["finite_members"]) < 64
    leaves = jax.tree.leaves((learner.actor(state), state.normalizer))
    assert all(bool(np.isfinite(leaf).all()) for leaf in leaves)


def test_no_finite_return_at_all_ends_the_run(tmp_path, monkeypatch):
    kind = envs.Continuous((-1.0,), (1.0,))
    step = lambda key, s, action: (s, s, jnp.nan * action[0], jnp.bool_(False))  # noqa: E731
    env = envs.Env("nothing", 1, kind, 2, lambda key: (jnp.ones(1), jnp.ones(1)), step)
    monkeypatch.setattr(envs, "make", lambda name, max_steps: env)
    with pytest.raises(RunError, match=r"step 1: none of the members has a finite fitness.*check the reward for NaN"):
        control.train(load("pendulum", TINY_ES), tmp_path)
    assert rows(tmp_path / "metrics.jsonl")[0]["finite_members"] == 0
    assert not (tmp_path / "result.json").exists()


@pytest.mark.slow
def test_evolution_learns_a_line():
    """One step, reward -(a - 0.5) ** 2: the optimum is known."""
    kind = envs.Continuous((-1.0,), (1.0,))
    reset = lambda key: (jnp.ones(1), jnp.ones(1))  # noqa: E731
    step = lambda key, s, a: (s, s, -jnp.square(a[0] - 0.5), jnp.bool_(True))  # noqa: E731
    env = envs.Env("line", 1, kind, 1, reset, step)
    for method in ("eggroll", "openes"):
        config = load(f"pendulum:{method}", [*TINY_ES, "es.members=64", "policy.normalize_observations=False"])
        learner = control.make_learner(config, env)
        state = learner.state
        for _ in range(60):
            state, metrics = learner.step(state)
        assert isinstance(state, evolution.State) and state.normalizer is None
        action = learner.policy.apply(learner.actor(state), jnp.ones(1)).location
        np.testing.assert_allclose(action, [0.5], atol=0.05, err_msg=method)


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments.control", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_the_command(tmp_path, capsys, monkeypatch):
    config = "--config=configs/control_cartpole.py"
    tiny = [f"--config.{override}" for override in TINY_ES]
    done = command(config, f"--workdir={tmp_path / 'run'}", *tiny)
    assert done.returncode == 0, done.stderr
    assert "mean return" in done.stdout and "over 8 fresh episodes" in done.stdout
    assert (tmp_path / "run" / "plot.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.chdir(ROOT)

    def refused(workdir, *arguments):
        with pytest.raises(SystemExit) as exit:
            control.main(["control", config, f"--workdir={tmp_path / workdir}", *arguments])
        assert exit.value.code == 2
        return capsys.readouterr().err

    assert "did you mean optimizer.learning_rate" in refused("other", "--config.optimizer.lerning_rate=1")
    assert "es.sigma" in refused("run", *tiny, "--config.es.sigma=0.3")
    assert "Did you mean CartPole-v1" in refused("x", "--config.env=CartPole-v9")
    assert not (tmp_path / "x").exists()


def test_a_config_of_another_script_is_refused(tmp_path):
    other = config_lib.load(f"{ROOT}/configs/digits.py")
    with pytest.raises(config_lib.ConfigError, match="with the keys env, method, but this one has no env"):
        control.train(other, tmp_path / "x")
    with pytest.raises(config_lib.ConfigError, match="with the keys task, method, but this one has no task"):
        pretrain.train(load("cartpole"), str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_ant_smoke(tmp_path, monkeypatch):
    pytest.importorskip("brax")
    make, made = envs.make, []
    monkeypatch.setattr(envs, "make", lambda *args: made.append(make(*args)) or made[0])
    result = control.train(
        load("ant", [*TINY_ES, "max_steps=3", "es.members=4", "steps=2", "eval_episodes=2"]), tmp_path
    )
    assert result["env_steps"] == 2 * 4 * 3
    assert 0 < result["score"] < 9  # about 1 per step for being healthy
    assert (made[0].observation_size, made[0].action) == (27, envs.Continuous((-1.0,) * 8, (1.0,) * 8))
