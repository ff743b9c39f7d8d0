"""A nf_tables table of the agent's own: declared as a whole, then changed by elements."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from nodeagent.errors import Unsupported
from nodeagent.net import nftables
from nodeagent.net.netlink import Connection, Request
from nodeagent.net.nftables import Element, Set, Table

log = logging.getLogger(__name__)


class Declaration(Protocol):
    """The content of a table without its elements: sets, chains and rules."""

    @property
    def table(self) -> Table: ...

    def sets(self) -> Iterable[Set]: ...

    def declare(self, elements: Sequence[Element]) -> list[Request]:
        """The requests that replace the table, whether it exists or not, by a new one with these elements."""


class DeclaredTable:
    """A table and the connection to change it. `elements` returns all that it has to hold, and is called by any thread.

    explained: all that it may hold, which includes what is about to be removed; also called by any thread.
    Any thread may change it: that may wait for the kernel's transaction lock, which others hold while they load rules.
    """

    def __init__(
        self,
        connection: Connection,
        declaration: Declaration,
        elements: Callable[[], Sequence[Element]],
        explained: Callable[[], Sequence[Element]],
    ) -> None:
        self._connection = connection
        self._declaration = declaration
        self._elements = elements
        self._explained = explained
        # Held from the call of `elements` to the end of the transaction: a declaration must not leave out an element
        # that another thread adds meanwhile.
        self._lock = threading.RLock()
        self._is_settled = False  # it has what the last change was to bring about

    @classmethod
    def open(
        cls,
        declaration: Declaration,
        elements: Callable[[], Sequence[Element]],
        explained: Callable[[], Sequence[Element]] | None = None,
    ) -> DeclaredTable:
        """Declare the table. Raises `Unsupported` on a kernel that cannot have it."""
        try:
            connection = nftables.connect()
        except OSError as error:
            raise Unsupported(f"nf_tables: {error}") from None
        table = cls(connection, declaration, elements, explained or elements)
        try:
            table.declare()
        except OSError as error:
            table.close()
            raise Unsupported(f"nf_tables: {error}") from None
        return table

    def close(self) -> None:
        """Close the connection; the table stays."""
        self._connection.close()

    def declare(self, declaration: Declaration | None = None) -> None:
        """Replace the table by a new one, in one transaction: packets meet the old rules or the new ones."""
        with self._lock:
            self._declaration = declaration or self._declaration
            self._is_settled = False
            nftables.transact(self._connection, self._declaration.declare(self._elements()))
            self._is_settled = True

    def settle(self) -> None:
        """Declare the table again where the last change has failed, and that as well. Else it waits for no lock."""
        if not self._is_settled:
            self.declare()

    def is_declared(self) -> bool:
        """Whether the table exists. It waits for no lock, neither of this object nor of the kernel."""
        with nftables.connect() as connection:
            try:
                connection.ask(self._declaration.table.look_up())
            except FileNotFoundError:
                return False
        return True

    def repair(self) -> None:
        """Declare the table again where another program deleted it, or a change has failed."""
        self.settle()
        if not self.is_declared():
            log.warning(
                "%s: deleted by another program; declaring it again", self._declaration.table
            )
            self.declare()

    def add(self, elements: Sequence[Element]) -> None:
        self._change(self._declaration.table.add_elements(elements))

    def remove(self, elements: Sequence[Element]) -> None:
        """Remove elements, whether the table has them or not."""
        table = self._declaration.table
        # Added first: to delete one that is missing fails (ENOENT) and takes the whole transaction with it, to add one
        # that is there does not.
        self._change([*table.add_elements(elements), *table.delete_elements(elements)])

    def strays(self) -> dict[str, Element]:
        """The elements that nothing explains, by how nft(8) writes them. It waits for no lock, as `is_declared`.

        Raises `OSError` where the kernel does not list them.
        """
        # What is there first, then what explains it: an element is added after the record that it comes from.
        held = self._held()
        explained = set(self._explained())
        return {name: element for name, element in held.items() if element not in explained}

    def remove_stray(self, name: str) -> bool:
        """Remove a stray; False where it is none any more. Raises `OSError`."""
        # Under the lock: whoever has recorded it meanwhile adds it after this.
        with self._lock:
            stray = self.strays().get(name)
            if stray is not None:
                self.remove([stray])
        return stray is not None

    def _held(self) -> dict[str, Element]:
        table = self._declaration.table
        held: dict[str, Element] = {}
        with nftables.connect() as connection:
            for one in self._declaration.sets():
                if one.dynamic:
                    continue  # by the table's rules
                try:
                    held |= {
                        one.describe(each): each for each in table.elements(connection, one.name)
                    }
                except FileNotFoundError:
                    continue  # deleted by another program, which `repair` finds
        return held

    def delete(self) -> None:
        """Remove the table. Succeeds where it is gone."""
        with self._lock:
            nftables.transact(self._connection, self._declaration.table.remove())

    def _change(self, requests: Sequence[Request]) -> None:
        if not requests:
            return
        with self._lock:
            if not self._is_settled:
                # With what is added now, whose record is there, and without what is removed now, whose record is gone.
                self.declare()
                return
            try:
                nftables.transact(self._connection, requests)
            except OSError as error:
                log.warning("%s: changed by another program; declaring the table again", error)
                self.declare()
