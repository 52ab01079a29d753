"""Evaluates a function's jaxpr with some of its inputs replaced by weights that are not arrays.

A jaxpr interpreter rather than dispatch on array types: evolution needs only the primal, and an interpreter walks into
`custom_vjp`, `custom_jvp`, `remat`, `scan`, `while` and `cond` alike, with nothing to install and no tracing hook to lose
to a new JAX version. An equation that reads no such weight is bound as it stands, sub-jaxprs included, so the cost of
interpretation is confined to the equations that use weights.

The interpreter knows nothing of low rank: a `Weight` says how it is sliced along its leading axis and how it becomes an
array; a rule table says what each primitive does with one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array, lax
from jax.extend import core


class Weight:
    """What the interpreter asks of a value that stands for an array; a subclass is also a pytree, so that loops can carry it.

    Attributes:
        base: the array the jaxpr was traced with.
        path: the parameter it came from, for messages.
    """

    base: Array
    path: str

    @property
    def resolvable(self) -> bool:
        """Whether `resolve` costs no more memory than the weight's parts."""
        raise NotImplementedError

    def resolve(self) -> Array:
        """The array this weight stands for."""
        raise NotImplementedError

    def leading(self) -> tuple[Any, Callable[[Any], "Weight"]]:
        """(a pytree to slice along the leading axis, the weight of one slice)."""
        raise NotImplementedError


class PerturbationError(NotImplementedError):
    """A perturbed leaf reached an operation that would have to form its perturbation."""


Rule = Callable[..., Any]


class Interpreter:
    """A rule table, the policy for operations without a rule, and the log of what met what.

    Args:
        rules: primitive name -> rule(eqn, *inputs) returning one output (or a list, for several results), or
            NotImplemented when it does not cover this use.
        materialise: whether a weight that meets no rule becomes an array instead of an error.
    """

    def __init__(self, rules: dict[str, Rule], materialise: bool = False):
        self.rules = rules
        self.materialise = materialise
        self.uses: list[tuple[str, str, bool]] = []  # (leaf path, primitive, formed as an array)

    def call(self, fn: Callable, *args):
        """fn(*args), where leaves of args may be weights. Returns fn's output tree, of arrays."""
        leaves, tree = jax.tree.flatten(args, is_leaf=is_weight)
        bases = [leaf.base if is_weight(leaf) else leaf for leaf in leaves]
        closed, shapes = jax.make_jaxpr(lambda *flat: fn(*jax.tree.unflatten(tree, flat)), return_shape=True)(*bases)
        outs = [self.settle(out, "the function's output") for out in self.run(closed, leaves)]
        return jax.tree.unflatten(jax.tree.structure(shapes), outs)

    def run(self, closed: core.ClosedJaxpr, args: Sequence) -> list:
        """Outputs of a closed jaxpr, each an array or a weight."""
        env = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
        env.update(zip(closed.jaxpr.invars, args, strict=True))
        read = lambda v: v.val if isinstance(v, core.Literal) else env[v]
        for eqn in closed.jaxpr.eqns:
            with eqn.ctx.manager:
                outs = self.apply(eqn, [read(v) for v in eqn.invars])
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in closed.jaxpr.outvars]

    def apply(self, eqn: core.JaxprEqn, inputs: list) -> list:
        """One equation: bound as it stands, by control flow, by a rule, or on resolved weights."""
        name = eqn.primitive.name
        if not any(map(is_weight, inputs)):
            outs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
            return list(outs) if eqn.primitive.multiple_results else [outs]
        if name in _CONTROL:
            return _CONTROL[name](self, eqn, inputs)
        if (inner := _called(eqn)) is not None:
            return self.run(inner, inputs)
        if name in self.rules:
            outs = self.rules[name](eqn, *inputs)
            if outs is not NotImplemented:
                self.uses += [(x.path, name, False) for x in inputs if is_weight(x)]
                return list(outs) if eqn.primitive.multiple_results else [outs]
        cheap = [is_weight(x) and x.resolvable for x in inputs]
        chosen = cheap if any(cheap) else [is_weight(x) for x in inputs]
        return self.apply(eqn, [self.settle(x, name) if c else x for x, c in zip(inputs, chosen, strict=True)])

    def settle(self, value, operation: str):
        """An array as it is; a weight resolved where that is cheap or asked for; else an error."""
        if not is_weight(value):
            return value
        if not (value.resolvable or self.materialise):
            raise PerturbationError(
                f"leaf {value.path!r} {list(value.base.shape)} reaches {operation!r}, which has no low-rank rule here: its "
                f"perturbation would have to be formed for every member; perturb the leaf in full or freeze it with "
                f"rules=(({value.path!r}, 'full' or 'frozen'), ...), or pass materialise=True to allow and count it"
            )
        self.uses.append((value.path, operation, not value.resolvable))
        return value.resolve()


def is_weight(x) -> bool:
    """Whether a value is a stand-in for an array."""
    return isinstance(x, Weight)


def _called(eqn: core.JaxprEqn) -> core.ClosedJaxpr | None:
    """The jaxpr an equation merely calls (jit, remat, custom derivatives, closed calls), else None."""
    if eqn.primitive.name not in _CALLS:
        return None
    inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    return inner if isinstance(inner, core.ClosedJaxpr) else core.ClosedJaxpr(inner, ())


_CALLS = frozenset(
    {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2", "custom_jvp_call", "custom_vjp_call"}
)


def _same(interpreter: Interpreter, old, new, operation: str):
    """A carried value must stay what it was: both arrays, or both weights of one structure."""
    if is_weight(old) and is_weight(new) and jax.tree.structure(old) == jax.tree.structure(new):
        return new
    if is_weight(old):
        raise PerturbationError(
            f"leaf {old.path!r} {list(old.base.shape)} is carried through {operation!r}, which replaces it by something else: "
            f"read the weight from outside the loop, or freeze it with rules=(({old.path!r}, 'frozen'), ...)"
        )
    return interpreter.settle(new, operation)


def _carried(interpreter: Interpreter, init: list, body: core.ClosedJaxpr, consts: int, operation: str) -> list:
    """The initial carry: a weight that the body changes (a gathered row, on its way to being an activation) enters a loop as
    an array where that is cheap."""
    before, after = body.jaxpr.invars[consts : consts + len(init)], body.jaxpr.outvars[: len(init)]
    changes = [is_weight(x) and x.resolvable and a is not b for x, a, b in zip(init, before, after, strict=True)]
    return [interpreter.settle(x, operation) if c else x for x, c in zip(init, changes, strict=True)]


def _scan(interpreter: Interpreter, eqn: core.JaxprEqn, inputs: list) -> list:
    p = eqn.params
    consts, init, xs = _split(inputs, *_scan_counts(p))
    init = _carried(interpreter, init, p["jaxpr"], len(consts), "scan")
    parts = [x.leading() if is_weight(x) else (x, lambda sliced: sliced) for x in xs]
    returned: list[Any] = []  # per stacked output, the whole weight that the body hands back slice by slice, or None

    def body(carry, sliced):
        rows = [rebuild(row) for (_, rebuild), row in zip(parts, sliced, strict=True)]
        outs = interpreter.run(p["jaxpr"], [*consts, *carry, *rows])
        new, ys = outs[: len(carry)], outs[len(carry) :]
        new = [_same(interpreter, a, b, "scan") for a, b in zip(carry, new, strict=True)]
        returned[:] = [
            next((x for x, row in zip(xs, rows, strict=True) if is_weight(y) and y is row), None) for y in ys
        ]
        return new, [interpreter.settle(y, "scan") for y, whole in zip(ys, returned, strict=True) if whole is None]

    carry, ys = lax.scan(
        body, init, [part for part, _ in parts], length=p["length"], reverse=p["reverse"], unroll=p["unroll"]
    )
    stacked = iter(ys)
    return [*carry, *(next(stacked) if whole is None else whole for whole in returned)]


def _scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """How many of a scan's inputs are constants and how many are carried; JAX 0.11 says it by a tree of the inputs."""
    if "ft_in" in params:
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts.vals), len(carry.vals)
    return params["num_consts"], params["num_carry"]


def _while(interpreter: Interpreter, eqn: core.JaxprEqn, inputs: list) -> list:
    p = eqn.params
    cond_consts, body_consts, init = _split(inputs, p["cond_nconsts"], p["body_nconsts"])
    init = _carried(interpreter, init, p["body_jaxpr"], p["body_nconsts"], "while")
    # A weight carried unchanged stays out of the loop: under vmap a condition that differs between members batches the carry.
    before, after = p["body_jaxpr"].jaxpr.invars[len(body_consts) :], p["body_jaxpr"].jaxpr.outvars
    fixed = [is_weight(x) and a is b for x, a, b in zip(init, before, after, strict=True)]
    full = lambda carry: _merged(fixed, init, carry)
    moving = lambda values: [x for x, f in zip(values, fixed, strict=True) if not f]

    def body(carry):
        outs = interpreter.run(p["body_jaxpr"], [*body_consts, *full(carry)])
        return [_same(interpreter, a, b, "while") for a, b in zip(carry, moving(outs), strict=True)]

    def condition(carry):
        return interpreter.settle(interpreter.run(p["cond_jaxpr"], [*cond_consts, *full(carry)])[0], "while")

    return full(lax.while_loop(condition, body, moving(init)))


def _merged(fixed: list[bool], init: list, carry: list) -> list:
    rest = iter(carry)
    return [x if f else next(rest) for x, f in zip(init, fixed, strict=True)]


def _cond(interpreter: Interpreter, eqn: core.JaxprEqn, inputs: list) -> list:
    """Runs every branch and selects: a branch that differs between members is run so by `vmap` in any case, which would
    also copy the weights that enter it for every member."""
    index, *operands = inputs
    branches = eqn.params["branches"]
    outs = [interpreter.run(jaxpr, operands) for jaxpr in branches]
    which = index.astype(bool) if len(branches) == 2 else index

    def chosen(results):
        if is_weight(results[0]) and all(x is results[0] for x in results):
            return results[0]
        return lax.select_n(which, *(interpreter.settle(x, "cond") for x in results))

    return [chosen(results) for results in zip(*outs, strict=True)]


_CONTROL = {"scan": _scan, "while": _while, "cond": _cond}


def _split(values: list, first: int, second: int) -> tuple[list, list, list]:
    return values[:first], values[first : first + second], values[first + second :]
