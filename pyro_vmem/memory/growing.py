"""Tensors with rows that grow without copying existing rows."""

from __future__ import annotations

from torch import Tensor

__all__ = ["Growing"]


class Growing:
    """Rows `values`, `(n, *)`, with free space after the last. The cost of appending does not depend on `n`.

    The object is immutable. :meth:`append` returns another one, which shares the storage while there is space.

    Example:
        >>> import torch
        >>> two = Growing(torch.zeros(2, 3))
        >>> three = two.append(torch.ones(1, 3))
        >>> two.values.shape, three.values.shape
        (torch.Size([2, 3]), torch.Size([3, 3]))
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self._room, self._used = values, [len(values)]

    def append(self, rows: Tensor) -> Growing:
        """The rows followed by rows `(m, *)`."""
        before, after = len(self.values), len(self.values) + len(rows)
        # The space may already hold rows that were appended to this object elsewhere. These stay.
        in_place = self._used[0] == before and after <= len(self._room)
        base = self if in_place else self.with_room(after)
        base._room[before:after] = rows
        base._used[0] = after
        return Growing._in(base._room, base._used, after)

    def with_room(self, length: int = 0) -> Growing:
        """A copy with space for `length` rows and a quarter more.

        Space grows by a factor, so all copies together cost a constant per appended row. Unwritten pages take no RAM.
        """
        length, here = max(length, len(self.values)), len(self.values)
        room = self._room.new_empty((length + length // 4 + 64, *self._room.shape[1:]))
        room[:here] = self.values
        return Growing._in(room, [here], here)

    @classmethod
    def _in(cls, room: Tensor, used: list[int], length: int) -> Growing:
        rows = cls(room[:length])
        rows._room, rows._used = room, used
        return rows
