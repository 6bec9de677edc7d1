"""Who decodes next: one at a time, and nobody twice while another waits; knows no model and no screen."""

import itertools
import threading
from dataclasses import dataclass


@dataclass(eq=False)
class Ticket:
    """One run's place in the queue. `ahead` is how many are served before it, 0 when it is next or being served."""

    owner: str
    number: int


class Turnstile:
    """Serves the ticket whose owner was served longest ago, then the oldest: two people alternate whatever one queues."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._numbers = itertools.count(1)
        self._waiting: list[Ticket] = []
        self._serving: Ticket | None = None
        self._served: dict[str, int] = {}

    def join(self, owner: str) -> Ticket:
        with self._changed:
            ticket = Ticket(owner, next(self._numbers))
            self._waiting.append(ticket)
            self._changed.notify_all()
            return ticket

    def wait(self, ticket: Ticket, timeout_seconds: float) -> bool:
        """Wait for the ticket's turn; True once it is being served."""
        with self._changed:
            return self._changed.wait_for(lambda: self._take(ticket), timeout_seconds)

    def leave(self, ticket: Ticket) -> None:
        """Give the turn back, or give up waiting. Harmless when done twice."""
        with self._changed:
            if self._serving is ticket:
                self._serving = None
            elif ticket in self._waiting:
                self._waiting.remove(ticket)
            owners = {waiting.owner for waiting in self._waiting}
            self._served = {owner: turn for owner, turn in self._served.items() if owner in owners}
            self._changed.notify_all()

    def ahead(self, ticket: Ticket) -> int:
        """How many runs come before this one, the one being served included."""
        with self._changed:
            if ticket not in self._waiting:
                return 0
            order = self._order(ticket)
            earlier = sum(self._order(waiting) < order for waiting in self._waiting)
            return earlier + (self._serving is not None)

    def _take(self, ticket: Ticket) -> bool:
        if self._serving is ticket:
            return True
        if self._serving is not None or ticket not in self._waiting or min(self._waiting, key=self._order) is not ticket:
            return False
        self._waiting.remove(ticket)
        self._serving = ticket
        self._served[ticket.owner] = next(self._numbers)
        self._changed.notify_all()
        return True

    def _order(self, ticket: Ticket) -> tuple[int, int]:
        return self._served.get(ticket.owner, 0), ticket.number
