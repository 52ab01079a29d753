"""Which data a step sees, as pure functions of seed and step: nothing to save, nothing to restore."""
