"""Every optimizer a second time, from its paper's formula: f64, plain NumPy, one matrix after the other.

What is drawn at random (chosen coordinates, active tensors, bases) comes in from outside, under `drawn`; where its size follows
from a rule, that is checked here. Singular vectors are computed here, and only their signs come in. Nothing else is shared with
the package. Trees are flat: path -> array; a path below "layers/" is a stack over layers.
"""

import collections
import re

import numpy as np


def stacked(path):
    return path.startswith("layers/")


def tensors(path, x):
    """The matrices of a leaf, or its vectors, one a layer."""
    lead = x.ndim - 2 if x.ndim - stacked(path) >= 2 else int(stacked(path))
    return x.reshape(-1, *x.shape[lead:])


def natural(path):
    """layer_10 after layer_2."""
    return [(int(x), "") if x.isdigit() else (0, x) for x in re.findall(r"\d+|\D+", path)]


class Adam:
    """The rule with two moments, for one array of any shape."""

    def __init__(self, b1, b2, eps):
        self.b1, self.b2, self.eps = b1, b2, eps
        self.forget()

    def forget(self):
        self.t, self.m, self.v = 0, 0.0, 0.0

    def carry(self, move):
        self.m, self.v = move(self.m), move(self.v)

    def __call__(self, g):
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g**2
        return self.m / (1 - self.b1**self.t) / (np.sqrt(self.v / (1 - self.b2**self.t)) + self.eps)


class Lion(Adam):
    def __call__(self, g):
        out = np.sign(self.b1 * self.m + (1 - self.b1) * g)
        self.m = self.b2 * self.m + (1 - self.b2) * g
        return out

    def carry(self, move):
        self.m = move(self.m)


class Momentum(Lion):
    def __call__(self, g):
        self.m = self.b1 * self.m + g
        return self.m


RULES = {"adam": Adam, "lion": Lion, "momentum": Momentum}


class Twin:
    """W <- W - lr (direction + decay W), for subclasses that know directions."""

    def __init__(self, params, lr, decay=0.0, betas=(0.9, 0.999), eps=1e-8, groups=(), split="split"):
        self.params = {path: np.float64(w) for path, w in params.items()}
        self.lr, self.decay, self.adam = lr, decay, (*betas, eps)
        self.t = 0  # steps made
        self.groups = {path: split if path.endswith("kernel") else "full" for path in params} | dict(groups)
        self.decays = {path: group != "frozen" for path, group in self.groups.items()}
        self.full = {path: Adam(*self.adam) for path in params}
        self.own = {}  # what a method keeps of a matrix, by (path, number)

    def step(self, gradients, drawn=None):
        """The updates, of which the parameters have been changed."""
        gradients = {path: np.float64(g) for path, g in gradients.items()}
        drawn = drawn or {}
        out = self.directions(gradients, drawn)
        for path, group in self.groups.items():
            if group == "full":
                out[path] = self.full[path](gradients[path])
            if group == "frozen":
                out[path] = np.zeros_like(gradients[path])
        for path, w in self.params.items():
            out[path] = -self.lr * (out[path] + self.decay * self.decays[path] * w)
            self.params[path] = w + out[path]
        self.t += 1
        return out

    def directions(self, gradients, drawn):
        out = {}
        for path in [path for path, group in self.groups.items() if group not in ("full", "frozen")]:
            draws = drawn.get(path)
            if draws is not None:
                draws = np.asarray(draws)
                draws = draws if gradients[path].ndim > 2 else draws[None]
            parts = [
                self.matrix((path, i), g, None if draws is None else draws[i])
                for i, g in enumerate(tensors(path, gradients[path]))
            ]
            out[path] = np.stack(parts).reshape(gradients[path].shape)
        return out


class Subset:
    """FRUGAL on a vector: coordinates I have memory, in the order of I, the others have none."""

    def __init__(self, rule, rest, state):
        self.rule, self.rest, self.state, self.chosen = rule, rest, state, None

    def __call__(self, g, fresh):
        if fresh is not None:
            before, self.chosen = self.chosen, np.asarray(fresh).ravel()
            if self.state == "reset":
                self.rule.forget()
            if self.state == "project" and before is not None:
                self.rule.carry(lambda x: self.seen(x, before, g.size))
        out = self.rest(g)
        out[self.chosen] = self.rule(g[self.chosen])
        return out

    def seen(self, x, before, size):
        lifted = np.zeros(size)
        lifted[before] = x
        return lifted[self.chosen]


def columns_projected(side, m, n):
    """Whether the side with n entries is made small."""
    return {"short": n <= m, "long": n > m, "left": False, "right": True}[side]


def singular(g, right, rank, like):
    """Top singular vectors, one a column, pointing as `like`."""
    u, _, vh = np.linalg.svd(g)
    q = vh[:rank].T if right else u[:, :rank]
    assert q.shape == like.shape
    return q * np.sign(np.sum(q * like, axis=0))


class Subspace:
    """FRUGAL on a matrix: what is in the span of Q has memory."""

    def __init__(self, rule, rest, state, right):
        self.rule, self.rest, self.state, self.right, self.q = rule, rest, state, right, None

    def down(self, q, g):
        return g @ q if self.right else q.T @ g

    def up(self, q, small):
        return small @ q.T if self.right else q @ small

    def __call__(self, g, fresh):
        if fresh is not None:
            before, self.q = self.q, fresh
            if self.state == "reset":
                self.rule.forget()
            if self.state == "project" and before is not None:
                self.rule.carry(lambda x: self.down(self.q, self.up(before, x)))
        small = self.down(self.q, g)
        out = self.up(self.q, self.rule(small))
        return out if self.q.shape[1] == min(g.shape) else out + self.rest(g - self.up(self.q, small))


def listed(order, count):
    """The tensors in the order in which windows pass over them."""
    left = collections.deque(range(count))
    ends = {"ascending": [left.popleft], "descending": [left.pop], "mirror": [left.popleft, left.pop]}[order]
    return [ends[i % len(ends)]() for i in range(count)]


class Frugal(Twin):
    """Drawn: I of every matrix, its basis, or for a shape the numbers of active tensors where the order is random."""

    def __init__(
        self, params, lr, decay=0.0, *, kind, density, every, order="random", side="short", state="reset", full="adam",
        free="sign", free_scale=1.0, split_scale=1.0, **settings,
    ):  # fmt: skip
        super().__init__(params, lr, decay, **settings)
        self.kind, self.density, self.every, self.order, self.side = kind, density, every, order, side
        self.state, self.rule, self.free = state, RULES[full], free
        self.free_scale, self.split_scale = free_scale, split_scale

    def rest(self, g):
        return self.free_scale * {"sign": np.sign(g), "sgd": g, "none": 0 * g}[self.free]

    def matrix(self, name, g, draw):
        if self.groups[name[0]] == "free":
            return self.split_scale * self.rest(g)
        fresh = self.t % self.every == 0
        if self.kind in ("svd", "random"):
            right, rank = columns_projected(self.side, *g.shape), int(np.rint(self.density * min(g.shape)))
            if name not in self.own:
                self.own[name] = Subspace(self.rule(*self.adam), self.rest, self.state, right)
            basis = draw
            if fresh and self.kind == "svd":
                basis = singular(g, right, rank, draw)
            elif fresh:
                assert draw.shape == (g.shape[1 if right else 0], rank)
                np.testing.assert_allclose(draw.T @ draw, np.eye(rank), atol=1e-6)
            return self.split_scale * self.own[name](g, basis if fresh else None)
        if name not in self.own:
            self.own[name] = Subset(self.rule(*self.adam), self.rest, self.state)
        if fresh:
            self.check(draw, *g.shape)
        return self.split_scale * self.own[name](g.ravel(), draw if fresh else None).reshape(g.shape)

    def check(self, chosen, m, n):
        """The coordinates are as many, and lie, as the projection says."""
        grid, rho = np.arange(m * n).reshape(m, n), self.density
        if self.kind == "randk":
            assert chosen.shape == (int(rho * m * n),) and len(set(chosen)) == chosen.size
            assert not chosen.size or (chosen.min() >= 0 and chosen.max() < m * n)
            return
        wide = {"columns": True, "rows": False, "permutation": n <= m}[self.kind]
        side = n if wide else m
        count = int(np.rint(rho * side)) if self.kind == "permutation" else int(rho * side)
        places = chosen[0] if wide else chosen[:, 0] // n
        assert len(set(places)) == places.size == count
        np.testing.assert_array_equal(chosen, grid[:, places] if wide else grid[places])

    def directions(self, gradients, drawn):
        if self.kind != "block":
            return super().directions(gradients, drawn)
        families = collections.defaultdict(list)
        for path in sorted(self.groups, key=natural):
            if self.groups[path] == "split":
                families[tensors(path, gradients[path]).shape[1:]] += [
                    (path, x) for x in tensors(path, gradients[path])
                ]
        out = collections.defaultdict(list)
        for shape, parts in families.items():
            size, slots = int(np.prod(shape)), int(np.rint(self.density * len(parts)))
            fresh = None
            if self.t % self.every == 0:
                if shape in drawn:
                    numbers = list(drawn[shape])
                else:
                    queue, start = listed(self.order, len(parts)), self.t // self.every * slots
                    numbers = [queue[i % len(parts)] for i in range(start, start + slots)]
                assert len(set(numbers)) == len(numbers) == slots
                fresh = np.ravel([np.arange(k * size, (k + 1) * size) for k in numbers]).astype(int)
            if shape not in self.own:
                self.own[shape] = Subset(self.rule(*self.adam), self.rest, self.state)
            flat = self.own[shape](np.concatenate([x.ravel() for _, x in parts]), fresh)
            for (path, _), x in zip(parts, flat.reshape(len(parts), *shape), strict=True):
                out[path].append(self.split_scale * x)
        return {path: np.stack(x).reshape(gradients[path].shape) for path, x in out.items()}


class Galore(Twin):
    def __init__(self, params, lr, decay=0.0, *, rank, every, scale=0.25, side="short", **settings):
        super().__init__(params, lr, decay, **settings)
        self.rank, self.every, self.scale, self.side = rank, every, scale, side

    def matrix(self, name, g, draw):
        right = columns_projected(self.side, *g.shape)
        adam, q = self.own.get(name, (Adam(*self.adam), None))
        if self.t % self.every == 0:
            q = singular(g, right, self.rank, draw)
        self.own[name] = adam, q
        small = g @ q if right else q.T @ g
        step = adam(small)
        return self.finish(name, g, small, step, (lambda x: x @ q.T) if right else (lambda x: q @ x), right)

    def finish(self, name, g, small, step, up, right):
        return self.scale * up(step)


def limit(norms, name, x):
    """Norms grow by 1 % at most, from the second step on."""
    size = np.linalg.norm(x)
    if name in norms:
        x = x / (max(size / (norms[name] + 1e-8), 1.01) / 1.01)
    norms[name] = np.linalg.norm(x)
    return x


class Fira(Galore):
    """GaLore plus the orthogonal complement, scaled line by line."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.norms = {}

    def finish(self, name, g, small, step, up, right):
        rest = g - up(small)
        for j in range(g.shape[0 if right else 1]):
            line = (j, slice(None)) if right else (slice(None), j)
            rest[line] *= np.linalg.norm(step[line]) / (np.linalg.norm(small[line]) + 1e-8)
        return self.scale * up(step) + limit(self.norms, name, rest)


class Apollo(Twin):
    """Drawn: P^T, whenever it is new."""

    def __init__(self, params, lr, decay=0.0, *, rank, every, scale=1.0, kind="channel", side="short", **settings):
        super().__init__(params, lr, decay, **settings)
        self.rank, self.every, self.scale, self.kind, self.side = rank, every, scale, kind, side
        self.norms = {}

    def matrix(self, name, g, draw):
        right = columns_projected(self.side, *g.shape)
        adam, p = self.own.get(name, (Adam(*self.adam), None))
        if self.t % self.every == 0:
            p = draw.T
            assert p.shape == (self.rank, g.shape[1 if right else 0])
        self.own[name] = adam, p
        small = g @ p.T if right else p @ g
        step = adam(small)
        out = g.copy()
        if self.kind == "tensor":
            out *= np.linalg.norm(step) / (np.linalg.norm(small) + 1e-8)
        else:
            for j in range(g.shape[0 if right else 1]):
                line = (j, slice(None)) if right else (slice(None), j)
                out[line] *= np.linalg.norm(step[line]) / (np.linalg.norm(small[line]) + 1e-8)
        return np.sqrt(self.scale) * limit(self.norms, name, out)


class LDAdam(Twin):
    """Drawn: the first basis."""

    def __init__(self, params, lr, decay=0.0, *, rank, rho, error_feedback, **settings):
        super().__init__(params, lr, decay, **settings)
        self.rank, self.rho, self.error_feedback = rank, rho, error_feedback

    def matrix(self, name, g, draw):
        b1, b2, eps = self.adam
        tall = g.shape[0] >= g.shape[1]
        g, t = g.T if tall else g, self.t + 1
        if t == 1:
            zero = np.zeros((self.rank, g.shape[1]))
            self.own[name] = np.float64(draw), zero, zero, np.zeros_like(g)
        old, m, v, error = self.own[name]
        assert old.shape == (g.shape[0], self.rank)
        g = g + error
        m_hat, v_hat = (m / (1 - b1 ** (t - 1)), v / (1 - b2 ** (t - 1))) if t > 1 else (m, v)
        b = self.rho * old @ m_hat + (1 - self.rho) * g
        new = np.linalg.qr(b @ b.T @ old)[0]
        c = new.T @ old
        moved = c @ m
        spread = np.einsum("ij,ij,jk->ik", c, c, v_hat - m_hat**2)  # variances of independent entries add by squares
        v = np.abs((1 - b2 ** (t - 1)) * (spread + (c @ m_hat) ** 2))
        low = new.T @ g
        if self.error_feedback:
            error = g - new @ low + b1 / (1 - b1) * (old @ m - new @ moved)
        m, v = b1 * moved + (1 - b1) * low, b2 * v + (1 - b2) * low**2
        self.own[name] = new, m, v, error
        out = new @ (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps))
        return out.T if tall else out


class BAdam(Twin):
    """Drawn: the numbers of the active layers under "active", where the order is random."""

    def __init__(self, params, lr, decay=0.0, *, active, every, order, **settings):
        super().__init__(params, lr, decay, **settings)
        self.active, self.every, self.order, self.now = active, every, order, None
        names = sorted({path.split("/")[0] for path in params if path.startswith("layer_")}, key=natural)
        self.number = {name: i for i, name in enumerate(names)}
        self.groups = {path: group if group == "frozen" else self.place(path) for path, group in self.groups.items()}

    def place(self, path):
        return "block" if path.startswith("layer") else "full"

    def directions(self, gradients, drawn):
        out = {}
        paths = [path for path, group in self.groups.items() if group == "block"]
        count = next((len(self.params[path]) for path in paths if stacked(path)), len(self.number))
        if self.t % self.every == 0:
            start = self.t // self.every * self.active
            queue = listed(self.order, count) if "active" not in drawn else None
            numbers = drawn["active"] if queue is None else [queue[(start + i) % count] for i in range(self.active)]
            self.now = [int(i) for i in numbers]
            self.own = {}  # the moments of the last blocks are dropped
        for path in paths:
            w = self.params[path] if stacked(path) else self.params[path][None]
            layers = range(count) if stacked(path) else [self.number[path.split("/")[0]]]
            out[path], alive = np.zeros_like(w), np.zeros([len(w)] + [1] * (w.ndim - 1))
            for place, (g, layer) in enumerate(zip(np.reshape(gradients[path], w.shape), layers, strict=True)):
                if layer in self.now:
                    alive[place] = 1
                    out[path][place] = self.own.setdefault((path, layer), Adam(*self.adam))(g)
            out[path] = out[path].reshape(gradients[path].shape)
            self.decays[path] = alive if stacked(path) else alive[0]
        return out


class AdamMini(Twin):
    """Blocks by a number for every entry of a leaf."""

    def __init__(self, params, lr, decay=0.0, **settings):
        super().__init__(params, lr, decay, **settings)
        for path in params:
            if path.endswith("kernel"):
                self.groups[path] = "out"
            else:
                self.groups[path] = "in" if "embed" in path else "element" if path.endswith("bias") else "tensor"
        self.groups |= dict(settings.get("groups", ()))
        self.blocks = {path: self.numbered(path, self.groups[path], w) for path, w in params.items()}

    def numbered(self, path, how, w):
        one = tensors(path, w)[0]
        place = np.indices(one.shape)
        if how.startswith("heads"):
            number = place[1] // (one.shape[1] // int(how.split(":")[1]))
        elif how in ("out", "in"):
            number = place[1 if how == "out" else 0]
        else:
            number = np.arange(one.size).reshape(one.shape) if how == "element" else np.zeros(one.shape, int)
        layers = w.size // one.size
        each = number.max() + 1
        return np.concatenate([number + each * i for i in range(layers)]).reshape(w.shape)

    def directions(self, gradients, drawn):
        b1, b2, eps = self.adam
        out, t = {}, self.t + 1
        for path, g in gradients.items():
            m, v = self.own.get(path, (0.0, 0.0))
            number = self.blocks[path].ravel()
            mean = np.bincount(number, g.ravel() ** 2) / np.bincount(number)
            self.own[path] = m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * mean
            below = np.sqrt(v / (1 - b2**t))[number].reshape(g.shape)
            out[path] = m / (1 - b1**t) / (below + eps)
        return out


def book(signed):
    """The dynamic map: seven decades, each cut into twice as many equal parts as the one below, of which the middles."""
    values = [0.0, 1.0]
    for decade in range(7):
        top = 10.0 ** (decade - 6)
        low, parts = top / 10, 2**decade if signed else 2 ** (decade + 1)
        for i in range(parts):
            middle = low + (top - low) * (i + 0.5) / parts
            values += [middle, -middle] if signed else [middle]
    return np.array(sorted(values))


def quantize(x, table, like):
    """(codes, scales, how many codes are of `like`): the nearest of all; where `like` is as near to rounding, that one."""
    codes, scales, settled = np.zeros(x.size, int), [], 0
    for start in range(0, x.size, 256):
        part, other = x.ravel()[start : start + 256], like.ravel()[start : start + 256]
        scales.append(np.abs(part).max())
        unit = part / (scales[-1] or 1)
        distance = np.abs(unit[:, None] - table)
        best, row = distance.argmin(axis=1), np.arange(part.size)
        slack = 1e-6 * np.abs(unit) + 1e-7 * (table[0] < 0)  # first moments are small differences of f32 numbers
        near = distance[row, other] <= distance[row, best] + slack
        codes[start : start + 256] = np.where(near, other, best)
        settled += np.sum(near & (other != best))
    return codes.reshape(x.shape), np.array(scales), settled


def dequantize(codes, scales, table):
    return (table[codes.ravel()] * np.repeat(scales, 256)[: codes.size]).reshape(codes.shape)


class Adam8bit(Twin):
    """Drawn: the codes of both moments after the step, which decide where two codes are as near."""

    books = book(True), book(False)

    def __init__(self, params, lr, decay=0.0, **settings):
        super().__init__(params, lr, decay, **settings)
        coded = lambda path, w: w.size >= 4096 and "embed" not in path
        self.groups = {path: "coded" if coded(path, w) else "full" for path, w in params.items()}
        self.groups |= dict(settings.get("groups", ()))
        self.settled = 0  # codes that were not the nearest by this arithmetic

    def directions(self, gradients, drawn):
        b1, b2, eps = self.adam
        out, t = {}, self.t + 1
        for path in [path for path, group in self.groups.items() if group == "coded"]:
            g = gradients[path]
            kept = self.own.get(path)
            m, v = [dequantize(*x, table) for x, table in zip(kept, self.books, strict=True)] if kept else (0.0, 0.0)
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            out[path] = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
            self.own[path] = []
            for x, table, like in zip((m, v), self.books, drawn[path], strict=True):
                codes, scales, settled = quantize(x, table, np.asarray(like, int))
                self.own[path].append((codes, scales))
                self.settled += settled
        return out
