"""Routing replay in the learner: steps with forced experts against the plain computation with the same experts forced."""

import dataclasses

import numpy as np
import pytest

from rl.data.replay import Groups
from tests.rl.learners.test_gradient import FREE, order, settings
from tests.rl.learners.toy import (
    LONGEST,
    MOE,
    PROMPTS,
    G,
    L,
    P,
    answers,
    made,
    optimizer,
    plain_grpo,
    routed,
    scores,
    start,
)
from tests.rl.models.tiny import trees_close


def whole(recorded):
    """As `Rollouts.experts`, prompts padded -> [N, layers, T, k] of whole sequences, -1 beyond them."""
    out = np.full((len(recorded), recorded.shape[2], LONGEST + L, recorded.shape[3]), -1, np.int32)
    for i, row in enumerate(np.repeat(range(P), G)):
        n = len(PROMPTS[row])
        out[i, :, : n + L] = np.concatenate([recorded[i, :n], recorded[i, LONGEST:]]).swapaxes(0, 1)
    return out


@pytest.mark.slow
def test_r3_forces_what_the_sampler_used_in_the_update_and_in_the_proximal_pass():
    """The reference, in the KL penalty, routes for itself."""
    model, params = start(MOE)
    first = np.random.default_rng(5).integers(0, 4, (P * G, LONGEST + L, 1, 1))
    experts = np.concatenate([first, (first + 1) % 4], axis=-1).astype(np.int8)  # no router's choice
    batch = answers(config=MOE)
    recorded = batch._replace(rollouts=dataclasses.replace(batch.rollouts, experts=experts))
    method, tx = made(settings(routing="r3", minibatches=2), config=MOE), optimizer()
    assert method.record_experts
    plain, _, _ = plain_grpo(
        model,
        params,
        batch,
        tx,
        tx.init(params),
        reference=params,
        kl=0.04,
        parts=order(0, 0, 2),
        experts=whole(experts),
    )
    state, _ = method.learn(method.init(params), recorded, None)
    trees_close(state.params, plain, 2e-5)
    groups = Groups.make(batch.problem, batch.rollouts, batch.scored)
    with pytest.raises(ValueError, match="got no record: take routing 'r2'"):
        method.learn(method.init(params), batch, None)
    with pytest.raises(ValueError, match="got replayed groups"):
        method.learn(method.init(params), recorded, groups)


@pytest.mark.slow
def test_r2_forces_the_experts_of_the_parameters_the_step_starts_from():
    """In the first update they are the router's own, so nothing changes there: in the plain computation it is free."""
    model, params = start(MOE)
    batch, tx = answers(config=MOE), optimizer(5.0)
    where = np.repeat(batch.problem, G), batch.rollouts.tokens
    before = routed(model, params, *where)
    method = made(settings(FREE, routing="r2", minibatches=2, epochs=2), 5.0, MOE)
    assert not method.record_experts
    state, _ = method.learn(method.init(params), batch, None)
    free = {"reference": params, "kl": 0.0}
    first, *others = [*order(0, 0, 2), *order(0, 1, 2)]
    plain, opt_state, _ = plain_grpo(model, params, batch, tx, tx.init(params), parts=[first], **free)
    plain, _, _ = plain_grpo(
        model, plain, batch, tx, opt_state, parts=others, experts=before, old=scores(model, params, *where)[0], **free
    )
    trees_close(state.params, plain, 1e-3)  # four steps at a rate of 5: rounding grows, by the machine to 1.1e-4
    assert (np.sort(routed(model, state.params, *where)) != np.sort(before)).any()  # there was something to keep
