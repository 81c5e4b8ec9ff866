"""A memory in a Milvus database: one row per slot has its template, label and key, in a file or on a server."""

from __future__ import annotations

import base64
import copy
import json
import logging
import math
import secrets
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, Self

import numpy as np
import torch
from jaxtyping import Integer
from torch import Tensor

from pyro_vmem._utils.checks import checked
from pyro_vmem._utils.extras import require
from pyro_vmem.memory.growing import Growing
from pyro_vmem.memory.index import AddressIndex, Hits, checked_keys
from pyro_vmem.memory.memory import Memory
from pyro_vmem.memory.packed import PackedMemory, PackedStore

__all__ = ["MilvusIndex", "MilvusMemory"]

MOST_ROWS = 16_384  # which Milvus finds at most, and returns at most per page
MOST_BYTES = 1 << 24  # of rows that travel together; servers refuse messages of more than 64 MB
LONGEST = 65_535  # of a string in Milvus
TRAINED = "in training"  # in place of a fingerprint: the keys are of several versions of the weights


class Collection:
    """One collection of Milvus. This class makes all calls to the database.

    A row has an id, a label (-1 for none), a template (base64 of what a :class:`PackedStore` has in a row) and a key.

    Arguments are as of :class:`MilvusMemory`.
    """

    def __init__(self, uri: str, name: str, timeout: float = 60.0, **options: Any) -> None:
        self.uri, self.name, self.timeout, self.options = str(uri), name, timeout, options
        self.about: dict[str, Any] = {}
        self._milvus: Any = require("pymilvus", "milvus")
        if self.uri.endswith(".db"):
            require("milvus_lite", "milvus")
        self._client: Any = None

    def open(self) -> Self:
        """Reads the description of the collection."""
        if self.name not in self("list_collections"):
            raise ValueError(
                f"collection: {self.uri!r} has none named {self.name!r}. Make it with MilvusMemory.create."
            )
        described = self("describe_collection")
        if "pyro_vmem" not in described["properties"]:
            raise ValueError(
                f"collection: {self.name!r} in {self.uri!r} was not made by pyro_vmem. Make one with "
                "MilvusMemory.create."
            )
        self.about = json.loads(described["properties"]["pyro_vmem"])
        (key,) = (field for field in described["fields"] if field["name"] == "key")
        self.dim = int(key["params"]["dim"])
        bytes_each = 4 * self.dim + 4 * math.prod(self.about["event_shape"]) // 3
        self.rows_at_once = max(1, min(1024, MOST_BYTES // bytes_each))
        return self

    def create(self, dim: int, about: dict[str, Any], row_bytes: int, index: dict[str, Any]) -> Self:
        """Makes the collection, without rows."""
        client, types = self._milvus.MilvusClient, self._milvus.DataType
        characters = 4 * -(-row_bytes // 3)
        if characters > LONGEST:
            raise ValueError(
                f"event_shape: expected templates of at most {LONGEST * 3 // 4:,} bytes, got {row_bytes:,}. Pack them "
                "as bits, or make them smaller."
            )
        if self.name in self("list_collections"):
            raise ValueError(
                f"collection: {self.uri!r} has one named {self.name!r}. Open it with MilvusMemory(uri, collection)."
            )
        schema = client.create_schema(auto_id=False)
        schema.add_field("id", types.INT64, is_primary=True)
        schema.add_field("label", types.INT64)
        schema.add_field("template", types.VARCHAR, max_length=characters)
        schema.add_field("key", types.FLOAT_VECTOR, dim=dim)
        found_by = client.prepare_index_params()
        found_by.add_index("key", metric_type="IP", **index)
        # Strong: what was added is found by the next search, whichever node answers.
        strong = {"consistency_level": "Strong", "properties": {"pyro_vmem": json.dumps(about)}}
        self("create_collection", schema=schema, index_params=found_by, **strong)
        return self.open()

    def __call__(self, method: str, **arguments: Any) -> Any:
        """Calls a method of the client on this collection."""
        named = {} if method == "list_collections" else {"collection_name": self.name}
        with self._telling_the_uri():
            return getattr(self._connected(), method)(**named, **arguments, timeout=self.timeout)

    def _connected(self) -> Any:
        if self._client is None:
            how = {
                # Or a server that is back would not be asked before a pause after its last failure is over.
                "grpc.use_local_subchannel_pool": 1,
                # No pings: every call has a deadline, and the embedded engine takes many for an attack.
                "grpc.keepalive_time_ms": 2**31 - 1,
            }
            how |= self.options.get("grpc_options", {})
            options = self.options | {"timeout": self.timeout, "grpc_options": how}
            client = self._milvus.MilvusClient(self.uri, **options)
            if client.has_collection(self.name, timeout=self.timeout):
                client.load_collection(self.name, timeout=self.timeout)  # a server that was started anew has not
            self._client = client
        return self._client

    @contextmanager
    def _telling_the_uri(self) -> Iterator[None]:
        loggers = [logging.getLogger(name) for name in ("pymilvus", "milvus_lite", "grpc")]
        levels = [logger.level for logger in loggers]
        try:
            for logger in loggers:  # which write what is raised here, and that the embedded engine has no clock
                logger.setLevel(logging.CRITICAL)
            yield
        except (self._milvus.MilvusException, require("grpc", "milvus").RpcError) as error:
            # This client would not connect again; the next call makes another.
            self.close(engine=False)
            what = f"uri: {self.uri!r}, collection {self.name!r}: "
            reason = error.message if isinstance(error, self._milvus.MilvusException) else error.details()
            if isinstance(error, self._milvus.exceptions.ConnectionConfigException):
                raise ConnectionError(
                    f"{what}it cannot be opened. A file belongs to one process at a time: end the other, or serve the "
                    "file, `milvus-lite server --data-dir FILE --port 19530`, and open 'http://localhost:19530'."
                ) from error
            raise ConnectionError(
                f"{what}Milvus did not answer as expected ({reason}). What it has confirmed is stored. Check "
                "that the server runs, and call again."
            ) from error
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)

    def close(self, engine: bool = True) -> None:
        """Ends the connection, and the embedded engine of a file, which another process can then open."""
        if self._client is not None:
            with suppress(self._milvus.MilvusException):
                self._client.close()
            self._client = None
        if engine and self.uri.endswith(".db"):
            require("milvus_lite.server_manager", "milvus").server_manager_instance.release_server(self.uri)

    def note(self, **about: Any) -> None:
        """Writes the description of the collection."""
        self.about |= about
        self("alter_collection_properties", properties={"pyro_vmem": json.dumps(self.about)})

    def scan(self) -> tuple[Tensor, Tensor]:
        """The ids of all rows, in order, and their labels: `(n,)` each."""
        with self._telling_the_uri():
            pages = self._connected().query_iterator(
                self.name, batch_size=MOST_ROWS, output_fields=["id", "label"], timeout=self.timeout
            )
            rows: list[tuple[int, int]] = []
            while page := pages.next():
                rows += [(row["id"], row["label"]) for row in page]
            pages.close()
        table = torch.tensor(rows, dtype=torch.long).reshape(-1, 2)
        order = table[:, 0].argsort()
        return table[order, 0], table[order, 1]

    def fetch(self, ids: Tensor, field: str) -> dict[int, Any]:
        """A field of the rows that there are, by id."""
        found: dict[int, Any] = {}
        for some in ids.unique().split(self.rows_at_once):
            for row in self("get", ids=some.tolist(), output_fields=["id", field]):
                found[row["id"]] = row[field]
        return found

    def write(self, method: Literal["insert", "upsert"], rows: dict[str, Any], **how: Any) -> None:
        """Writes rows in batches. `rows` has the columns by name, all of one length."""
        for start in range(0, len(rows["id"]), self.rows_at_once):
            some = [column[start : start + self.rows_at_once] for column in rows.values()]
            self(method, data=[dict(zip(rows, row, strict=True)) for row in zip(*some, strict=True)], **how)


class MilvusIndex(AddressIndex):
    """The keys in a collection of Milvus, which searches them. It is the index of a :class:`MilvusMemory`.

    A slot is the number of a row in this object. The id of a row is permanent. Rows that other processes add get a slot
    here in :meth:`sync`.

    Arguments:
        collection: The collection.
        search: Parameters of a search, such as `{"ef": 128}` for an index of type HNSW.

    Attributes:
        labels: The labels of the rows that were there when it was made, `(S,)`.
    """

    def __init__(self, collection: Collection, search: dict[str, Any] | None = None) -> None:
        self.collection, self.parameters, self.filter = collection, search or {}, ""
        ids, self.labels = collection.scan()
        super().__init__(collection.dim, torch.float32, torch.ones(len(ids), dtype=torch.bool))
        self._ids, self._writer = Growing(ids), secrets.randbits(31)
        self._sorter: Tensor | None = None  # of ids that are not in order
        self._trusted: weakref.WeakSet[Any] = weakref.WeakSet()

    @property
    def ids(self) -> Tensor:
        """The ids of the rows by slot, `(S,)`."""
        return self._ids.values

    # Of which model the keys are

    @property
    def made_by(self) -> str | None:
        """The fingerprint of the model that computed the keys; None if unknown."""
        return self.collection.about.get("made_by")

    def check_model(self, model: object, fingerprint: Callable[[], str]) -> None:
        # A model that was found to fit may then be trained.
        if model in self._trusted or self.made_by is None:
            return
        if fingerprint() != self.made_by:
            raise ValueError(
                f"memory: the keys in {self.collection.uri!r}, collection {self.collection.name!r}, are of a model "
                f"with the fingerprint {self.made_by!r}, this one's is {fingerprint()!r}. Load that model, or compute "
                "all keys anew: index_memory(vma, memory)."
            )
        self._trusted.add(model)

    def sign(self, model: object, fingerprint: Callable[[], str], whole: bool = True) -> None:
        before, now = self.made_by, fingerprint()
        if whole or not len(self):
            after: str | None = now
        else:
            after = TRAINED if before not in (None, now) else before
        if after != before:
            self.collection.note(made_by=after)
        self._trusted.add(model)

    # Rows

    def _append(self, keys: Tensor) -> None:
        self._insert(keys, None, None)

    def add_rows(self, keys: Tensor, templates: list[str], labels: Tensor | None) -> Tensor:
        """Adds rows with keys `(n, D)`, templates and labels `(n)`; returns their slots, with shape `(n)`."""
        self._insert(checked_keys(keys, self.dim).float().cpu(), templates, labels)
        return self._numbered(len(keys))

    def _insert(self, keys: Tensor, templates: list[str] | None, labels: Tensor | None) -> None:
        # A counter before a number of this writer's own: ids go up, and no two writers make the same one, as the
        # database would let them.
        first = (int(self.ids.max()) >> 31) + 1 if len(self.ids) else 0
        ids = (torch.arange(first, first + len(keys)) << 31) + self._writer
        rows = {
            "id": ids.tolist(),
            "label": [-1] * len(keys) if labels is None else labels.tolist(),
            "template": [""] * len(keys) if templates is None else templates,
            "key": keys.numpy(),
        }
        try:
            self.collection.write("insert", rows)
        except ConnectionError:
            with suppress(ConnectionError):  # what arrived of it
                self.collection("delete", ids=ids.tolist())
            raise
        self._note_ids(ids)

    def _note_ids(self, ids: Tensor) -> None:
        in_order = self._sorter is None and (len(self.ids) == 0 or len(ids) == 0 or bool(ids[0] > self.ids[-1]))
        self._ids = self._ids.append(ids)
        self._sorter = None if in_order else self.ids.argsort()

    def remove(self, slots: Integer[Tensor, " n"]) -> None:
        slots = self._in_range(slots)
        for some in self.ids[slots].split(MOST_ROWS) if len(slots) else ():  # Milvus deletes no empty list
            self.collection("delete", ids=some.tolist())
        super().remove(slots)

    def _replace(self, slots: Tensor, keys: Tensor) -> None:
        if self.made_by is not None and self.made_by != TRAINED:
            self.collection.note(made_by=TRAINED)
        try:
            self._upsert(slots, keys)
        except ConnectionError:  # perhaps because of rows that others removed
            before = len(self)
            self.sync()
            if len(self) == before:
                raise
            self._upsert(slots, keys)

    def _upsert(self, slots: Tensor, keys: Tensor) -> None:
        there = self.present[slots]
        rows = {"id": self.ids[slots][there].tolist(), "key": keys[there].numpy()}
        self.collection.write("upsert", rows, partial_update=True)

    def keys_of(self, slots: Tensor) -> Tensor:
        ids = self.ids[self._in_range(slots)]
        found = self.collection.fetch(ids, "key")
        blank = [0.0] * self.dim  # of slots that were removed
        return torch.tensor([found.get(i, blank) for i in ids.tolist()]).reshape(-1, self.dim)

    def sync(self) -> Tensor:
        """Reads which rows other processes removed or added; returns the labels of the new slots, with shape `(n)`."""
        ids, labels = self.collection.open().scan()
        self.present.logical_and_(torch.isin(self.ids, ids))
        self._count = int(self.present.sum())
        new = ~torch.isin(ids, self.ids)
        self._note_ids(ids[new])
        self._numbered(int(new.sum()))
        return labels[new]

    def rebuild(self, keys: Tensor | None = None) -> None:
        super().rebuild(keys)
        self.collection("flush")  # after which the engine makes its index of rows that it had beside it

    def copy(self) -> Self:
        other = super().copy()
        other._writer, other._trusted = secrets.randbits(31), weakref.WeakSet(self._trusted)
        return other

    # Search

    def where(self, expression: str, present: Tensor) -> Self:
        """The index of the slots that are `present`, `(S,)`: those whose rows fulfil an expression of Milvus."""
        other = self.copy()
        other.filter, other._present, other._count = expression, Growing(present).with_room(), int(present.sum())
        return other

    def _search(self, queries: Tensor, k: int) -> Hits:
        some = queries.split(max(1, MOST_BYTES // (64 * k)))
        found = [self._found(each, k) for each in some]
        return Hits(torch.cat([hits.scores for hits in found]), torch.cat([hits.slots for hits in found]))

    def _found(self, queries: Tensor, k: int) -> Hits:
        scores, slots = np.full((len(queries), k), -math.inf, np.float32), np.full((len(queries), k), -1)
        asked, missing = k, True
        while missing:  # rows that others added are not among the slots of this object: then as many more are asked for
            rows = self.collection(
                "search",
                data=list(queries.numpy()),
                limit=min(asked, MOST_ROWS),
                filter=self.filter,
                output_fields=["id"],
                search_params={"metric_type": "IP", "params": self.parameters},
            )
            missing = False
            for row, hits in enumerate(rows):
                at = self.slots_of(np.fromiter((hit["id"] for hit in hits), np.int64))
                known = np.flatnonzero(at >= 0)[:k]
                scores[row, : len(known)] = [hits[i]["distance"] for i in known]
                slots[row, : len(known)] = at[known]
                missing |= len(known) < min(k, len(self)) and len(hits) == min(asked, MOST_ROWS) and asked < MOST_ROWS
            asked *= 2
        return Hits(torch.from_numpy(scores), torch.from_numpy(slots))

    def slots_of(self, ids: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Returns the slots of rows, `(n,)`; -1 for rows without a slot here."""
        if not self.num_slots:
            return np.full(len(ids), -1)
        here, sorter = self.ids.numpy(), None if self._sorter is None else self._sorter.numpy()
        at = np.searchsorted(here, ids, sorter=sorter).clip(max=len(here) - 1)
        at = at if sorter is None else sorter[at]
        return np.where((here[at] == ids) & self.present.numpy()[at], at, -1)


class MilvusStore(PackedStore):
    """Templates in a collection of Milvus, unpacked when they are read; see :class:`MilvusMemory`."""

    def __init__(self, index: MilvusIndex) -> None:
        about = index.collection.about
        self.index, self._num_slots = index, index.num_slots
        self.event_shape, self.bits = torch.Size(about["event_shape"]), about["bits"]
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.packed = torch.empty(0, *self.row_shape, dtype=torch.uint8)

    @property
    def num_slots(self) -> int:
        return self._num_slots

    def _rows(self, at: Tensor) -> Tensor:
        there = self.index.present[at]
        found = self.index.collection.fetch(self.index.ids[at[there]], "template")
        rows = np.zeros((len(at), math.prod(self.row_shape)), np.uint8)  # a slot that was removed is blank
        for row in there.nonzero().squeeze(-1).tolist():
            template = found.get(int(self.index.ids[at[row]]))
            if template is None:
                raise IndexError(
                    f"a: the template in slot {int(at[row])} was removed by somebody else. Call memory.sync()."
                )
            rows[row] = np.frombuffer(base64.b64decode(template), np.uint8)
        return torch.from_numpy(rows).reshape(-1, *self.row_shape)

    def of(self, index: MilvusIndex) -> MilvusStore:
        """Returns the store with the present rows of an index."""
        other = copy.copy(self)
        other.index, other._num_slots = index, index.num_slots
        return other


class MilvusMemory(PackedMemory):
    r"""A memory in a collection of Milvus: a file on this machine, or a cluster that many processes read and write.

    Templates, labels and keys are stored there, and the database searches the keys. This object has an id, a label and
    a bit per slot. An added or removed template is in the database when the call returns. Changes by other processes
    are visible after :meth:`sync`.

    The slots of an opened memory are numbered in the order in which templates were added, without those removed.

    Arguments:
        uri: A file that ends in `.db`, opened by one process at a time; or a server, such as `"http://host:19530"`.
        collection: The name of the collection, which :meth:`create` made.
        search: Parameters of a search that the type of index takes, such as `{"ef": 128}` for HNSW.
        timeout: Seconds after which a call that had no answer fails.
        options: What else `pymilvus.MilvusClient` takes, such as `token` and `db_name`.

    Raises:
        ValueError: If there is no such collection, or it is not one of :meth:`create`.
        ConnectionError: If the database does not answer, here and in all methods. Nothing stored is lost.
        ImportError: If pymilvus or, for a file, milvus-lite is not installed.

    Example:
        >>> import tempfile
        >>> uri = tempfile.mkdtemp() + "/memory.db"
        >>> memory = MilvusMemory.create(uri, "letters", (1, 28, 28), dim=64)
        >>> images = (torch.rand(3, 1, 28, 28) > 0.5).float()
        >>> memory.add(images, labels=torch.tensor([4, 4, 7]), keys=torch.eye(3, 64))
        tensor([0, 1, 2])
        >>> memory.remove(torch.tensor([0]))
        >>> memory.close()
        >>> again = MilvusMemory(uri, "letters")  # also in another process
        >>> again
        MilvusMemory(2 slots of (1, 28, 28), shared, 2 classes, 1 bit a value, MilvusIndex)
        >>> bool((again.read(torch.tensor([1])) == images[2]).all())
        True
        >>> again.close()
    """

    store: MilvusStore
    index: MilvusIndex

    def __init__(
        self,
        uri: str,
        collection: str,
        *,
        search: dict[str, Any] | None = None,
        timeout: float = 60.0,
        **options: Any,
    ) -> None:
        index = MilvusIndex(Collection(uri, collection, timeout, **options).open(), search)
        labels = index.labels if index.collection.about["labelled"] else None
        Memory.__init__(self, MilvusStore(index), labels, index=index)
        self._begin()

    @classmethod
    @checked
    def create(
        cls,
        uri: str,
        collection: str,
        event_shape: Sequence[int],
        dim: int,
        bits: Literal[1, 8] = 1,
        *,
        labelled: bool = True,
        index: dict[str, Any] | None = None,
        search: dict[str, Any] | None = None,
        timeout: float = 60.0,
        **options: Any,
    ) -> Self:
        """Makes a collection without templates; :func:`add_templates` fills it. Other arguments are those of the class.

        Arguments:
            event_shape: The shape of one template.
            dim: The length of a key.
            bits: 1 or 8 for each value of a template, as of :class:`PackedMemory`.
            labelled: Whether templates have labels.
            index: The type of index, as Milvus names it. Default: `{"index_type": "FLAT"}`, which looks at every key;
                `{"index_type": "HNSW", "params": {"M": 16, "efConstruction": 200}}` looks at few.

        Raises:
            ValueError: If there is a collection of this name, or templates are too large for a row.
        """
        values, about = math.prod(event_shape), {"event_shape": list(event_shape), "bits": bits, "labelled": labelled}
        made = Collection(uri, collection, timeout, **options)
        made.create(dim, about, -(-values // 8) if bits == 1 else values, index or {"index_type": "FLAT"})
        return cls(uri, collection, search=search, timeout=timeout, **options)

    def _stored(self, rows: Tensor, labels: Tensor | None, keys: Tensor | None) -> PackedStore:
        assert keys is not None
        templates = [base64.b64encode(row.tobytes()).decode() for row in rows.cpu().numpy()]
        index = self._own_index()
        assert isinstance(index, MilvusIndex)
        index.add_rows(keys, templates, labels)
        return self.store.of(index)

    def remove(self, slots: Integer[Tensor, " n"]) -> None:
        super().remove(slots)
        self.store = self.store.of(self.index)

    def sync(self) -> None:
        """Reads the changes of other processes: new slots follow the present ones, removed slots are masked."""
        index = self._own_index()
        assert isinstance(index, MilvusIndex)
        new = index.sync()
        self.store = self.store.of(self.index)
        if self._grown_labels is not None:
            self._grown_labels = self._grown_labels.append(new)
            self.labels = self._grown_labels.values
        self.mask = None if bool(self.index.present.all()) else self.index.present.to(self.device, copy=True)

    def of_classes(self, labels: Sequence[int]) -> Self:
        """The memory of the classes `labels`, whose slots keep their numbers: a filter in the database, no copy.

        Raises:
            ValueError: If no slot has one of these labels, or the memory has no labels.
        """
        if self.labels is None:
            raise ValueError("labels: of_classes needs them, got none. Create the memory with labelled=True.")
        present = self.index.present & torch.isin(self.labels.cpu(), torch.tensor(labels))
        if not bool(present.any()):
            raise ValueError(f"labels: no slot in use has one of {list(labels)}.")
        index = self.index.where(f"label in {[int(label) for label in labels]}", present)
        other = copy.copy(self)
        other._hold(self.store.of(index), self.labels, present.to(self.device), index)
        other._begin()
        return other

    def close(self) -> None:
        """Ends the connection. A file is closed for the whole process, so that another process can open it."""
        self.index.collection.close()
