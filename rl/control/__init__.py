"""Learning to control: policies acting in environments, by evolution or by PPO."""
