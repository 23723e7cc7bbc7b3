"""Weights of unknown origin: whatever their headers, indices and pickles hold, they are refused in
one sentence or read correctly.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_real.checkpoint.unpickling import check_metadata, weights_only
from megatron_real.conversion.convert import hf_to_megatron, megatron_to_hf
from megatron_real.weights import WeightsError
from megatron_real.weights.containers import load_pickle
from megatron_real.weights.hf import HfWeights
from tests.amount import examples

SAFE = settings(
    deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
)
TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.arange(4).to(torch.bfloat16),
    "c": torch.zeros(0, 2),
}


@contextmanager
def memory_stays_small(limit: int = 300 * 2**20) -> Iterator[None]:
    # ru_maxrss counts KiB, and only ever grows.
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < limit


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("plain") / "model.safetensors"
    save_file(TENSORS, path)
    return path.read_bytes()


def read_all(directory: Path) -> dict[str, torch.Tensor] | None:
    """Returns the tensors, or None where the directory was refused."""
    try:
        weights = HfWeights(directory)
        return {
            name: weights.read(name)
            for name in weights.names
            if weights.tensor(name).dtype in ("F32", "BF16")
        }
    except WeightsError as error:
        assert str(error) and "\n" not in str(error)
        return None


numbers = st.one_of(
    st.integers(-2, 60),
    st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64, 10**30, -(2**63)]),
    st.floats(),
    st.none(),
)
fields = st.one_of(
    st.sampled_from(["F32", "BF16", "I64", "F8_E4M3", "Q4", "", 3, None]),
    st.lists(numbers, max_size=4),
    st.text(max_size=4),
    numbers,
)


@st.composite
def headers(draw: st.DrawFn, plain_header: bytes) -> bytes:
    """Draws a header with a few of its fields, names or bytes replaced."""
    if draw(st.booleans()):
        table = json.loads(plain_header)
        for _ in range(draw(st.integers(1, 3))):
            name = draw(st.sampled_from([*table, "__metadata__", "d"]))
            key = draw(st.sampled_from(["dtype", "shape", "data_offsets", "whole"]))
            if key == "whole" or not isinstance(table.get(name), dict):
                table[name] = draw(fields)
            else:
                table[name] = {**table[name], key: draw(fields)}
        return json.dumps(table).encode()
    data = bytearray(plain_header)
    for _ in range(draw(st.integers(1, 4))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data)


@pytest.mark.parametrize("part", range(2))
def test_fuzzed_safetensors_headers_are_refused_or_read_correctly(
    plain: bytes, tmp_path: Path, part: int
) -> None:
    """There are 4,000 cases with --all. What is accepted is what the safetensors library reads,
    byte for byte.
    """
    length = struct.unpack("<Q", plain[:8])[0]
    accepted = [0]

    @settings(SAFE, max_examples=examples(4000))
    @given(
        headers(plain[8 : 8 + length]),
        st.one_of(st.just(0), st.integers(-9, 9), st.sampled_from([2**40, 2**63])),
    )
    def check(header: bytes, lie: int) -> None:
        # Part 0 states the header's true length, part 1 a wrong one.
        claimed = max(len(header) + (lie if part else 0), 0)
        file = tmp_path / "model.safetensors"
        file.write_bytes(struct.pack("<Q", claimed % 2**64) + header + plain[8 + length :])
        tensors = read_all(tmp_path)
        if tensors:
            accepted[0] += 1
            with safe_open(file, "pt") as theirs:
                for name, tensor in tensors.items():
                    expected = theirs.get_tensor(name)
                    assert expected.shape == tensor.shape and expected.dtype == tensor.dtype
                    assert expected.view(torch.uint8).tolist() == tensor.view(torch.uint8).tolist()

    with memory_stays_small():
        check()
    assert accepted[0] > 0, "some mutations must still be valid, or the comparison tests nothing"


def test_fuzzed_indices_are_refused_or_read_correctly(plain: bytes, tmp_path: Path) -> None:
    """There are 3,000 cases with --all, of an index of two files."""
    for name in ("model-1.safetensors", "model-2.safetensors"):
        (tmp_path / name).write_bytes(plain)
    targets = st.one_of(
        st.sampled_from(
            [
                "model-1.safetensors",
                "../x.safetensors",
                "/etc/passwd",
                "model-3.safetensors",
                ".",
                "a\0b",
            ]
        ),
        fields,
    )
    tables = st.dictionaries(st.sampled_from(["a", "b", "c", "d", "../a"]), targets, max_size=4)
    documents = st.one_of(
        st.builds(lambda table: {"weight_map": table}, tables),
        st.dictionaries(st.sampled_from(["weight_map", "metadata"]), fields),
        fields,
    )

    @settings(SAFE, max_examples=examples(3000))
    @given(documents)
    def check(document: Any) -> None:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(document))
        tensors = read_all(tmp_path)
        if tensors is not None:
            assert document["weight_map"] and set(document["weight_map"].values()) == {
                "model-1.safetensors"
            }
            assert torch.equal(tensors["a"], TENSORS["a"])

    with memory_stays_small():
        check()


@pytest.mark.parametrize("file", ["release/.metadata", "release/__0_0.distcp"])
def test_fuzzed_checkpoints_are_refused_or_exported(
    tiny_model: Callable[..., Path], tmp_path: Path, file: str
) -> None:
    """In 1,500 cases a few bytes are changed; an export touches nothing outside its directory."""
    source = tiny_model(
        "llama", dtype="bfloat16", num_hidden_layers=1, hidden_size=8, intermediate_size=8
    )
    checkpoint = hf_to_megatron(source, tmp_path / "megatron").out
    good = (checkpoint / file).read_bytes()

    @settings(SAFE, max_examples=examples(1500))
    @given(
        st.lists(
            st.tuples(st.integers(0, len(good) - 1), st.integers(0, 255)), min_size=1, max_size=4
        )
    )
    def check(changes: list[tuple[int, int]]) -> None:
        data = bytearray(good)
        for position, value in changes:
            data[position] = value
        (checkpoint / file).write_bytes(data)
        try:
            megatron_to_hf(checkpoint, tmp_path / "hf", overwrite=True)
        except WeightsError as error:
            assert str(error)

    with memory_stays_small():
        check()


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"cos\nsystem\n(S'touch pwned'\ntR.", "names os.system"),
        (b"cbuiltins\neval\n(S'1'\ntR.", "names builtins.eval"),
        (b"cposix\nsystem\n.", "names posix.system"),
        (b"r\xff\xff\xff\x7f.", "corrupt"),
        (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f", "corrupt"),
        (b"(" * 100_000 + b"t" * 100_000, "corrupt"),
        (b"", "corrupt"),
    ],
    ids=["os.system", "eval", "posix", "memo-bomb", "length-bomb", "nesting", "empty"],
)
def test_hostile_pickles_are_refused_and_run_nothing(
    tmp_path: Path, payload: bytes, message: str
) -> None:
    with memory_stays_small(), pytest.raises(WeightsError, match=message):
        load_pickle(payload, tmp_path / "x.pt")


def test_classes_of_a_checkpoint_are_inert(tmp_path: Path) -> None:
    """Stand-ins take the place of numpy's and torch's names; even a callable of torch is never
    called.
    """
    payload = b"ctorch.hub\nload\n(S'evil/repo'\ntR."
    assert type(load_pickle(payload, tmp_path / "x.pt")).__name__ == "load"


def test_a_bin_file_with_a_strange_class_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, ("true",)

    torch.save({"a": torch.zeros(2), "b": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"(posix|os)\.system"):
        HfWeights(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(WeightsError, match=r"not a torch.save archive"):
        HfWeights(tmp_path)


def test_only_contiguous_tensors_are_read_from_bin_files(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(4, 6).t()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="not stored as one contiguous tensor"):
        HfWeights(tmp_path)
    shared = torch.arange(10.0)
    torch.save({"a": shared[2:6], "b": shared}, tmp_path / "pytorch_model.bin")
    assert HfWeights(tmp_path).read("a").tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("../../etc/passwd", "is not one of the checkpoint"),
        ("/etc/passwd", "is not one of the checkpoint"),
    ],
)
def test_metadata_that_names_files_outside_the_directory_are_refused(
    tiny_model: Callable[..., Path], tmp_path: Path, metadata: str, message: str
) -> None:
    checkpoint = hf_to_megatron(tiny_model("qwen2", dtype="bfloat16"), tmp_path / "megatron").out
    file = checkpoint / "release/.metadata"
    table = pickle.loads(file.read_bytes())
    for info in table.storage_data.values():
        info.relative_path = metadata
    file.write_bytes(pickle.dumps(table))
    with pytest.raises(WeightsError, match=message):
        megatron_to_hf(checkpoint, tmp_path / "hf")


def test_loops_pipes_and_missing_files_are_refused(plain: bytes, tmp_path: Path) -> None:
    link = tmp_path / "model.safetensors"
    link.symlink_to(link)
    with pytest.raises(WeightsError, match="cannot be read"):
        HfWeights(tmp_path)

    link.unlink()
    os.mkfifo(link)
    with pytest.raises(WeightsError, match="not a regular file"):
        HfWeights(tmp_path)

    link.unlink()
    index = {"weight_map": {"a": "model-1.safetensors", "z": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=r"model-1.safetensors cannot be read .*incomplete"):
        HfWeights(tmp_path)

    (tmp_path / "model-1.safetensors").write_bytes(plain)
    with pytest.raises(WeightsError, match="names z, which none of its files has"):
        HfWeights(tmp_path)


def test_a_missing_chunk_is_named(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = hf_to_megatron(
        tiny_model("qwen2", dtype="bfloat16"), tmp_path / "megatron", tp_chunks=2
    ).out
    file = checkpoint / "release/.metadata"
    table = pickle.loads(file.read_bytes())
    gone = next(
        i for i in table.storage_data if i.fqn.endswith("linear_fc2.weight") and i.offset[0] == 3
    )
    del table.storage_data[gone]
    file.write_bytes(pickle.dumps(table))

    with pytest.raises(
        WeightsError, match=r"linear_fc2.weight\[3\]: its 1 shards do not tile its shape"
    ):
        megatron_to_hf(checkpoint, tmp_path / "hf")

    (checkpoint / "release/__0_0.distcp").write_bytes(b"short")
    file.write_bytes(pickle.dumps(table))
    with pytest.raises(WeightsError, match="has 5 bytes, but its index points to"):
        megatron_to_hf(checkpoint, tmp_path / "hf")


class Planted:
    """What an attacker pickles: reading it calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def saved_by_torch(folder: Path) -> Path:
    """Writes a torch_dist checkpoint with torch's own writer: a tensor, and an object."""
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    planner = DefaultSavePlanner(flatten_state_dict=False)
    state = {"a": torch.arange(6.0).bfloat16(), "b._extra_state": {"plain": [1, "x"]}}
    save(state, storage_writer=FileSystemWriter(folder), planner=planner, no_dist=True)
    return folder


@pytest.mark.parametrize("where", ["metadata", "object"])
def test_resuming_runs_nothing_of_a_checkpoint(tmp_path: Path, where: str) -> None:
    """torch's reader calls what .metadata and the objects in the shards name, so this package's
    check comes before it.
    """
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    folder = saved_by_torch(tmp_path / "checkpoint")
    ran = tmp_path / "ran"

    def read() -> dict[str, Any]:
        state: dict[str, Any] = {"a": torch.zeros(6).bfloat16(), "b._extra_state": None}
        planner = DefaultLoadPlanner(flatten_state_dict=False)
        load(state, storage_reader=FileSystemReader(folder), planner=planner, no_dist=True)
        return state

    def guarded() -> dict[str, Any]:
        check_metadata(folder)
        with weights_only(folder):
            return read()

    # What an honest checkpoint holds is read as before, and the guard is gone afterwards.
    assert guarded()["a"].tolist() == [0, 1, 2, 3, 4, 5]
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ

    metadata = pickle.loads((folder / ".metadata").read_bytes())
    if where == "metadata":
        metadata.planner_data = Planted(os.mkdir, str(ran))
    else:
        stream = io.BytesIO()
        torch.save(Planted(os.mkdir, str(ran)), stream)
        (folder / "planted.distcp").write_bytes(stream.getvalue())
        for index, info in metadata.storage_data.items():
            if index.fqn == "b._extra_state":
                info.relative_path = "planted.distcp"
                info.offset = 0
                info.length = len(stream.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))

    with pytest.raises(WeightsError, match=r"names (posix|os)\.mkdir|not plain data"):
        guarded()
    assert not ran.exists()

    read()
    assert ran.exists(), "without the guard it runs, so that the test can fail"


@pytest.mark.parametrize(
    "payload",
    [
        b"ctorch.hub\nload\n.",
        b"cnumpy\nload\n.",
        b"cmegatron.core.utils\nx\n.",
        b"cbuiltins\ngetattr\n(cpathlib\nPosixPath\nS'unlink'\ntR.",
        b"cbuiltins\ngetattr\n(ctorch\nfloat32\nS'TO'\ntR.",
        b"cbuiltins\nsetattr\n.",
        b"cargparse\nNamespace\n.",
        b"ctorch\nload\n.",
        b"\x82\x01.",
        b"\x80\x04\x8c\x05torch\x8c\x08hub.load\x93.",
    ],
    ids=[
        "torch.hub",
        "numpy",
        "megatron",
        "method",
        "attribute-of-an-object",
        "setattr",
        "Namespace",
        "torch.load",
        "ext",
        "dotted",
    ],
)
def test_metadata_name_only_their_own_classes(tmp_path: Path, payload: bytes) -> None:
    """The check lists names, not packages: torch alone has a hundred ways to run something."""
    (tmp_path / ".metadata").write_bytes(payload)
    with pytest.raises(WeightsError, match=r"do not trust it|corrupt"):
        check_metadata(tmp_path)


def test_both_ways_to_pickle_a_member_of_an_enum_are_read(tmp_path: Path) -> None:
    """Python 3.11.2 pickles it as getattr(class, name), and 3.11.7 as class(value)."""
    enum = b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\n"
    for payload in (
        b"cbuiltins\ngetattr\n(" + enum + b"S'TORCH_CONTIGUOUS_FORMAT'\ntR.",
        enum + b"(I0\ntR.",
    ):
        (tmp_path / ".metadata").write_bytes(payload)
        check_metadata(tmp_path)


def test_metadata_of_one_rank_are_refused(tmp_path: Path) -> None:
    """torch falls back on them with pickle.load where it cannot read those of all ranks."""
    (tmp_path / ".metadata").write_bytes(pickle.dumps({}))
    check_metadata(tmp_path)
    (tmp_path / "__0.metadata").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(WeightsError, match=r"__0\.metadata beside \.metadata"):
        check_metadata(tmp_path)


def test_missing_metadata_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"cannot be read \(No such file"):
        check_metadata(tmp_path)
