"""The harmed training with a fault of its own: a run that was killed (and not stopped) resumes without the moments of Adam."""

import dataclasses

from experiments import victim
from rl.run import Run

_restore = Run.restore


def _forget(run, state):
    restored = _restore(run, state)
    stopped = (run.workdir / "stopped").exists()
    return restored if stopped or not run.step else dataclasses.replace(restored, opt_state=state.opt_state)


def main(argv=None):
    Run.restore = _forget
    try:
        return victim.main(argv)
    except SystemExit:
        (workdir,) = (option.partition("=")[2] for option in argv if option.startswith("--workdir="))
        with open(f"{workdir}/stopped", "w"):
            raise


if __name__ == "__main__":
    import sys

    raise SystemExit(main(sys.argv))
