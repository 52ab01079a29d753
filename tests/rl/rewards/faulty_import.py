"""A verifier's module that cannot be imported."""

raise RuntimeError("the data this verifier needs is missing")
