"""Who did what to which memory, in which order: a race detector for streams, by vector clocks.

Every stream and the host are actors with a clock each. An operation on a stream comes after all that the stream did,
after all that the host knew when it launched it, and after what the stream was told to wait for. Two uses of one
storage, one of them a write, must be ordered by that, or a card may do them in the other order. Nothing runs late here:
results are those of the order in which the host called. What is checked is that a card could do no other.
"""

from __future__ import annotations

from dataclasses import dataclass, field

HOST = -1  # the host's place among the actors; streams are counted from 0


class RaceError(AssertionError):
    """Memory is used in an order that nothing enforces."""


@dataclass
class Actor:
    """A stream, or the host.

    Attributes:
        number: Its place.
        time: Operations so far.
        seen: Actor -> its latest operation that comes before whatever this one does next.
    """

    number: int
    time: int = 0
    seen: dict[int, int] = field(default_factory=dict)

    def learn(self, seen: dict[int, int]) -> None:
        """Everything in ``seen`` comes before what follows here."""
        for actor, time in seen.items():
            self.seen[actor] = max(self.seen.get(actor, 0), time)

    def knows(self, actor: int, time: int) -> bool:
        """Whether that operation comes before what follows here."""
        return self.seen.get(actor, 0) >= time


@dataclass
class Use:
    """How one storage was used.

    Attributes:
        owner: The stream it was allocated for; ``HOST`` for host memory.
        written: Actor and time of the last write, None for memory that holds nothing yet.
        reads: Actor -> time of its last read since.
        lent: Streams that the allocator was told of (``record_stream``).
    """

    owner: int
    written: tuple[int, int] | None = None
    reads: dict[int, int] = field(default_factory=dict)
    lent: set[int] = field(default_factory=set)


class Timeline:
    """The actors and what they did.

    Attributes:
        waits: What made the host wait for the card, in words, in order.
    """

    def __init__(self) -> None:
        self.host = Actor(HOST)
        self.streams = [Actor(0)]
        self.current = self.streams[0]
        self.waits: list[str] = []

    def new_stream(self) -> Actor:
        """One more stream."""
        self.streams.append(Actor(len(self.streams)))
        return self.streams[-1]

    def step(self, actor: Actor) -> int:
        """Begin an operation; its time."""
        if actor is not self.host:
            actor.learn(self.host.seen)
        actor.time += 1
        actor.seen[actor.number] = actor.time
        return actor.time

    def read(self, actor: Actor, use: Use, what: str) -> None:
        """``actor`` reads in the operation that it has begun."""
        if use.written is None:
            raise RaceError(f"{what} reads memory that nothing was written to")
        self._after(actor, use.written, f"{what} reads before the write is done")
        use.reads[actor.number] = actor.time

    def write(self, actor: Actor, use: Use, what: str) -> None:
        """``actor`` writes in the operation that it has begun."""
        if use.written is not None:
            self._after(actor, use.written, f"{what} writes over a write that is not done")
        for reader in use.reads.items():
            self._after(actor, reader, f"{what} writes over memory that is still read")
        use.written, use.reads = (actor.number, actor.time), {}

    def freed(self, use: Use) -> str | None:
        """What is wrong with giving the memory back now: its owner may hand it out for its own next operation."""
        owner = self.streams[use.owner]
        owner.learn(self.host.seen)
        for actor, time in [*([use.written] if use.written else []), *use.reads.items()]:
            if actor not in use.lent and actor != HOST and not owner.knows(actor, time):
                return f"memory of stream {use.owner} is given back while stream {actor} may still use it"
        return None

    def wait_for(self, actor: Actor, what: str) -> None:
        """The host waits until a stream is through."""
        self.waits.append(what)
        self.host.learn(actor.seen)

    def _after(self, actor: Actor, event: tuple[int, int], what: str) -> None:
        if not actor.knows(*event):
            name = "the host" if event[0] == HOST else f"stream {event[0]}"
            raise RaceError(f"{what}: {self._name(actor)} does not wait for {name}")

    def _name(self, actor: Actor) -> str:
        return "the host" if actor is self.host else f"stream {actor.number}"
