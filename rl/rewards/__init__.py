"""Rewards from verifiers that run in worker processes (`rl.rewards.pool.Pool`); nothing here imports jax."""
