"""Block sizes of the kernels for the device at hand: `python -m experiments.tune [OP ...]`.

At every size that `experiments.bench kernels` measures, each block size is doubled and halved in turn, as long as that is
faster, and the fastest are written into `kernels/<op>/tuned.json` with device, shape, seconds and versions. An entry of
the same device, kind and shape is replaced. Sizes that do not compile (too much shared memory, say) are passed over.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

import kernels
from experiments.bench.kernels import KERNEL, Work, works
from kernels import tuning

_ROUNDS = 5


def seconds_of(work: Work, implementation: str, sizes: dict[str, int]) -> tuple[float, list]:
    """(median seconds with these block sizes, inf where they do not compile or give another result; what was asked for)."""
    with tuning.trying(sizes) as asked:
        try:
            program = jax.jit(lambda *operands: work.call(*operands, implementation=implementation))
            program = program.lower(*work.operands).compile()
            result = jax.block_until_ready(program(*work.operands))
        except kernels.KernelError:
            raise
        except Exception as error:  # noqa: BLE001  a compiler says in many ways that a tile is too large
            print(f"{work.op} {sizes}: {(str(error).splitlines() or [type(error).__name__])[0][:120]}", file=sys.stderr)
            return float("inf"), list(asked)
        asked = list(asked)
    if not same(result, jax.jit(lambda *operands: work.call(*operands, implementation="reference"))(*work.operands)):
        print(f"{work.op} {sizes}: a result that is not the reference's", file=sys.stderr)
        return float("inf"), asked
    times = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready(program(*work.operands))
        times.append(time.perf_counter() - start)
    return statistics.median(times), asked


def same(result, reference) -> bool:
    """Whether two results differ by no more than a hundredth of their largest entry: a tile gone astray differs by more."""
    close = lambda a, b: (
        float(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)).max())
        <= 0.01 * float(jnp.abs(b.astype(jnp.float32)).max())
    )
    return all(map(close, jax.tree.leaves(result), jax.tree.leaves(reference)))


def climb(measure: Callable[[dict[str, int]], float], start: dict[str, int]) -> tuple[dict[str, int], float, int]:
    """(sizes, seconds, how many were tried): no neighbour, with one size doubled or halved, is faster."""
    tried = {tuple(start.values()): measure(start)}
    best = start
    while True:
        near = [best | {name: new} for name, size in best.items() for new in (2 * size, size // 2) if new >= 1]
        for sizes in near:
            if tuple(sizes.values()) not in tried:
                tried[tuple(sizes.values())] = measure(sizes)
        fastest = min(near, key=lambda sizes: tried[tuple(sizes.values())])
        if tried[tuple(fastest.values())] >= tried[tuple(best.values())]:
            return best, tried[tuple(best.values())], len(tried)
        best = fastest


def record(path: pathlib.Path, platform: str, entry: dict) -> None:
    """Writes an entry, in the place of one of the same device and shape."""
    table = json.loads(path.read_text()) if path.exists() else {}
    of = lambda entry: (entry["device"], entry["kind"], entry["shape"])
    table[platform] = [other for other in table.get(platform, []) if of(other) != of(entry)] + [entry]
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


def main(argv: list[str]) -> None:
    """Tunes the operations named on the command line, all by default."""
    known = sorted({path.parent.name for path in pathlib.Path(kernels.__file__).parent.glob("*/pallas_*.py")})
    parser = argparse.ArgumentParser(
        prog="python -m experiments.tune", description="Block sizes for the device at hand."
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help=", ".join(known))
    ops = parser.parse_args(argv).ops or known
    if unknown := set(ops) - set(known):
        parser.error(f"unknown operation {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    backend = jax.default_backend()
    if backend not in KERNEL:
        parser.error(f"there are no kernels to tune for this device ({backend}); run it on a Hopper GPU or a TPU")
    for work in works():
        if work.op not in ops:
            continue
        try:
            _, asked = seconds_of(work, KERNEL[backend], {})
        except kernels.KernelError as error:
            print(f"{work.op} {work.setting}: {error}", file=sys.stderr)
            continue
        for op, platform, default, kind, shape in asked[:1]:
            blocks, seconds, count = climb(
                lambda sizes, work=work: seconds_of(work, KERNEL[backend], sizes)[0], default
            )
            if seconds == float("inf"):
                print(f"{op} {work.setting}: no sizes compile", file=sys.stderr)
                continue
            entry = {"device": jax.devices()[0].device_kind, "kind": kind, "shape": shape, "blocks": blocks}
            entry |= {"seconds": round(seconds, 7), "versions": {"jax": jax.__version__}}
            record(pathlib.Path(kernels.__file__).parent / op / "tuned.json", platform, entry)
            print(f"{op} {work.setting}: {blocks} in {1e3 * seconds:.3f} ms, {count} tried", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
