"""What turns verified completions into an update: evolution or backprop, behind the same few functions (`types.Learner`)."""
