"""Trains a language model from verified reward, by evolution or by backprop: the one loop, from prompts to update.

    python -m experiments.train --config=configs/countdown_eggroll.py --workdir=runs/countdown
    python -m experiments.train --config=configs/countdown_grpo.py:dapo --workdir=runs/dapo

    export JAX_COORDINATOR_ADDRESS=host0:1234 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=0    # 1 on the second host
    python -m experiments.train --config=configs/countdown_grpo.py --workdir=/shared/grpo --config.mesh.fsdp=-1

The same command resumes. Several processes (`rl.mesh.connect`) run one program on one config: `config.mesh` divides the work
over the devices of all, each has `config.reward.workers` of its own judge a share of the answers, and the first writes the
files, in a folder that all must see. They end in the same step on SIGTERM to one of them, and within half a minute where one
is lost.

Every step: problems -> completions -> verdicts -> what the method learns from them
(`rl.learners`). The mean parameters answer held-out problems greedily before the first step, every `eval_every` steps and at
the end, where `result.json` compares the first with the last, `plot.png` is drawn, and `model` is the mean parameters in
Hugging Face's layout, which `experiments.evaluate` and `transformers` load.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from experiments import build, plot
from experiments.language import SCORES, Setup, evaluate, export, set_up, start_slots, task_of, verdicts, warm_start
from rl import generations
from rl import mesh as meshes
from rl.data import prompts as data
from rl.data import selection
from rl.data.embedding import embed
from rl.data.replay import Groups
from rl.launch import launch
from rl.learners.gradient import NonFinite
from rl.learners.types import Answers, tree_bytes
from rl.models.language import Params
from rl.rewards.pool import Pool, PoolError
from rl.rollout import engine
from rl.rollout.generate import generate
from rl.run import Run, RunError
from rl.tasks.types import STATUSES, TaskError
from rl.types import FINISHES, Rollouts, Scored

_SHOWN = (
    *("eval_solved", "eval_reward", "train_reward", "fitness_std"),
    *("zero_spread_groups", "entropy", "kl_reference", "clip_fraction", "ess", "sampler_gap_max", "gradient_norm"),
)


def train(config: ml_collections.ConfigDict, workdir: str | Path, tensorboard: bool = False) -> dict[str, Any]:
    """Runs or resumes a config in a folder; returns what `result.json` holds."""
    build.require(config, "task", "warm_start")
    build.check(config)
    task = task_of(config)
    with Pool(task.verify, workers=config.reward.workers, deadline=config.reward.deadline) as pool:
        # All that can be wrong with a config comes before `run`, whose folder remembers it.
        setup, params = set_up(config, task, pool)
        run = Run(
            workdir, config, total_steps=config.steps, save_every=config.save_every, unit="tokens",
            show=_SHOWN, logs=("samples.jsonl", "judged.jsonl", *((generations.NAME,) if setup.learner.update else ())),
            tensorboard=tensorboard,
        )  # fmt: skip
        try:
            with run:
                return loop(run, setup, warm_start(run, setup, params))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            knob = "es.chunk" if setup.learner.members else "gradient.tokens"
            raise RunError(
                f"the device has too little memory ({str(error).splitlines()[0]}): lower config.engine.slots = "
                f"{config.engine.slots} (while sampling) or config.{knob} = {config[knob.split('.')[0]][knob.split('.')[1]]} "
                "(while learning); python -m experiments.fit says what fits"
            ) from error


class State(NamedTuple):
    """All that a checkpoint holds: of the method, of the slots, and how many completions were asked for."""

    learner: Any
    selection: Any
    replay: Any
    asked: np.int64


class Step(NamedTuple):
    """What a step learns from, and what it took."""

    answers: Answers
    replayed: Groups | None
    tokens: int  # generated, those of discarded answers included
    metrics: dict[str, float]
    judged: tuple[list[int], list[float | None]]  # every problem asked, and the mean of its judged rewards


def loop(run: Run, setup: Setup, params: Params) -> dict[str, Any]:
    """Steps until the run is complete."""
    config, learner = setup.config, setup.learner
    state = start(setup, params)
    run.say(plan(setup, state))
    before = evaluate(setup, learner.mean(state.learner))
    run.say(f"before training, {len(setup.test)} held-out problems: {describe(before)}")
    state, after = run.restore(state), None
    while run.step < run.total_steps:
        step = run.step + 1
        try:
            state, made = collect(setup, state, run.step)
        except (
            ValueError
        ) as error:  # answers that nothing can be learnt from, such as log-probabilities that are not finite
            raise RunError(f"step {step}: {error}") from error
        method, metrics = learn(run, setup, state, made)
        if learner.update:
            run.append(generations.NAME, generations.pack(step, metrics.pop("fitness")))
        state = state._replace(learner=method)
        metrics |= made.metrics
        if step % config.eval_every == 0 or step == run.total_steps:
            after = evaluate(setup, learner.mean(state.learner))
            metrics |= {f"eval_{name}": value for name, value in summary(after).items()}
        shown = range(min(config.log_samples, len(made.answers.texts)))
        run.log("samples.jsonl", (sample(setup, step, made.answers, row) for row in shown))
        run.log("judged.jsonl", [{"step": step, "problem": made.judged[0], "reward": made.judged[1]}])
        run.record(state, metrics, work=made.tokens)
    after = evaluate(setup, learner.mean(state.learner)) if after is None else after
    return finish(run, setup, learner.mean(state.learner), before, after)


# -- the parts of a step ---------------------------------------------------------------------------------------------


def start(setup: Setup, params: Params) -> State:
    """The state before the first step."""
    embedded = lambda: embed(setup.model, params, setup.train.ids)
    slots = start_slots(setup.config, setup.selection, setup.replay, len(setup.train), embedded)
    return State(setup.learner.init(params), *slots, np.int64(0))


def collect(setup: Setup, state: State, step: int) -> tuple[State, Step]:
    """A step's judged completions, in as many rounds as `config.refills` allows and groups without spread need (DAPO)."""
    config = setup.config
    drawn = setup.replay.apply(state.replay, step, config.prompts)
    rounds: list[Answers] = []
    metrics: dict[str, float] = {}
    before, useful = state.asked, np.zeros(0, bool)
    tokens = 0
    judged: tuple[list[int], list[float | None]] = ([], [])

    def ask(rows: np.ndarray, samples: int) -> Answers:
        nonlocal state, tokens
        answers = complete(setup, state, rows, samples)
        state = state._replace(asked=state.asked + len(answers.texts))
        tokens += int(answers.rollouts.length.sum())
        judged[0].extend(map(int, rows))
        judged[1].extend(
            float(value[ok].mean()) if ok.any() else None for value, ok in zip(*table(setup, answers), strict=True)
        )
        return answers

    for _ in range(1 + config.refills):
        missing = drawn.fresh - int(useful.sum())
        if not missing:
            break
        memory, rows, measured = selection.choose(
            setup.selection, state.selection, step, missing, lambda rows, samples: table(setup, ask(rows, samples))
        )
        answers = ask(rows, config.samples)
        memory, more = setup.selection.update(memory, selection.Judged(step, rows, *table(setup, answers)))
        state, metrics = state._replace(selection=memory), metrics | measured | more
        rounds.append(answers)
        if config.refills:
            useful = np.concatenate([useful, Groups.make(rows, answers.rollouts, answers.scored).informative])
    answers = rounds[0] if len(rounds) == 1 else Answers.join(rounds)
    metrics |= measures(answers.rollouts, answers.scored)  # of all that were asked for
    if len(rounds) > 1:  # groups with spread first; those without keep their place in the batch where too few are left
        answers = answers.take(np.argsort(~useful, kind="stable")[: drawn.fresh])
    if not setup.learner.members:
        fresh = Groups.make(answers.problem, answers.rollouts, answers.scored)
        memory, more = setup.replay.update(state.replay, step, fresh)
        state, metrics = state._replace(replay=memory), metrics | more
    metrics |= {"rounds": len(rounds), "completions": int(state.asked - before)}
    return state, Step(answers, drawn.groups, tokens, metrics, judged)


def learn(run: Run, setup: Setup, state: State, made: Step) -> tuple[Any, dict[str, Any]]:
    """The method's update; a batch that it cannot learn from is kept beside the run."""
    try:
        return setup.learner.learn(state.learner, made.answers, made.replayed)
    except NonFinite as error:
        path = run.workdir / "nonfinite_batch.npz"
        if meshes.is_main():
            np.savez(path, **error.groups._asdict())
        raise RunError(f"{error}, which is in {path}") from error


def complete(setup: Setup, state: State, rows: np.ndarray, samples: int) -> Answers:
    """Completions of these training problems by the method's policy or population, judged."""
    config, learner = setup.config, setup.learner
    problems = setup.train.take(rows)
    requests = data.population_requests(
        problems, learner.members, samples, config.budget, int(state.asked), common=learner.common
    )
    weights, version = learner.weights(state.learner)
    rollouts = generate(setup.model, setup.settings, weights, requests, setup.key, version=int(version))
    asked = np.tile(np.repeat(np.arange(len(problems)), samples), max(learner.members, 1))
    texts, scored = verdicts(setup, problems, asked, rollouts)
    return Answers(np.asarray(rows, np.int32), texts, rollouts, scored)


def table(setup: Setup, answers: Answers) -> tuple[np.ndarray, np.ndarray]:
    """(value, ok) [P, S]: all answers to each problem, over members and samples."""
    shaped = (answers.by_member(x, max(setup.learner.members, 1)) for x in (answers.scored.value, answers.scored.ok))
    value, ok = (np.moveaxis(x, 0, 1).reshape(len(answers.problem), -1) for x in shaped)
    return value, ok


def summary(scored: Scored) -> dict[str, float]:
    """Mean reward, share solved (reward 1), share without a verdict (which counts as reward 0) and every part's mean."""
    parts = {name: float(np.nanmean(part)) for name, part in scored.parts.items()}
    shares = {"solved": float((scored.value >= 1).mean()), "unjudged": float((~scored.ok).mean())}
    return {"reward": float(scored.value.mean())} | shares | parts


def describe(scored: Scored) -> str:
    """`summary` as text."""
    return ", ".join(f"{name} {value:.3f}" for name, value in summary(scored).items())


def measures(rollouts: Rollouts, scored: Scored) -> dict[str, float]:
    """Metrics of a step's completions."""
    ends = {f"{name}_share": float((rollouts.finish == code).mean()) for code, name in enumerate(FINISHES)}
    statuses = {f"reward_{status}": int((scored.status == status).sum()) for status in STATUSES if status != "ok"}
    rewards = {f"train_{name}": value for name, value in summary(scored).items()}
    surprise = -float(rollouts.logp_full[rollouts.mask].mean())
    return rewards | ends | statuses | {"length_mean": float(rollouts.length.mean()), "surprise": surprise}


def sample(setup: Setup, step: int, answers: Answers, row: int) -> dict[str, Any]:
    """One line of `samples.jsonl`."""
    rollouts, scored = answers.rollouts, answers.scored
    prompt = row // setup.config.samples % len(answers.problem)
    problem = setup.train.problems[answers.problem[prompt]]
    return {
        "step": step,
        "member": int(rollouts.member[row]),
        "problem": problem.id,
        "prompt": problem.prompt,
        "completion": answers.texts[row],
        "finish": FINISHES[rollouts.finish[row]],
        "reward": float(scored.value[row]),
        "status": str(scored.status[row]),
        "parts": {name: float(part[row]) for name, part in scored.parts.items() if not np.isnan(part[row])},
    }


# -- before and after ------------------------------------------------------------------------------------------------


def plan(setup: Setup, state: State) -> str:
    """What the run needs, before it takes it."""
    c, learner, mib = setup.config, setup.learner, 2**20
    rows = max(learner.members, 1) * c.prompts * c.samples
    who = f"{learner.members} members x " if learner.members else ""
    weights = sum(x.size for x in jax.tree.leaves(learner.mean(state.learner)))
    needs = learner.plan(state.learner) | {
        "prompts and replay": tree_bytes((state.selection, state.replay)),
        "cache of config.engine.slots": engine.cache_bytes(setup.model, setup.settings),
    }
    return (
        f"{weights:,} parameters; {who}{c.prompts} prompts x {c.samples} samples = {rows:,} completions a step in "
        f"{setup.settings.slots} slots of {setup.settings.length} tokens\n"
        f"memory in MiB: {', '.join(f'{name} {size / mib:.1f}' for name, size in needs.items() if size)} "
        "(`python -m experiments.fit` says what fits)"
    )


def finish(run: Run, setup: Setup, params: Params, before: Scored, after: Scored) -> dict[str, Any]:
    """Writes the parameters (once) and the result: the paired difference on the same problems with its 95 % interval."""
    folder = run.workdir / "model"
    if not meshes.agreed(folder.is_dir())[0]:
        export(folder, setup, params)
    solved = [100.0 * (scored.value >= 1) for scored in (before, after)]
    gained = {"solved": solved, "reward": [before.value, after.value]}
    details = {f"unjudged_{when}": int((~s.ok).sum()) for when, s in (("before", before), ("after", after))}
    for name, (old, new) in gained.items():
        half = 1.96 * float(np.std(new - old)) / len(old) ** 0.5
        details |= {f"{name}_before": float(old.mean()), f"{name}_after": float(new.mean())}
        details |= {f"{name}_gain": float((new - old).mean()), f"{name}_gain_interval": half}
    score = setup.config.score
    return run.finish(
        SCORES[score], details[f"{score}_after"], before=details[f"{score}_before"], task=setup.config.task.name,
        method=setup.config.method, problems=len(solved[0]), **details,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    workdir, result = launch(train, argv, errors=(TaskError, PoolError))
    print(
        f"{result['task']}, {result['method']}, seed {result['seed']}: {result['solved_before']:.1f} % -> "
        f"{result['solved_after']:.1f} % of {result['problems']} held-out problems solved (gain {result['solved_gain']:.1f} +- "
        f"{result['solved_gain_interval']:.1f}), mean reward {result['reward_before']:.3f} -> {result['reward_after']:.3f}, "
        f"after {result['tokens']} tokens in {result['seconds']:.0f} s"
    )
    return plot.main([workdir, "--x=tokens", "--y=eval_reward"])


if __name__ == "__main__":
    raise SystemExit(main())
