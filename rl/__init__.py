"""Learning from reward: the run harness, environments and policies shared by every experiment script."""
