"""Faults cost one sample each, within a time limit, and leave nothing running."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from rl.rewards.connection import Connection
from rl.rewards.pool import Pool, PoolError
from rl.tasks import countdown
from rl.tasks.types import Verdict

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
DEADLINE = 0.5


@pytest.fixture(autouse=True)
def verifiers_can_be_imported(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))


@pytest.fixture(autouse=True)
def nothing_is_left_running():
    yield
    assert wait_until(lambda: workers_of(os.getpid()) == []), workers_of(os.getpid())


def workers_of(pid):
    found = psutil.Process(pid).children(recursive=True)
    return [child for child in found if "rl.rewards.worker" in " ".join(child.cmdline())]


def wait_until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def pool(**options):
    return Pool("faulty:verify", **{"workers": 2, "deadline": DEADLINE, **options})


def good(i):
    return "y" * (i % 7 + 2), i


def with_faults(faults, total=40):
    """A batch of good items with the faults spread over it, and what each position should give."""
    items = [good(i) for i in range(total)]
    places = {3 + 9 * k: fault for k, fault in enumerate(faults)}
    for at, fault in places.items():
        items[at] = (fault, 0)
    return [c for c, _ in items], [a for _, a in items], places


FAULTS = {
    "nan": "unscorable",
    "infinite": "unscorable",
    "huge": "unscorable",
    "text": "unscorable",
    "none": "unscorable",
    "number": "unscorable",
    "status": "unscorable",
    "parts": "unscorable",
    "many": "unscorable",
    "big": "unscorable",
    "declines": "unscorable",
    "raises": "error",
    "rude": "error",
    "quit": "error",
    "interrupt": "error",
    "recursion": "error",
    "hog": "error",
    "exit": "error",
    "abort": "error",
    "segfault": "error",
    "sleep": "timeout",
    "busy": "timeout",
    "stop": "timeout",
}


@pytest.mark.parametrize(("fault", "status"), FAULTS.items())
def test_a_fault_costs_exactly_its_sample(fault, status):
    completions, answers, places = with_faults([fault, fault])
    # Only what waits meets a deadline: on a busy machine the others may take seconds.
    options = {} if status == "timeout" else {"deadline": 60.0, **({"memory": 1 << 29} if fault == "hog" else {})}
    start = time.monotonic()
    with pool(**options) as p:
        verdicts = p.score(completions, answers)
        for i, verdict in enumerate(verdicts):
            if i in places:
                assert (verdict.value, verdict.status) == (0.0, status)
            else:
                assert verdict == Verdict(float(len(completions[i])), "ok", {"answer": float(answers[i])})
        assert p.counts == {"ok": 38, status: 2}
        assert [(f.status, f.completion) for f in p.failures] == [(status, fault)] * 2
        # And the pool goes on.
        assert [v.value for v in p.score(["yy", "yyy"], [0, 0])] == [2.0, 3.0]
    assert time.monotonic() - start < 60


def test_all_faults_in_one_batch_within_a_time_limit():
    faults = [fault for fault in FAULTS if fault != "hog"]
    completions, answers, places = with_faults(faults, total=9 * len(faults) + 10)
    start = time.monotonic()
    with pool(deadline=3.0) as p:
        verdicts = p.score(completions, answers)
        assert p.replaced == sum(fault in ("exit", "abort", "segfault", "sleep", "busy", "stop") for fault in faults)
    for i, verdict in enumerate(verdicts):
        assert verdict.status == (FAULTS[places[i]] if i in places else "ok"), completions[i]
    assert time.monotonic() - start < 60


def test_failures_say_why():
    with pool() as p:
        p.score(["raises", "exit", "busy", "nan", "segfault"], [0] * 5)
        reasons = {failure.completion: failure.message for failure in p.failures}
    assert reasons["raises"].startswith("ValueError: bad bad") and len(reasons["raises"]) < 600
    assert reasons["exit"] == "its process ended (exit status 3)"
    assert reasons["busy"] == "the verifier took longer than 0.5 s"
    assert reasons["nan"] == "the value must be a finite number, not nan"
    assert reasons["segfault"] == "its process ended (killed by signal 11)"


def test_what_a_verifier_prints_stays_out_of_the_protocol(capfd):
    with pool(deadline=5.0) as p:
        verdicts = p.score(["noise", "yy", "noise", "yyy"], [0] * 4)
    assert [verdict.value for verdict in verdicts] == [0.5, 2.0, 0.5, 3.0]
    assert capfd.readouterr() == ("", "")


def test_any_text_arrives_as_it_was():
    texts = ["", "\n", "\x00", "\ud800", "𝄞" * 3, "[1]\n[2]", "x" * 1_000_000, "\u2028"]
    with pool(deadline=5.0) as p:
        assert [v.value for v in p.score(texts, [0] * len(texts))] == [float(len(text)) for text in texts]
        assert p.score([], []) == []


def test_order_is_kept_over_chunks_and_workers():
    with pool(workers=3) as p:
        items = [good(i) for i in range(5000)]
        verdicts = p.score([c for c, _ in items], [a for _, a in items])
    assert [v.parts["answer"] for v in verdicts] == [float(i) for i in range(5000)]


@pytest.mark.slow
def test_16384_short_items_travel_many_at_a_time_and_cost_little_more_than_checking_them(monkeypatch):
    answer = {"numbers": [25, 3, 7], "target": 46, "uses": "all", "tags": False, "partial": {}}
    lines, begin = [], Connection.begin
    monkeypatch.setattr(Connection, "begin", lambda self, at, line: (lines.append(line), begin(self, at, line))[1])

    def fastest(check):
        seconds = []
        for _ in range(3):
            start = time.monotonic()
            verdicts = check()
            seconds.append(time.monotonic() - start)
        assert len(verdicts) == 16384 and {verdict.value for verdict in verdicts} == {1.0}
        return min(seconds)

    with Pool("rl.tasks.countdown:verify") as p:
        pooled = fastest(lambda: p.score(["25+3*7"] * 16384, [answer] * 16384))
    assert len(lines) < 3 * 100
    here = fastest(lambda: [countdown.verify("25+3*7", answer) for _ in range(16384)])
    assert pooled < 10 * here  # 1.5 on two idle cores, 2.3 on one


def test_workers_have_neither_jax_nor_numpy():
    import jax  # noqa: F401  (here it is imported, there it is not)

    with pool() as p:
        assert p.score(["modules"], [0])[0].parts == {"jax": 0.0, "numpy": 0.0, "rl": 1.0}


@pytest.mark.parametrize(
    ("verify", "message"),
    [
        ("faulty_import:verify", "could not be imported: RuntimeError: the data this verifier needs is missing"),
        ("no_such_module:verify", "No module named 'no_such_module'"),
        ("faulty:no_such_function", "module faulty has no function 'no_such_function'"),
        ("faulty_jax:verify", "importing faulty_jax imports it: move the verifier"),
        ("faulty", "verify must be 'module:function'"),
        (":verify", "verify must be 'module:function'"),
    ],
)
def test_a_verifier_that_cannot_be_imported_is_an_error_at_the_start(verify, message):
    with pytest.raises(PoolError, match=message):
        Pool(verify)


def test_a_worker_that_dies_while_it_starts_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "dies.py").write_text("import os, sys\nprint('last words', file=sys.stderr, flush=True)\nos._exit(7)")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PoolError, match="3 workers in a row did not start.*exit status 7.*\n.*last words"):
        Pool("dies:verify", workers=1)


def test_a_worker_that_hangs_while_it_starts_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "hangs.py").write_text("import time\ntime.sleep(600)")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PoolError, match="3 workers in a row did not start"):
        Pool("hangs:verify", workers=1, start_timeout=0.3)


@pytest.mark.parametrize(
    "options", [{"workers": 0}, {"deadline": 0}, {"deadline": float("nan")}, {"start_timeout": float("inf")}]
)
def test_options_out_of_range(options):
    with pytest.raises(PoolError, match=f"{next(iter(options))} must be"):
        pool(**options)


def test_input_that_is_not_json_is_an_error_that_names_it():
    with pool() as p:
        with pytest.raises(PoolError, match="completion 1 is int"):
            p.score(["a", 1], [0, 0])
        with pytest.raises(PoolError, match="answer 0 is not"):
            p.score(["a"], [float("nan")])
        with pytest.raises(PoolError, match="answer 0 is not"):
            p.score(["a"], [{1, 2}])
        with pytest.raises(PoolError, match="1 completions and 2 answers"):
            p.score(["a"], [0, 0])
        assert p.score(["aa"], [0])[0].value == 2.0
    with pytest.raises(PoolError, match="closed"):
        p.score(["aa"], [0])


def test_a_worker_killed_from_outside_in_the_middle_of_a_batch(tmp_path):
    path = tmp_path / "pid"

    def kill():
        assert wait_until(lambda: path.exists() and path.read_text())
        os.kill(int(path.read_text()), signal.SIGKILL)

    thread = threading.Thread(target=kill)
    with pool(deadline=100.0) as p:
        thread.start()
        start = time.monotonic()
        completions = ["yy"] * 50 + [f"killed {path}"] + ["yy"] * 50
        verdicts = p.score(completions, [0] * 101)
        thread.join()
        assert time.monotonic() - start < 50  # at once, not at the deadline
        assert p.failures[0].message == "its process ended (killed by signal 9)"
    assert [v.status for v in verdicts] == ["ok"] * 50 + ["error"] + ["ok"] * 50


@pytest.mark.parametrize("victim", ["verifiers", "guardians"])
def test_workers_killed_between_batches_cost_nothing(victim):
    with pool() as p:
        verifiers = {int(v.value) for v in p.score(["pid"] * 50, [0] * 50)}
        found = [w for w in workers_of(os.getpid()) if (w.pid in verifiers) == (victim == "verifiers")]
        assert len(found) == 2
        for process in found:
            process.kill()
        assert wait_until(lambda: all(gone(pid) for pid in verifiers))
        assert [v.value for v in p.score(["yy"] * 50, [0] * 50)] == [2.0] * 50
        assert p.replaced == 2 and p.counts == {"ok": 100}


@pytest.mark.parametrize("fault", ["child", "child_hang"])
def test_processes_that_a_verifier_started_end_too(fault, tmp_path):
    path = tmp_path / "pid"
    with pool(deadline=2.0) as p:
        p.score([f"{fault} {path}", "yy"], [0, 0])
        child = int(path.read_text())
        if fault == "child":
            assert not gone(child)  # the item is over, the group lives
    assert wait_until(lambda: gone(child))


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt, though a shell that started the tests in the background had it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_leaves_no_stale_answers_and_no_processes():
    def interrupt():
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    with pytest.raises(KeyboardInterrupt), pool(deadline=30.0) as p:
        thread.start()
        try:
            p.score(["sleep", *(["yy"] * 2000), "busy"], [0] * 2002)
        except KeyboardInterrupt:
            thread.join()
            assert [v.value for v in p.score(["yyy"] * 100, [0] * 100)] == [3.0] * 100
            raise


@pytest.mark.usefixtures("interruptible")  # what is ignored here is ignored in the processes started
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_die_with_the_process_that_owns_the_pool(end):
    code = (
        "from rl.rewards.pool import Pool\n"
        "with Pool('faulty:verify', workers=2, deadline=600.0) as pool:\n"
        "    print('started', flush=True)\n"
        "    pool.score(['busy'] * 2, [0] * 2)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT)])}
    owner = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with owner:
        assert owner.stdout.readline() == b"started\n"
        time.sleep(0.3)  # so that both are inside C code that ignores signals
        workers = workers_of(owner.pid)
        assert len(workers) == 4
        owner.send_signal(end)
        try:
            owner.wait(10)
        finally:
            owner.kill()
        assert wait_until(lambda: all(gone(worker.pid) for worker in workers))
