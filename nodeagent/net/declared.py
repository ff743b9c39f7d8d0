"""A table of the agent's own in the kernel: declared whole, then changed by elements."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from nodeagent.errors import Unsupported
from nodeagent.net import nftables
from nodeagent.net.netlink import Connection, Request
from nodeagent.net.nftables import Element, Table

log = logging.getLogger(__name__)


class Declaration(Protocol):
    """What a table has but for its elements."""

    @property
    def table(self) -> Table: ...

    def declare(self, elements: Sequence[Element]) -> list[Request]:
        """The whole table anew with these elements, in place of what there is of it."""


class DeclaredTable:
    """`elements` tells all that the table has to hold; it is asked whenever the table is declared.

    Any thread may call: changes may wait for the kernel's transaction lock, which others hold while they load rules.
    """

    def __init__(
        self,
        connection: Connection,
        declaration: Declaration,
        elements: Callable[[], Sequence[Element]],
    ) -> None:
        self._connection = connection
        self._declaration = declaration
        self._elements = elements
        # Who declares must not leave out an element that another thread adds meanwhile.
        self._lock = threading.RLock()

    @classmethod
    def open(
        cls, declaration: Declaration, elements: Callable[[], Sequence[Element]]
    ) -> DeclaredTable:
        """Declare the table. Raises `Unsupported` on a kernel that cannot have it."""
        try:
            connection = nftables.connect()
        except OSError as error:
            raise Unsupported(f"nf_tables: {error}") from None
        table = cls(connection, declaration, elements)
        try:
            table.declare()
        except OSError as error:
            table.close()
            raise Unsupported(f"nf_tables: {error}") from None
        return table

    def close(self) -> None:
        """The table stays."""
        self._connection.close()

    def declare(self, declaration: Declaration | None = None) -> None:
        """Put the whole table in place of what there is of it, in one transaction."""
        with self._lock:
            self._declaration = declaration or self._declaration
            nftables.transact(self._connection, self._declaration.declare(self._elements()))

    def is_declared(self) -> bool:
        """Whether the table is there. It waits for nobody."""
        with nftables.connect() as connection:
            try:
                connection.ask(self._declaration.table.look_up())
            except FileNotFoundError:
                return False
        return True

    def repair(self) -> None:
        """Declare the table anew where somebody deleted it."""
        if not self.is_declared():
            log.warning("%s: was deleted, it is declared anew", self._declaration.table)
            self.declare()

    def add(self, elements: Sequence[Element]) -> None:
        self._change(self._declaration.table.add_elements(elements))

    def remove(self, elements: Sequence[Element]) -> None:
        """Whether they are there or not: deleting one that is missing would fail, and all the rest with it."""
        table = self._declaration.table
        self._change([*table.add_elements(elements), *table.delete_elements(elements)])

    def delete(self) -> None:
        """Remove the table; one that is gone is fine."""
        with self._lock:
            nftables.transact(self._connection, self._declaration.table.remove())

    def _change(self, requests: Sequence[Request]) -> None:
        if not requests:
            return
        with self._lock:
            try:
                nftables.transact(self._connection, requests)
            except OSError as error:
                log.warning("%s: somebody changed it, it is declared anew", error)
                self.declare()
