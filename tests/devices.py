"""A device that is not there: its work and its copies come as late, or as early, as streams and events allow."""

from contextlib import contextmanager
from unittest.mock import patch

from fastsae import lanes


class Queue:
    """Work in order, each piece once the mark that it waits for has come; a mark is a queue and a number."""

    def __init__(self):
        self.given, self.n_done = [], 0

    def add(self, work, after=None):
        self.given.append((work, after))

    def mark(self):
        return self, len(self.given)

    def run(self, n=None):
        while self.n_done < (len(self.given) if n is None else n):
            work, after = self.given[self.n_done]
            if after is not None:
                after[0].run(after[1])
            self.n_done += 1
            work()


class Device:
    """Does nothing before somebody waits for it; `eager`: its own work, or the copies, at once where they may."""

    def __init__(self, eager):
        self.eager, self.work, self.lanes = eager, Queue(), []

    def do(self, work, after=None):
        self.work.add(work, after)
        if self.eager == "work":
            self.work.run()

    def lane(self, _):
        self.lanes.append(Lane(self))
        return self.lanes[-1]

    @contextmanager
    def gathers(self):
        """In this block what is gathered for the way out is the device's work."""
        original = lanes.move
        with patch.object(lanes, "move", lambda *a: self.do(lambda: original(*a))):
            yield


class Lane:
    def __init__(self, device):
        self.device, self.copies = device, Queue()

    def mark(self):
        return self.device.work.mark()

    def copy(self, pairs, after):
        pairs = list(pairs)
        self.copies.add(lambda: [out.copy_(source) for out, source in pairs], after)
        if self.device.eager == "copies":
            self.copies.run()
        return self.copies.mark()

    def hold(self, mark):
        self.device.do(lambda: None, mark)

    def wait(self, mark):
        if mark is not None:
            mark[0].run(mark[1])
