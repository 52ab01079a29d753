"""`python -m experiments.bench`: see the package."""

import sys

from experiments import bench
from experiments.bench.harness import main

if __name__ == "__main__":
    main(sys.argv[1:], bench.CASES)
