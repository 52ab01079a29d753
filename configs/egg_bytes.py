"""A recurrent language model over bytes in pure integers, without gradients, and its f32 twin by backprop.

    python -m experiments.pretrain --config=configs/egg_bytes.py --workdir=runs/egg
    python -m experiments.pretrain --config=configs/egg_bytes.py:adamw --workdir=runs/egg_adamw

Data: the source of the running Python's standard library, split by file (`rl.data.bytes`), or two files of your own:
`--config.train_file`, `--config.held_out_file` (any bytes; `.npy` of u8; `.jsonl` with "text", as MiniPile has). Read as
`batch` streams side by side, `tokens` bytes of each a step; the recurrent state goes on from step to step. Model:
`rl.models.egg`. The result is the held-out bits per byte of the unperturbed model; `reference_bits` are those of a unigram
and a bigram model and of gzip.

After 300 steps of 1,600 bytes on one CPU core, seeds 0 and 1 (unigram 4.59, bigram 3.52, gzip 2.11 bits per byte):

    pairs_64      4.858 4.864    15 s      crossed       3.986 4.013   240 s
    pairs_512     4.368 4.408    44 s      adamw         2.844 2.850    17 s
    pairs         3.993 3.976   254 s      sgd           3.373 3.204    17 s
    pairs_16384   3.679        1064 s      long, 2,000 steps       3.656  1715 s
                                           long_16384, 750 steps   3.524  4410 s, on a slower core

Of other settings (`experiments/results/integers_settings.json`), 1,024 members and seed 0, as above 4.23: alpha 1 throughout
4.37, 0.5 4.28, a decay within 300 steps 4.34, 100 4.54, sigma_shift 3 4.23, 5 4.32, Rademacher noise 4.22, crossed 4.23,
momentum 2 4.41, 3 4.55, 64 streams (four times the bytes) 4.21. Learning rates: AdamW 1e-3 4.08, 3e-3 3.43, 1e-2 3.03,
3e-2 2.84, 0.1 2.97; SGD 0.1 5.38, 0.3 4.72, 3 3.77, 10 3.55, 30 3.37, 60 3.78, 120 5.59.

* `batch`, `tokens`, `eval_streams`: streams to train on, bytes a step, streams that the held-out text is cut into;
* `es`: `population` (antithetic, crossed) of `members`, in `blocks` if crossed; noise of 2^-`sigma_shift`; `alpha`: share of
  parameters that move where nothing can be learned, or above 1 a decay to 2^-alpha after `alpha_decay` steps
  (`eggroll.integer.threshold.schedule`); `noise` (gaussian, rademacher), `momentum` and `faithful`: see
  `eggroll.integer.strategy`; `chunk` members at a time (0: all);
* `optimizer`: of backprop alone.
"""

import ml_collections

from configs.base import mesh, optimizer, pick


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The recipe: pairs (default), as few or many as 64, 512 or 16,384 members, long, long_16384, crossed, momentum, faithful,
    or sgd or adamw by backprop."""
    return pick(
        variant,
        {
            "pairs": _integer,
            "pairs_64": lambda: _integer(members=64),
            "pairs_512": lambda: _integer(members=512),
            "pairs_16384": lambda: _integer(members=16384),
            "long": lambda: _lasting(2000, _integer()),
            "long_16384": lambda: _lasting(750, _integer(members=16384)),
            "crossed": lambda: _integer(population="crossed"),
            "momentum": lambda: _integer(momentum=3),
            "faithful": _faithful,
            "sgd": lambda: _lasting(5000, _backprop("sgd", 30.0)),
            "adamw": lambda: _lasting(5000, _backprop("adamw", 3e-2)),
        },
    )


def _integer(**changes: object) -> ml_collections.ConfigDict:
    config = _common("integer")
    defaults = {
        "population": "antithetic",
        "members": 4096,
        "blocks": 1,
        "sigma_shift": 4,
        "alpha": 4.0,
        "alpha_decay": 1000,
        "noise": "gaussian",
        "momentum": 0,
        "faithful": False,
        "chunk": 256,
    }
    config.es = ml_collections.ConfigDict(defaults | changes)
    config.mesh = mesh()
    return config


def _faithful() -> ml_collections.ConfigDict:
    config = _integer(faithful=True)
    config.model.faithful = True
    return config


def _backprop(name: str, learning_rate: float) -> ml_collections.ConfigDict:
    config = _common("backprop")
    config.optimizer = optimizer(name=name, learning_rate=learning_rate)
    return config


def _lasting(steps: int, config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    config.steps, config.eval_every, config.save_every = steps, 100, 500
    return config


def _common(method: str) -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "task": "streams",
            "method": method,
            "seed": 0,
            "steps": 300,
            "batch": 16,
            "tokens": 100,
            "train_bytes": 0,
            "train_file": "",
            "held_out_file": "",
            "eval_streams": 128,
            "model": {"layers": 2, "width": 64, "expansion": 4, "faithful": False},
            "save_every": 50,
            "eval_every": 25,
        }
    )
