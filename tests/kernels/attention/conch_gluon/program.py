# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""One program of a kernel: its partitions of warps, and what they wait for.

Each partition is a thread of Python's, but only one runs at a time. Wherever one waits,
arrives or starts something asynchronous, chance says which goes on or which copy lands,
with odds that are drawn for each program: the fast run far ahead of the slow, as far as
barriers let them.
"""

import contextlib
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch


class Stopped(Exception):
    """Another partition has failed."""


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes that are expected
    have come."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0
        self.missing = 0
        self.bytes = 0
        self.phases = 0  # that have ended

    def init(self, count: int) -> None:
        if self.count:
            raise RuntimeError(f"{self.name} is initialised twice")
        self.count = self.missing = count

    def arrive(self) -> None:
        if not self.count:
            raise RuntimeError(f"{self.name} is not initialised")
        self.missing -= 1
        if self.missing < 0:
            raise RuntimeError(f"{self.name}: more than {self.count} arrivals")
        self.end_phase()

    def expect(self, num_bytes: int) -> None:
        self.bytes += num_bytes
        self.arrive()

    def receive(self, num_bytes: int) -> None:
        self.bytes -= num_bytes
        if self.bytes < 0:
            raise RuntimeError(f"{self.name}: {-self.bytes} bytes too many")
        self.end_phase()

    def end_phase(self) -> None:
        if self.missing == 0 and self.bytes == 0:
            self.phases += 1
            self.missing = self.count

    def has_ended(self, parity: int) -> bool:
        """Whether the phase that ended last has this parity; at first it is odd."""
        return self.phases % 2 != parity


class Product:
    """A matrix product, which runs when it likes until it is awaited."""

    def __init__(self, multiply: Callable[[], None], result: Any) -> None:
        self.multiply = multiply
        self.result = result  # a tensor, pending until it is awaited
        self.is_done = False

    def run(self) -> None:
        if not self.is_done:
            self.multiply()
            self.is_done = True


class Partition:
    """Some warps that run one function."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.turn = threading.Semaphore(0)
        self.awaits: tuple[Barrier, int] | None = None
        self.is_done = False
        self.products: list[Product] = []  # that are not awaited yet, in their order
        self.unfenced: list[Any] = []  # views of shared memory, stored since a fence

    def can_run(self) -> bool:
        if self.is_done:
            return False
        return self.awaits is None or self.awaits[0].has_ended(self.awaits[1])

    def __str__(self) -> str:
        if self.awaits is None:
            return self.name
        barrier, parity = self.awaits
        return (
            f"{self.name} awaits {barrier.name}'s phase of parity {parity}: "
            f"{barrier.phases} have ended, {barrier.missing} of {barrier.count} "
            f"arrivals and {barrier.bytes} bytes are missing"
        )


class Program:
    """One program: everything that its partitions share but its memory."""

    def __init__(self, index: int, num_programs: int, seed: int) -> None:
        self.index = index
        self.num_programs = num_programs
        self.random = random.Random(f"{seed} {index}")
        self.copies: list[Callable[[], None]] = []  # that have not landed
        self.barriers: list[list[Barrier]] = []
        self.current = Partition("the kernel")
        self.partitions = [self.current]  # those that may run
        self.everybody = [self.current]
        self.error: BaseException | None = None
        self.is_inference = torch.is_inference_mode_enabled()  # each thread for itself
        self.odds: dict[object, float] = {"copies": self.draw_odds()}
        self.eager_products = self.random.random()  # part of them done at once

    def draw_odds(self) -> float:
        return 10 ** self.random.uniform(-2, 0)

    def specialize(self, parts: Sequence[tuple[Callable, tuple]]) -> None:
        """Runs functions, each in a partition of its own, until all have ended."""
        caller = self.current
        self.partitions = []
        threads = []
        for number, (function, arguments) in enumerate(parts):
            partition = Partition(f"{function.__name__} {number}")
            self.odds[partition] = self.draw_odds()
            self.partitions.append(partition)
            self.everybody.append(partition)
            target = (partition, function, arguments)
            threads.append(threading.Thread(target=self.run_partition, args=target))
        for thread in threads:
            thread.start()
        self.partitions[0].turn.release()
        for thread in threads:
            thread.join()
        self.current, self.partitions = caller, [caller]
        if self.error is not None:
            raise self.error
        if self.copies:
            raise RuntimeError(f"{len(self.copies)} copies land after the program")

    def run_partition(self, partition: Partition, function: Callable, arguments):
        partition.turn.acquire()
        self.current = partition
        try:
            with torch.inference_mode(self.is_inference):
                if self.error is None:
                    function(*arguments)
                    if partition.products:
                        raise RuntimeError(f"{partition}: nobody awaits a product")
                    partition.is_done = True
                    self.go_on()
        except Stopped:
            pass
        except BaseException as error:
            self.error = self.error or error
        partition.is_done = True
        if self.error is not None:
            for other in self.partitions:
                other.turn.release()

    def go_on(self) -> None:
        """Lets somebody go on: the partition that runs, another one, or a copy."""
        me = self.current
        while not all(p.is_done for p in self.partitions):
            runnable: list[object] = [p for p in self.partitions if p.can_run()]
            if self.copies:
                runnable.append("copies")
            if not runnable:
                waiting = [str(p) for p in self.partitions if not p.is_done]
                raise RuntimeError("nobody can go on: " + "; ".join(waiting))
            odds = [self.odds.get(actor, 1.0) for actor in runnable]
            (actor,) = self.random.choices(runnable, odds)
            if actor == "copies":
                self.copies.pop(self.random.randrange(len(self.copies)))()
                continue
            if actor is not me:
                assert isinstance(actor, Partition)
                actor.turn.release()
                if me.is_done:
                    return
                me.turn.acquire()
                if self.error is not None:
                    raise Stopped
                self.current = me
            return

    def wait(self, barrier: Barrier, parity: int) -> None:
        self.current.awaits = barrier, parity
        self.go_on()
        self.current.awaits = None

    def await_products(self, left: int, results: Sequence[Any]) -> None:
        """Finishes products of the partition that runs until so many are left.

        Threads may use these of their results, as the compiler knows them alone.
        """
        products = self.current.products
        while len(products) > left:
            product = products.pop(0)
            product.run()
            if any(product.result is result for result in results):
                product.result.pending = False

    def start_product(self, product: Product) -> None:
        products = self.current.products
        products.append(product)
        if self.random.random() < self.eager_products:
            for earlier in products:
                earlier.run()
        self.go_on()

    def start_copy(self, copy: Callable[[], None]) -> None:
        self.copies.append(copy)
        self.go_on()


PROGRAMS: list[Program] = []  # the one that runs, if one does


def program() -> Program:
    return PROGRAMS[-1]


@contextlib.contextmanager
def running(one: Program) -> Iterator[None]:
    PROGRAMS.append(one)
    try:
        yield
    finally:
        PROGRAMS.pop()
