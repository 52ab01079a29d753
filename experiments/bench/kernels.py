"""Hot operations against their plain-JAX twins and against what the device could do: see the package."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from experiments.bench.harness import Row, row, timed_in_turn
from kernels import decode_attention, dispatch, es_update, int8_matmul, lowrank_matmul, token_logprob
from kernels.noise_bits import Generated

KERNEL = {"gpu": "pallas_gpu", "tpu": "pallas_tpu"}


@dataclasses.dataclass(frozen=True)
class Work:
    """One operation at one size.

    Attributes:
        op, setting: its name, and what the row says.
        call: (*operands, implementation=) -> result.
        operands: arrays, random, drawn once.
        flops, moved: of the result's definition: multiply-adds counted twice, and bytes that must cross memory once.
        plain: what the operation costs where there is no population or no fusion, if anything compares: a plain product.
    """

    op: str
    setting: dict[str, Any]
    call: Callable
    operands: tuple
    flops: float
    moved: float
    plain: Callable | None = None


def _normal(seed: int, *shape: int, dtype=jnp.float32) -> Array:
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def _address(ids: Array, role: int, kind: str, size: int) -> Generated:
    return Generated(jnp.array([0, 0, 7, 0], jnp.uint32), ids, 0, role, kind, 1, size)


def _bytes(tree) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def products(width: int, members: int, dtype) -> Iterator[Work]:
    """A square layer under a population, one row a member, by design and by where the factors come from."""
    x, w = _normal(0, members, 1, width, dtype=dtype), _normal(1, width, width, dtype=dtype)
    side = math.isqrt(members)
    ids = lambda *lead: jnp.arange(math.prod(lead), dtype=jnp.uint32).reshape(lead)
    for design in ("crossed", "independent"):
        lead, of_right, of_left = ((side, side), (1, side), (side, 1)) if design == "crossed" else ((members,),) * 3
        scale = jnp.full((1,) * len(lead), 0.01)
        rows = x.reshape(*lead, 1, width)
        for noise in ("stored", "gaussian", "rademacher"):
            if noise == "stored":
                right, left = _normal(2, *of_right, 1, width, dtype=dtype), _normal(3, *of_left, 1, width, dtype=dtype)
            else:
                right, left = (_address(ids(*of), role, noise, width) for of, role in ((of_right, 1), (of_left, 0)))
            setting = {"width": width, "members": members, "rank": 1, "design": design, "noise": noise}
            setting["dtype"] = jnp.dtype(dtype).name
            operands = (rows, w, right, left, scale)
            moved = _bytes(operands) + rows.nbytes
            flops = 2 * members * width * (width + 2)
            plain = lambda rows, w, *rest: jnp.matmul(rows, w, preferred_element_type=jnp.float32).astype(dtype)
            yield Work("lowrank_matmul", setting, lowrank_matmul.matmul, operands, flops, moved, plain)


def estimates(width: int, directions: int) -> Iterator[Work]:
    """The estimate of a square layer, factors drawn or made in the tile."""
    side = math.isqrt(directions)
    for design in ("crossed", "independent"):
        g, p = (1, side) if design == "crossed" else (directions, 1)
        weights = _normal(0, g, p, p)
        for noise in ("stored", "gaussian", "rademacher"):
            if noise == "stored":
                left, right = _normal(1, g, p, 1, 1, width), _normal(2, g, p, 1, 1, width)
            else:
                ids = jnp.arange(g * p, dtype=jnp.uint32).reshape(g, p)
                left, right = _address(ids, 0, noise, width), _address(ids, 1, noise, width)
            setting = {"width": width, "directions": directions, "rank": 1, "design": design, "noise": noise}
            operands = (weights, left, right)
            flops = 2 * g * p * width * width + (2 * g * p * p * width if p > 1 else 0)
            yield Work("es_update", setting, es_update.update, operands, flops, _bytes(operands) + 4 * width * width)


def scores(rows: int, width: int, vocab: int, dtype) -> Iterator[Work]:
    """Log-probabilities and entropies of given tokens."""
    hidden, head = _normal(0, rows, width, dtype=dtype), (_normal(1, width, vocab) / math.sqrt(width)).astype(dtype)
    ids = jax.random.randint(jax.random.key(2), (rows,), 0, vocab)
    setting = {"rows": rows, "width": width, "vocab": vocab, "dtype": jnp.dtype(dtype).name}
    operands = (hidden, head, ids)
    moved = _bytes(operands) + 8 * rows
    yield Work("token_logprob", setting, token_logprob.log_prob, operands, 2 * rows * width * vocab, moved)


def attentions(slots: int, heads: int, groups: int, size: int, length: int, dtype) -> Iterator[Work]:
    """One token of every slot against its cache, caches half full on average."""
    q = _normal(0, slots, heads, size, dtype=dtype)
    k, v = (_normal(i, slots, groups, size, length, dtype=dtype) for i in (1, 2))
    filled = jax.random.randint(jax.random.key(3), (slots,), 1, length + 1)
    setting = {"slots": slots, "heads": heads, "kv_heads": groups, "head_dim": size, "length": length}
    setting["dtype"] = jnp.dtype(dtype).name
    used = int(filled.sum()) * groups * size * 2
    call = lambda *operands, implementation=None: jax.vmap(
        functools.partial(decode_attention.attend, implementation=implementation)
    )(*operands)
    flops, moved = 2 * used * heads // groups, used * q.dtype.itemsize + 2 * q.nbytes
    yield Work("decode_attention", setting, call, (q, k, v, filled), flops, moved)


def integers(width: int, members: int) -> Iterator[Work]:
    """A square layer of the integer model under a crossed population."""
    side = math.isqrt(members)
    draw = lambda seed, *shape: jax.random.randint(jax.random.key(seed), shape, -127, 128, jnp.int8)
    x, w = draw(0, side, side, 1, width), draw(1, width, width)
    right, left, sign = draw(2, 1, side, width), draw(3, side, 1, width), jnp.ones((1, 1), jnp.int32)
    setting = {"width": width, "members": members, "rank": 1, "design": "crossed", "dtype": "int8"}
    operands = (x, w, right, left, sign)
    call = functools.partial(int8_matmul.matmul, shift=8, divisor=16 * math.isqrt(width))
    yield Work("int8_matmul", setting, call, operands, 2 * members * width * width, _bytes(operands) + x.nbytes)


def works() -> Iterator[Work]:
    """The sizes of this device: of a CPU, at most 50 GFLOP each."""
    if jax.default_backend() == "cpu":
        yield from products(2048, 1024, jnp.float32)
        yield from estimates(2048, 1024)
        yield from scores(512, 1024, 32768, jnp.float32)
        yield from attentions(8, 32, 8, 128, 4096, jnp.float32)
        yield from integers(1024, 4096)
    else:
        yield from products(8192, 1024, jnp.bfloat16)
        yield from estimates(8192, 2048)
        for vocab in (32768, 131072):
            yield from scores(8192, 4096, vocab, jnp.bfloat16)
        yield from attentions(64, 32, 8, 128, 4096, jnp.bfloat16)
        yield from integers(1024, 16384)


@functools.cache
def _device(dtype: str) -> tuple[float, float]:
    """(operations, bytes) per second of this device: of a large plain product in this type, and of scaling an array."""
    n = 2048 if jax.default_backend() == "cpu" else 8192
    kind = {"int8": (jnp.int8, jnp.int32), "float32": (jnp.float32,) * 2, "bfloat16": (jnp.bfloat16, jnp.float32)}[
        dtype
    ]
    a = jnp.ones((n, n), kind[0])
    product = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=kind[1]))
    b = jnp.ones(2**26 if jax.default_backend() == "cpu" else 2**29, jnp.float32)
    scaled = jax.jit(lambda b: 1.5 * b)
    seconds = timed_in_turn({"product": lambda: product(a), "copy": lambda: scaled(b)}, 5)
    return 2 * n**3 / seconds["product"], 2 * b.nbytes / seconds["copy"]


def kernels(repeats: int) -> Iterator[Row]:
    """Every operation: the kernel of this device where there is one, its twin, a plain product, and the roofline."""
    name = KERNEL.get(jax.default_backend())
    for work in works():
        fns = {"reference": _compiled(work.call, work.operands, "reference")}
        further: dict[str, Any] = {}
        if name:
            try:
                fns["kernel"] = _compiled(work.call, work.operands, name)
            except dispatch.KernelError as error:
                further["unserved"] = str(error)
        if work.plain:
            fns["plain"] = _compiled(work.plain, work.operands)
        seconds = timed_in_turn(fns, repeats)
        rate, bandwidth = _device(work.setting.get("dtype", "float32"))
        bound = max(work.flops / rate, work.moved / bandwidth)
        fastest = "kernel" if "kernel" in seconds else "reference"
        setting = {"op": work.op} | work.setting
        further |= {"flops": work.flops, "bytes": work.moved, "roofline_seconds": round(bound, 6)}
        yield row(setting, f"roofline_over_{fastest}", bound / seconds[fastest], seconds, repeats, **further)
        if fastest == "kernel":
            yield row(setting, "reference_over_kernel", seconds["reference"] / seconds["kernel"], seconds, repeats)
        if work.plain:
            yield row(setting, f"plain_over_{fastest}", seconds["plain"] / seconds[fastest], seconds, repeats)


def _compiled(call: Callable, operands: tuple, implementation: str | None = None) -> Callable[[], Any]:
    chosen = {} if implementation is None else {"implementation": implementation}
    program = jax.jit(functools.partial(call, **chosen)).lower(*operands).compile()
    return lambda: program(*operands)


CASES = {"kernels": kernels}
