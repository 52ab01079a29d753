"""Speed, as ratios inside one run: `python -m experiments.bench CASE [CASE...] [--repeats=15] [--out=results.jsonl]`.

Each measurement is one JSON object on one line of standard output; everything else goes to standard error. The things
compared are compiled, warmed up, and then timed in turn, round after round; a value is the ratio of the median seconds.

`evolution`:

* population_forward, `inference_over_forward`: five dense layers with bias and relu on N x rows rows, plain, against N
  perturbed members on so many rows each, noise drawn included.
* es_update, `update_over_forward`: the estimate from N scores (noise drawn again), against that forward.
* openes, `openes_over_eggroll`: forward and estimate with full-rank noise, against low-rank noise. Full-rank members are
  independent, or antithetic pairs (half the noise).
* control, `eggroll_over_evosax`: environment steps per second of three generations in a row, against evosax's OpenES on the
  same environment, policy and population.

`language`:

* score, `naive_over_blocked`: log-probabilities and entropies of given tokens, alone or with the gradient of their sum, from
  logits of every position at once, against the scorer, which makes them a block of positions at a time. With tokens per
  second and the bytes of temporary memory that each program is compiled to use.
* decode: tokens per second of the rollout engine, `engine_over_plain` against a jitted loop without an engine at equal lengths,
  `engine_over_static` against static batches on long-tailed lengths, `population_over_engine` with a member a slot.
* roofline, `engine_over_roofline`: the engine at full slots against reading weights and caches once a step at this device's
  bandwidth, measured in the same run, with a static batch beside it.

`gradient`:

* grpo_step, seconds of ours over those of a twin written by hand in plain JAX: `ours_over_plain`, the program one writes
  first, and `ours_over_tuned`, one tuned for a CPU (`twins.py` says how). A step is rollout, reward, log-probabilities of the
  reference, and update; each is also timed alone, on fixed samples. `full_over_ours_bytes`: temporary memory that scoring
  with a vocabulary of 32,768 is compiled to use, from logits of all tokens, over ours.
* adapter: seconds of the gradient of LoRA's factors attached to the weights of a transformer, as the learner has them, over
  those of factors merged into the weights first (`attached_over_merged`) and of a gradient of all parameters
  (`attached_over_full`); with the temporary memory that each is compiled to use.

`optimizers`:

* optimizer, `step_over_adamw`: seconds of an update of a transformer's parameters, applied, over those of `optax.adamw`, by
  every optimizer of `rl.optim` and a few of optax; in steps without a refresh. `refresh_over_adamw` is that of a step with one,
  where there are any: of singular vectors and random coordinates, which take longest, once, on a layer alone
  (`refresh_layers`) and not at the largest width, which has no Muon either. `state_over_adamw`: bytes of state;
  `memory_over_adamw`: of state and temporary memory, to which a program is compiled also for steps with a refresh (AdamW's own
  temporary memory is nothing: it is one loop).

`kernels`:

* kernels: every operation of `kernels/`, on inputs larger than caches. `roofline_over_kernel`: the time in which this device,
  by a large plain product and a copy measured in the same run, could do the operations and move the bytes of the definition,
  whichever takes longer, over the kernel's time (`roofline_over_reference` where there is no kernel for the device);
  `reference_over_kernel`: its plain-JAX twin; `plain_over_kernel`: a plain product of the same rows without a population.

`packing`:

* packing, `static_over_ours` and `homogeneous_over_ours`: seconds of a step of GPT-7B, simulated by the cost model of
  `rl.data.sequence_parallel`, with the best degree of sequence parallelism that holds the limit, and with the best degree of
  each micro-batch, over groups of different sizes; all three with the same cuts into micro-batches. With the seconds of one
  core that planning a batch takes, which are measured. Links of more than two nodes are extrapolated (`packing.py` says how).

`integer`:

* egg, a generation of the integer language model (pairs, 16 streams): `float32_over_int8`, seconds of the same model and
  members in f32 with `eggroll.strategy`, with tokens per second of all members; `pairs_over_crossed`; `update_share`: of the
  generation; `bytes_per_member_over_float32`: temporary memory that evaluating is compiled to use, and what members carry.

`checkpoint`:

* checkpoint, `saving_over_plain`: seconds of a step when its state, which the next one donates, is saved after every one, over
  those without saving: by the writer, by a blocking save (both with checksums and flushed to disk), and by Orbax's own
  asynchronous checkpointer (neither). `blocked_seconds`: of the call; `durable_seconds`: until the checkpoint is on disk, with
  nothing computed meanwhile; `copy_seconds`: of one copy of the state, which none can do without. `restore_over_orbax`:
  reading, checking and placing it, over Orbax's reading of the same arrays.

`scaling`:

* scaling, `ideal_over_device`: a D-th of the operations of one device alone over those of each of D devices, as compiled, with
  the bytes that devices send each other. Of a generation (five dense layers, 128 antithetic members): evaluation, and the
  update with sums rebuilt everywhere or reduced; and of a step of GRPO, the gradient. `device_over_alone`: bytes of one device
  while a gradient of GRPO runs, of 16 layers under `fsdp`, over those of one device alone. Simulated where there are not 8.
"""

from experiments.bench import checkpoint, evolution, gradient, integer, kernels, language, optimizers, packing, scaling

CASES = evolution.CASES | language.CASES | gradient.CASES | optimizers.CASES | kernels.CASES
CASES |= packing.CASES | checkpoint.CASES | scaling.CASES | integer.CASES
