"""Policy-gradient objectives on log-probabilities: advantages, ratios, weights, aggregation. They never see a model."""
