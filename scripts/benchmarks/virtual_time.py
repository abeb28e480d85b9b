"""Processes on machines that share a virtual clock.

A process runs real, blocking code in a thread of its own, but only one runs at a time: until it
waits, which hands over to whoever's time comes next. So waiting costs nothing, and the order of
everything follows from the times alone.
"""

import heapq
import itertools
import queue
import threading
from collections.abc import Callable


class Killed(BaseException):
    """The machine of this process is dead. Whatever it still does must not reach another one."""


class Machine:
    """Processes that die together. `died` is called once, when they do."""

    def __init__(self, died: Callable[[], None] = lambda: None) -> None:
        self.died = died
        self.spared = False  # from dying at a request
        self.alive = True
        self.frozen_until = 0.0
        self.processes: list[Process] = []


class Process:
    """A thread that runs in its turns. Machines that are frozen or dead give it none."""

    def __init__(self, machine: Machine, work: Callable[[], None]) -> None:
        self.machine = machine
        self.work: Callable[[], None] | None = work  # None once it has begun
        self.turn = closed()
        self.thread = 0
        self.event = -1  # number of the event that wakes it
        self.ended = False
        self.waiting: list[Process] = []  # for its end
        self.owes = 0.0  # seconds that its helper threads waited


class Clock:
    """The time in seconds since the start, and what will happen."""

    def __init__(self) -> None:
        self.now = 0.0
        self.running: Process | None = None
        self.failure: BaseException | None = None
        self._events: list[tuple[float, int, Process | Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._main = closed()
        self._idle: list[queue.SimpleQueue[Process | None]] = []  # threads without a process
        self._lock = threading.Lock()

    def call(self, after: float, action: Callable[[], None]) -> None:
        """Do something that does not wait, `after` seconds from now."""
        heapq.heappush(self._events, (self.now + after, next(self._numbers), action))

    def start(self, work: Callable[[], None], machine: Machine, after: float = 0.0) -> Process:
        """Start a process. An error that it raises ends `run`, unless it is Killed."""
        process = Process(machine, work)
        machine.processes = [*(one for one in machine.processes if not one.ended), process]
        self._wake(process, after)
        return process

    def sleep(self, seconds: float) -> None:
        """Wait, in a process. Raises Killed."""
        process = self.current
        if threading.get_ident() != process.thread:
            with self._lock:  # a thread that helps the process, which waits for it
                process.owes += seconds
            return
        self._check(process)
        seconds, process.owes = seconds + process.owes, 0.0
        self._wake(process, seconds)
        self._hand_over(process)

    def join(self, other: Process) -> None:
        """Wait for the end of another process. Raises Killed."""
        process = self.current
        self._check(process)
        while not other.ended:
            other.waiting.append(process)
            self._hand_over(process)

    def kill(self, machine: Machine) -> None:
        """Nothing that runs on this machine goes on."""
        if machine.alive:
            machine.alive = False
            for process in machine.processes:
                if not process.ended and process is not self.running:
                    self._wake(process)
            machine.died()

    def run(self) -> None:
        """Until nothing is left to happen. Raises what a process raised."""
        following = self._next()
        if following is not None:
            self._resume(following)
            self._main.acquire()
        while self._idle:
            self._idle.pop().put(None)
        if self.failure is not None:
            raise self.failure

    def check(self) -> None:
        """Raise Killed where the machine of the running process is dead."""
        self._check(self.current)

    @property
    def current(self) -> Process:
        assert self.running is not None, "no process runs"
        return self.running

    def _check(self, process: Process) -> None:
        if not process.machine.alive:
            raise Killed

    def _wake(self, process: Process, after: float = 0.0) -> None:
        """Its turn comes `after` seconds from now, and not when it was to come."""
        process.event = next(self._numbers)
        heapq.heappush(self._events, (self.now + after, process.event, process))

    def _next(self) -> Process | None:
        """Make it the turn of whoever is next; None at the end."""
        self.running = None
        while self._events and self.failure is None:
            time, number, what = heapq.heappop(self._events)
            if not isinstance(what, Process):
                self.now = time
                what()
            elif number == what.event and not what.ended:
                if what.machine.alive and what.machine.frozen_until > time:
                    heapq.heappush(self._events, (what.machine.frozen_until, number, what))
                    continue
                self.now, self.running = time, what
                return what
        return None

    def _resume(self, process: Process) -> None:
        """Let it run, in a thread that has nothing to do if it has not begun."""
        if process.work is None:
            process.turn.release()
        elif self._idle:
            self._idle.pop().put(process)
        else:
            threading.Thread(target=self._serve, args=[process], daemon=True).start()

    def _serve(self, process: Process) -> None:
        """Run processes in this thread, one after the other. A new thread takes time to start."""
        waiting: queue.SimpleQueue[Process | None] = queue.SimpleQueue()
        following: Process | None = process
        while following is not None:
            process = following
            work, process.work = process.work, None
            process.thread = threading.get_ident()
            try:
                self._check(process)
                assert work is not None
                work()
            except Killed:
                pass
            except BaseException as error:
                self.failure = error
            process.ended = True
            for one in process.waiting:
                self._wake(one)
            self._idle.append(waiting)
            self._hand_over()
            following = waiting.get()

    def _hand_over(self, process: Process | None = None) -> None:
        """Let the next one run; return in the next turn of `process`, or at once without one."""
        try:
            following = self._next()
        except BaseException as error:  # of an action
            self.failure, following = error, None
        if following is not process or following is None:
            if following is None:
                self._main.release()
            else:
                self._resume(following)
            if process is not None:
                process.turn.acquire()
        if process is not None:
            self._check(process)


def closed() -> threading.Lock:
    """A lock that someone else opens."""
    lock = threading.Lock()
    lock.acquire()
    return lock


class Seconds:
    """The clock in place of the module `time`, for the code that is simulated."""

    EPOCH = 1_700_000_000.0

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def time(self) -> float:
        return self.EPOCH + self.clock.now

    def monotonic(self) -> float:
        return self.clock.now

    def sleep(self, seconds: float) -> None:
        self.clock.sleep(seconds)
