"""The threads of the CPU kernels, with kernels written in Python."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from pyattn.kernels.cpu import threads

from pyattn.checks import OptionError
from pyattn.threads import get_num_threads, set_num_threads

LONG = 60
"""Seconds; nothing takes as long unless it hangs."""

_one_at_a_time = threading.Lock()


def units_from(queue: int, units: int) -> Iterator[int]:
    """Take units as a kernel does."""
    next_unit = ctypes.c_int64.from_address(queue)
    while True:
        with _one_at_a_time:
            unit = next_unit.value
            next_unit.value += 1
        if unit >= units:
            return
        yield unit


@pytest.fixture(autouse=True)
def _any_threads():
    before = get_num_threads()
    yield
    set_num_threads(before)


@pytest.mark.parametrize("units", [0, 1, 2, 100])
@pytest.mark.parametrize("helpers", [-1, 0, 1, 5])
def test_every_unit_is_taken_once(units, helpers):
    set_num_threads(3)
    taken = []

    def kernel(place: int, queue: int, units: int, scratch: int) -> None:
        assert place == 17
        for unit in units_from(queue, units):
            taken.append(unit)
            time.sleep(1e-4)

    threads.run(kernel, 17, units, 100, helpers)
    assert sorted(taken) == list(range(units))


def participants(units: int, helpers: int) -> set[int]:
    """Return which threads take part in a call."""
    seen = set()

    def kernel(place: int, queue: int, units: int, scratch: int) -> None:
        for _ in units_from(queue, units):
            seen.add(threading.get_ident())
            time.sleep(0.01)

    threads.run(kernel, 0, units, 0, helpers)
    return seen


def test_the_caller_and_as_many_helpers_as_are_worthwhile():
    set_num_threads(3)
    caller = threading.get_ident()
    for units, helpers, most in [(1, 5, 1), (40, 0, 1), (40, 1, 2), (2, 5, 2), (40, 5, 3)]:
        seen = participants(units, helpers)
        assert caller in seen
        assert len(seen) <= most, (units, helpers)
    set_num_threads(1)
    assert participants(40, 5) == {caller}


def test_helpers_do_take_part():
    set_num_threads(3)
    all_three = threading.Barrier(3)
    threads.run(lambda place, queue, units, scratch: all_three.wait(LONG) and None, 0, 3, 0, 2)
    assert not all_three.broken


def test_a_call_from_inside_a_call_stays_in_its_thread():
    set_num_threads(3)
    outer_two, strangers, done = threading.Barrier(2), [], []

    def outer(place: int, queue: int, units: int, scratch: int) -> None:
        outer_two.wait(LONG)
        outside, outer_queue = threading.get_ident(), queue

        def inner(place: int, queue: int, units: int, scratch: int) -> None:
            if threading.get_ident() != outside or queue == outer_queue:
                strangers.append(outside)
            done.extend(units_from(queue, units))
            time.sleep(0.01)

        threads.run(inner, 0, 4, 0, 2)

    threads.run(outer, 0, 2, 0, 1)
    assert sorted(done) == sorted([0, 1, 2, 3] * 2)
    assert not strangers
    assert len(participants(60, 2)) > 1         # and later calls are as usual


def test_python_threads_at_once_have_their_own_units():
    set_num_threads(2)
    taken: dict[int, list[int]] = {place: [] for place in range(4)}

    def kernel(place: int, queue: int, units: int, scratch: int) -> None:
        own = ctypes.c_int64.from_address(scratch)
        for unit in units_from(queue, units):
            own.value = place
            time.sleep(1e-5)
            assert own.value == place, "scratch memory of two calls"
            taken[place].append(unit)

    def caller(place: int) -> None:
        for _ in range(20):
            threads.run(kernel, place, 30, 8, 1)

    callers = [threading.Thread(target=caller, args=(place,)) for place in taken]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    for units in taken.values():
        assert sorted(units) == sorted(20 * [*range(30)])


@pytest.mark.parametrize("bad", ["caller", "helper", "alone"])
def test_an_exception_stops_the_call_and_is_raised(bad):
    set_num_threads(2)
    caller, both, taken = threading.get_ident(), threading.Barrier(2), []

    def kernel(place: int, queue: int, units: int, scratch: int) -> None:
        if bad != "alone":
            both.wait(LONG)
        if (threading.get_ident() == caller) == (bad != "helper"):
            raise ZeroDivisionError(bad)
        time.sleep(0.05)
        for unit in units_from(queue, units):
            taken.append(unit)
            time.sleep(1e-3)

    with pytest.raises(ZeroDivisionError, match=bad):
        threads.run(kernel, 0, 1000, 0, 0 if bad == "alone" else 1)
    assert len(taken) < 1000
    time.sleep(0.01)
    stopped_at = len(taken)
    time.sleep(0.02)
    assert len(taken) == stopped_at
    assert len(participants(60, 1)) == 2


@pytest.fixture
def interrupts():
    """Jobs in a shell's background ignore them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no such signals on this system")
@pytest.mark.usefixtures("interrupts")
def test_an_interrupt_waits_for_the_helpers():
    """They write to memory that is the caller's."""
    set_num_threads(2)
    caller, both, finished = threading.get_ident(), threading.Barrier(2), []

    def kernel(place: int, queue: int, units: int, scratch: int) -> None:
        both.wait(LONG)
        if threading.get_ident() != caller:
            time.sleep(0.1)
            signal.pthread_kill(caller, signal.SIGINT)
            time.sleep(0.2)
            finished.append(True)

    with pytest.raises(KeyboardInterrupt):
        threads.run(kernel, 0, 2, 0, 1)
    assert finished
    assert len(participants(60, 1)) == 2


def test_scratch_memory():
    set_num_threads(2)
    seen: list[tuple[int, int]] = []

    def kernel(place: int, queue: int, units: int, scratch: int) -> None:
        seen.append((queue, scratch))
        ctypes.memset(scratch, 1, place)

    for nbytes in (100, 100, 50, 5000, 5000, threads.KEPT_BYTES + 1, 100, 100):
        threads.run(kernel, nbytes, 1, nbytes, 0)
    assert all(scratch % 64 == 0 for _, scratch in seen)
    assert all(abs(queue - scratch) >= 64 for queue, scratch in seen)
    first, again, less, more, more_again, _, after, after_again = seen
    assert first == again == less
    assert more == more_again
    assert after == after_again
    assert sum(memory.nbytes for memory in threads._local.spare) <= threads.KEPT_BYTES

    both = threading.Barrier(2)

    def together(place: int, queue: int, units: int, scratch: int) -> None:
        seen.append((queue, scratch))
        both.wait(LONG)

    seen.clear()
    threads.run(together, 0, 2, 1000, 1)
    (queue, one), (same_queue, other) = seen
    assert queue == same_queue
    assert abs(one - other) >= 1000


def test_calls_that_need_no_help_leave_nothing_behind():
    """A helper that is busy elsewhere must not be handed thousands of calls that are over."""
    set_num_threads(max(2, len(threads._helpers) + 1))
    all_are_there, go_on = threading.Barrier(get_num_threads() + 1), threading.Event()

    def busy(place: int, queue: int, units: int, scratch: int) -> None:
        all_are_there.wait(LONG)
        go_on.wait(LONG)

    caller = threading.Thread(target=threads.run, args=(busy, 0, 1000, 0, 1000))
    caller.start()
    all_are_there.wait(LONG)
    for _ in range(3 * threads.MANY_INVITATIONS):
        threads.run(lambda place, queue, units, scratch: None, 0, 2, 0, 1)
    assert threads._invitations.qsize() <= threads.MANY_INVITATIONS
    go_on.set()
    caller.join()


KERNEL = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)


def by_address(function):
    """Make a kernel that a helper who is awake calls by its address, as it calls compiled ones."""
    kernel = KERNEL(function)
    kernel.address = ctypes.cast(kernel, ctypes.c_void_p).value
    return kernel


@pytest.fixture
def awake(monkeypatch):
    """Helpers who stay awake; make sure that there is one, and count the invitations from then."""
    monkeypatch.setattr(threads, "PATIENCE", 50_000_000)
    monkeypatch.setattr(threads, "_boxes", [])
    monkeypatch.setattr(threads, "_helpers", [])
    monkeypatch.setattr(threads, "_invitations", type(threads._invitations)())
    set_num_threads(2)
    both, invitations = threading.Barrier(2), []
    threads.run(lambda place, queue, units, scratch: both.wait(LONG) and None, 0, 2, 100, 1)
    until = time.monotonic() + LONG
    while threads._boxes[0].record["state"] != 1 and time.monotonic() < until:
        time.sleep(1e-3)

    class Counted(threads._Invitation):
        def __init__(self, *arguments):
            invitations.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr(threads, "_Invitation", Counted)
    return invitations


def test_a_helper_who_is_awake_needs_no_invitation(awake):
    helper, both = threads._helpers[0].ident, threading.Barrier(2)
    seen = []

    def kernel(place: int, queue: int, units: int, scratch: int) -> None:
        both.wait(LONG)
        seen.append((threading.get_ident(), place, units, scratch))

    for place in range(3):
        threads.run(by_address(kernel), place, 2, 100, 1)
    assert awake == []
    assert sorted(x[:3] for x in seen) == sorted(
        (thread, place, 2) for thread in (threading.get_ident(), helper) for place in range(3))
    assert len({scratch for *_, scratch in seen}) == 2


def test_the_end_of_a_posted_call_is_waited_for(awake):
    caller, both, finished = threading.get_ident(), threading.Barrier(2), []

    def kernel(place: int, queue: int, units: int, scratch: int) -> None:
        both.wait(LONG)
        if threading.get_ident() != caller:
            time.sleep(0.3)
            finished.append(True)

    threads.run(by_address(kernel), 0, 2, 100, 1)
    assert finished
    assert awake == []


def test_a_helper_with_too_little_memory_is_invited(awake):
    both = threading.Barrier(2)
    kernel = by_address(lambda place, queue, units, scratch: both.wait(LONG) and None)
    threads.run(kernel, 0, 2, 10**6, 1)
    assert len(awake) == 1


def test_callers_of_one_helper_at_once(awake):
    taken: dict[int, list[int]] = {1: [], 2: []}

    def kernel(place: int, queue: int, units: int, scratch: int) -> None:
        for unit in units_from(queue, units):
            taken[place].append(unit)
            time.sleep(1e-5)

    def caller(place: int) -> None:
        for _ in range(50):
            threads.run(by_address(kernel), place, 10, 100, 1)

    callers = [threading.Thread(target=caller, args=(place,)) for place in taken]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    for units in taken.values():
        assert sorted(units) == sorted(50 * [*range(10)])


SHARE = """
import ctypes, threading, time
from pyattn.kernels.cpu import threads

def share(wait=10):
    both = threading.Barrier(2)
    threads.run(lambda place, queue, units, scratch: both.wait(wait) and None, 0, 2, 0, 1)
    return not both.broken

threads.set_count(2)
assert share()
"""

FORK = SHARE + """
# the helper is still awake here
import os, sys, warnings

warnings.simplefilter("ignore", DeprecationWarning)
child = os.fork()
together = share()
if child == 0:
    os._exit(0 if together else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or not together)
"""

EXIT = {
    "at once": "",
    "while another thread works": """
def work():
    time.sleep(0.2)
    assert share()
threading.Thread(target=work).start()
""",
    "in a daemon": """
def work():
    while True:
        threads.run(lambda place, queue, units, scratch: time.sleep(1e-4), 0, 2, 0, 1)
threading.Thread(target=work, daemon=True).start()
time.sleep(0.1)
""",
}


def in_a_process(code: str) -> None:
    done = subprocess.run([sys.executable, "-X", "dev", "-W", "error", "-c", code], check=False,
                          timeout=LONG, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.returncode == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_after_a_fork():
    in_a_process(FORK)


@pytest.mark.parametrize("moment", EXIT)
def test_the_interpreter_ends_quietly(moment):
    in_a_process(SHARE + EXIT[moment])


def test_count_setting():
    with pytest.raises(OptionError, match="number of threads must be at least 1; got 0"):
        set_num_threads(0)
    with pytest.raises(OptionError, match="number of threads must be an integer"):
        set_num_threads(1.5)
    set_num_threads(np.int64(3))
    assert get_num_threads() == 3


@pytest.mark.parametrize(("environment", "count"), [
    ({"PYATTN_NUM_THREADS": "3", "OMP_NUM_THREADS": "5"}, "3"), ({"OMP_NUM_THREADS": "5,2"}, "5"),
    ({"OMP_NUM_THREADS": "many", "NUMBA_NUM_THREADS": "4"}, "4"),
    ({"PYATTN_NUM_THREADS": "0"}, "OptionError")], ids=str)
def test_count_from_the_environment_and_no_numba_for_it(environment, count):
    clean = {name: value for name, value in os.environ.items() if "NUM_THREADS" not in name}
    code = ("import sys, pyattn.threads\n"
            "try: print(pyattn.threads.get_num_threads())\n"
            "except pyattn.OptionError as error: print(type(error).__name__)\n"
            "assert 'numba' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], env=clean | environment, check=True,
                          capture_output=True, text=True)
    assert done.stdout.strip() == count
