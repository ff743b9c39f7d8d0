"""The agent's ruleset in the kernel: declared whole, then changed by elements."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from nodeagent.errors import Unsupported
from nodeagent.net import nftables
from nodeagent.net.netlink import Connection, Request
from nodeagent.net.nftables import Element
from nodeagent.net.ruleset import Ruleset

log = logging.getLogger(__name__)


class Nat:
    """`elements` tells all that the table has to hold; it is asked whenever the table is declared."""

    def __init__(
        self, connection: Connection, ruleset: Ruleset, elements: Callable[[], Sequence[Element]]
    ) -> None:
        self._connection = connection
        self._ruleset = ruleset
        self._elements = elements

    @classmethod
    def open(cls, ruleset: Ruleset, elements: Callable[[], Sequence[Element]]) -> Nat:
        """Declare the table. Raises `Unsupported` on a kernel that cannot have it."""
        try:
            connection = nftables.connect()
        except OSError as error:
            raise Unsupported(f"nf_tables: {error}") from None
        nat = cls(connection, ruleset, elements)
        try:
            nat.declare()
        except OSError as error:
            nat.close()
            raise Unsupported(f"nf_tables: {error}") from None
        return nat

    def close(self) -> None:
        """The table stays."""
        self._connection.close()

    def declare(self, ruleset: Ruleset | None = None) -> None:
        """Put the whole table in place of what there is of it, in one transaction."""
        self._ruleset = ruleset or self._ruleset
        nftables.transact(self._connection, self._ruleset.declare(self._elements()))

    def is_declared(self) -> bool:
        try:
            self._connection.ask(self._ruleset.table.look_up())
        except FileNotFoundError:
            return False
        return True

    def add(self, elements: Sequence[Element]) -> None:
        self._change(self._ruleset.table.add_elements(elements))

    def remove(self, elements: Sequence[Element]) -> None:
        self._change(self._ruleset.table.delete_elements(elements))

    def delete(self) -> None:
        """Remove the table; one that is gone is fine."""
        table = self._ruleset.table
        nftables.transact(self._connection, [table.create(), table.delete()])

    def _change(self, requests: Sequence[Request]) -> None:
        try:
            if requests:
                nftables.transact(self._connection, requests)
        except OSError as error:
            log.warning("%s: somebody changed it, it is declared anew", error)
            self.declare()
