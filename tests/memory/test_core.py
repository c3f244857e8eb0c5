"""The extension module `splitkern._core`: its value types, errors and stubs; what they compute is checked in C++."""

from __future__ import annotations

import ast
import copy
import enum
import gc
import inspect
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import splitkern
from splitkern import _core


def small_graph(**changes: Any) -> _core.Graph:
    """y = relu(conv(x, w)) and back, without the gradient of x."""
    storages = [
        _core.Storage(name="x", size_bytes=4096, kind=_core.StorageKind.INPUT),
        _core.Storage(name="w", size_bytes=1024, kind=_core.StorageKind.PARAMETER),
        _core.Storage(name="y", size_bytes=8192),
        _core.Storage(name="a", size_bytes=8192),
        _core.Storage(name="loss", size_bytes=4, is_output=True),
        _core.Storage(name="da", size_bytes=8192),
        _core.Storage(name="dy", size_bytes=8192),
        _core.Storage(name="dw", size_bytes=1024, kind=_core.StorageKind.GRADIENT),
    ]
    tensors = [
        _core.Tensor(name=s.name, storage=i, sizes=[s.size_bytes], strides_bytes=[1]) for i, s in enumerate(storages)
    ]
    pair = [_core.InplacePair(read=0, write=0)]
    operations = [
        _core.Operation(name="conv", target="conv2d", duration_us=10, reads=[0, 1], writes=[2]),
        _core.Operation(name="relu", target="relu", duration_us=1, reads=[2], writes=[3], inplace=pair),
        _core.Operation(name="mean", target="mean", duration_us=1, reads=[3], writes=[4]),
        _core.Operation(name="mean_backward", target="expand", duration_us=1, writes=[5], is_backward=True),
        _core.Operation(
            name="relu_backward", target="relu_backward", duration_us=1, reads=[5, 3], writes=[6], inplace=pair,
            is_backward=True,
        ),
        _core.Operation(
            name="conv_backward", target="conv2d_weight_grad", duration_us=10, reads=[6, 0], writes=[7],
            workspace_bytes=512, is_backward=True,
        ),
    ]  # fmt: skip
    parts = {"name": "small", "storages": storages, "tensors": tensors, "operations": operations}
    return _core.Graph(**(parts | changes))


VALUES = [
    _core.Storage(name="x", size_bytes=4096, kind=_core.StorageKind.INPUT),
    _core.Tensor(name="t", storage=1, offset_bytes=8, sizes=[2, 3], strides_bytes=[12, 4], element_bytes=4),
    _core.InplacePair(read=1, write=0),
    small_graph().operations[4],
    _core.Instance(operation=3, is_recomputation=True),
    _core.Residency(storage=-1, pool=_core.PoolKind.HOST, size_bytes=512, begin=1, end=2),
    _core.Copy(kind=_core.CopyKind.PREFETCH, storage=2, source=1, destination=3, issue=4, wait=6, after=[0]),
    _core.Boundary(waits=[1], issues=[2, 3]),
    _core.PlanStorage(size_bytes=5, members=[1, 2]),
    _core.Compression(ratio=1.5, element_bytes=4),
    _core.FusedSum(sum=3, producer=2),
    _core.Predicted(step_us=1.5, device_peak_bytes=1024),
    _core.Buffer(begin=0, end=4, size_bytes=16),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_value_types(value: Any) -> None:
    names = {"StorageKind": _core.StorageKind, "PoolKind": _core.PoolKind, "CopyKind": _core.CopyKind}
    # The text of an enumerator is not Python; everything else in a repr is.
    text = repr(value)
    for kind in names.values():
        for member in kind:
            text = text.replace(repr(member), str(member))
    assert eval(text, vars(_core)) == value
    assert pickle.loads(pickle.dumps(value)) == value
    assert copy.copy(value) == value
    field = next(name for name, attribute in vars(type(value)).items() if isinstance(attribute, property))
    with pytest.raises(AttributeError):
        setattr(value, field, 0)
    with pytest.raises(AttributeError):
        value.something_else = 0
    with pytest.raises(TypeError):
        type(value)(1)  # by position


def test_equality_sees_every_field() -> None:
    for value in VALUES:
        fields = [name for name, attribute in vars(type(value)).items() if isinstance(attribute, property)]
        given = {name: getattr(value, name) for name in fields}
        for name in fields:
            old = given[name]
            if isinstance(old, enum.Enum):
                new: Any = next(member for member in type(old) if member is not old)
            elif isinstance(old, tuple):
                new = () if old else ([1] if name != "inplace" else [_core.InplacePair()])
            elif old is None:
                new = _core.Compression()
            else:
                new = old + "!" if isinstance(old, str) else (not old if isinstance(old, bool) else old + 1)
            assert type(value)(**(given | {name: new})) != value, name
        assert type(value)(**given) == value


def test_a_graph_is_checked_when_it_is_made() -> None:
    graph = small_graph()
    assert repr(graph) == "Graph(name='small', 6 operations, 8 tensors, 8 storages)"
    assert graph.operations is graph.operations, "made once, however often it is asked for"
    with pytest.raises(_core.InvalidArgument, match="operations"):
        small_graph(operations=graph.operations[1:])  # reads y before it is written
    with pytest.raises(ValueError, match="size_bytes"):
        small_graph(storages=[_core.Storage(name="x", size_bytes=-1), *graph.storages[1:]])
    with pytest.raises(AttributeError, match="frozen"):
        graph.name = "other"


def test_json_round_trips_and_names_the_place_of_an_error() -> None:
    graph = small_graph()
    assert _core.Graph.from_json(graph.to_json()) == graph
    assert _core.Graph.from_json(graph.to_json()).fingerprint == graph.fingerprint
    with pytest.raises(_core.ParseError) as caught:
        _core.Graph.from_json(graph.to_json()[:200])
    assert caught.value.line >= 1
    assert caught.value.column >= 1
    with pytest.raises(_core.InvalidArgument):
        _core.Graph.from_json(graph.to_json().replace('"size_bytes": 4096', '"size_bytes": 1'))


@pytest.mark.parametrize("strategy", _core.strategy_names())
def test_a_plan_is_valid_and_round_trips(strategy: str) -> None:
    graph = small_graph()
    limits = _core.Limits(offload_gbps=1, prefetch_gbps=1)
    plan = _core.plan(graph, limits, strategy=strategy)
    _core.validate(graph, plan)
    assert plan == _core.plan(graph, limits, strategy=strategy)
    assert _core.Plan.from_json(plan.to_json()) == plan
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert plan.limits.device_bytes is None
    timeline = _core.simulate(graph, plan)
    assert timeline.step_us == pytest.approx(plan.predicted.step_us)
    assert len(timeline.instances) == len(plan.instances)


def test_a_wrong_plan_is_refused_with_the_reason() -> None:
    graph = small_graph()
    plan = _core.plan(graph, _core.Limits(), strategy="none")
    with pytest.raises(_core.InvalidPlan) as caught:
        _core.validate(small_graph(operations=graph.operations[:-1], storages=graph.storages), plan)
    assert caught.value.reason == caught.value.violations[0].reason
    assert isinstance(caught.value, ValueError)
    assert _core.find_violations(graph, plan) == []


def test_infeasible_says_what_would_do() -> None:
    graph = small_graph()
    with pytest.raises(_core.Infeasible) as caught:
        _core.plan(graph, _core.Limits(device_bytes=10_000))
    error = caught.value
    assert (error.pool, error.budget_bytes) == ("device", 10_000)
    assert error.smallest_feasible_bytes > 10_000
    _core.validate(graph, _core.plan(graph, _core.Limits(device_bytes=error.smallest_feasible_bytes)))
    with pytest.raises(_core.Infeasible):
        _core.plan(graph, _core.Limits(device_bytes=error.smallest_feasible_bytes - 1))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"alignment_bytes must be a power of two, got 3"):
        _core.Limits(alignment_bytes=3)
    with pytest.raises(ValueError, match="strategy"):
        _core.plan(small_graph(), _core.Limits(), strategy="magic")
    with pytest.raises(_core.ParseError, match="line 2"):
        _core.read_minimalloc_csv("id,lower,upper,size\na,5,3,1\n")
    with pytest.raises(ValueError, match="size"):
        _core.place([_core.Buffer(begin=0, end=1, size_bytes=-1)])


def test_placement() -> None:
    buffers = _core.perfect_packing(buffers=12, height_bytes=4096, seed=3)
    placed = _core.place(buffers)
    assert placed.lower_bound_bytes == placed.peak_bytes == 4096 == _core.lower_bound_bytes(buffers)
    text = _core.write_minimalloc_csv(
        _core.MinimallocCsv(ids=[f"b{i}" for i in range(12)], buffers=buffers, offsets=placed.offsets)
    )
    assert _core.read_minimalloc_csv(text).offsets == placed.offsets


def chain(layers: int) -> _core.Graph:
    """A chain of operations whose results all come back in backward."""
    kinds = [_core.StorageKind.INPUT, *[_core.StorageKind.ACTIVATION] * (2 * layers + 1)]
    storages = [
        _core.Storage(name=f"s{i}", size_bytes=512 * (1 + i * 7 % 13), kind=kind, is_output=i == 2 * layers + 1)
        for i, kind in enumerate(kinds)
    ]
    tensors = [
        _core.Tensor(name=s.name, storage=i, sizes=[s.size_bytes], strides_bytes=[1]) for i, s in enumerate(storages)
    ]
    forward = [
        _core.Operation(name=f"f{i}", target="conv2d", duration_us=1 + i * 5 % 7, reads=[i], writes=[i + 1])
        for i in range(layers)
    ]
    backward = [
        _core.Operation(
            name=f"b{i}", target="conv2d_input_grad", duration_us=1 + i * 5 % 7, is_backward=True,
            reads=[layers + i, layers - i], writes=[layers + i + 1],
        )
        for i in range(layers + 1)
    ]  # fmt: skip
    return _core.Graph(name="chain", storages=storages, tensors=tensors, operations=[*forward, *backward])


def test_planning_lets_other_threads_run() -> None:
    """A thread that plans holds no lock of the interpreter: this one sees it at work."""
    graph = chain(6000)
    everything = _core.plan(graph, _core.Limits(), strategy="none").predicted.device_peak_bytes
    limits = _core.Limits(device_bytes=everything // 3, offload_gbps=0.5, prefetch_gbps=0.5)
    begun, ended = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        _core.plan(graph, limits, search_effort=1000)
        ended.set()

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait()
    time.sleep(0.02)  # with the lock held, this thread would wake up after the other's end
    assert not ended.is_set()
    thread.join()
    assert ended.is_set()


# --- the pool -------------------------------------------------------------------------------------


def test_pool() -> None:
    pool = _core.Pool.host(limit_bytes=1 << 20, tracks=True)
    address = pool.allocate(1000, tag="scratch")
    assert pool.statistics.dynamic.current_bytes == 1024
    assert "scratch" in pool.leak_report()
    with pool.reserve(4096) as arena:
        assert arena.slot(512, 512) == arena.base + 512
        arena.touch(512, 512)
        assert arena.touched_bytes == 1024
        with pytest.raises(ValueError, match="4096"):
            arena.slot(4000, 512)
    assert arena.is_released
    with pytest.raises(_core.OutOfMemory) as caught:
        pool.allocate(1 << 21)
    assert isinstance(caught.value, MemoryError)
    assert (caught.value.asked_bytes, caught.value.limit_bytes) == (1 << 21, 1 << 20)
    with pytest.raises(ValueError, match="inside an allocation"):
        pool.free(address + 8)
    pool.free(address)
    with pytest.raises(ValueError, match="freed"):
        pool.free(address)
    assert pool.statistics.all.current_bytes == 0


def test_the_failure_callback_can_make_room() -> None:
    pool = _core.Pool.host(limit_bytes=4096, block_bytes=4096)
    kept = [pool.allocate(4096)]
    asked = []

    def make_room(needed_bytes: int) -> bool:
        asked.append(needed_bytes)
        if not kept:
            return False
        pool.free(kept.pop())
        return True

    pool.set_failure_callback(make_room)
    pool.free(pool.allocate(2048))
    assert asked == [2048]


def test_a_pool_over_functions_of_python() -> None:
    blocks: dict[int, bytearray] = {}

    def allocate(size_bytes: int, alignment_bytes: int) -> int:
        import ctypes

        if size_bytes > 1 << 16:
            raise MemoryError("the framework has no more")
        block = bytearray(size_bytes + alignment_bytes)
        begin = ctypes.addressof(ctypes.c_char.from_buffer(block))
        address = -(-begin // alignment_bytes) * alignment_bytes
        blocks[address] = block
        return address

    def free(address: int, size_bytes: int) -> None:
        del blocks[address]

    pool = _core.Pool.from_functions(allocate, free, block_bytes=4096)
    address = pool.allocate(100)
    assert len(blocks) == 1
    with pytest.raises(_core.OutOfMemory, match="the framework has no more"):
        pool.allocate(1 << 17)
    pool.free(address)
    assert pool.trim() > 0
    assert not blocks
    pool.allocate(100)
    del pool
    gc.collect()
    assert not blocks


def test_a_leak_is_reported_at_the_end() -> None:
    pool = _core.Pool.host(tracks=True)
    found: list[str] = []
    pool.set_leak_callback(lambda leaked: found.extend(allocation.tag for allocation in leaked))
    pool.allocate(8, tag="forgotten")
    del pool
    gc.collect()
    assert found == ["forgotten"]


# --- the stub -------------------------------------------------------------------------------------


def test_the_stub_names_what_is_there() -> None:
    stub = Path(splitkern.__file__).with_name("_core.pyi")
    described: dict[str, set[str]] = {}
    for node in ast.parse(stub.read_text()).body:
        if isinstance(node, ast.ClassDef):
            members = {
                item.name for item in node.body if isinstance(item, ast.FunctionDef) and not item.name.startswith("__")
            }
            members |= {t.id for item in node.body if isinstance(item, ast.Assign) for t in item.targets}  # type: ignore[attr-defined]
            members |= {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}  # type: ignore[union-attr]
            described[node.name] = members
        elif isinstance(node, ast.FunctionDef):
            described[node.name] = set()
    there: dict[str, set[str]] = {}
    for name, value in vars(_core).items():
        if name.startswith("_"):
            continue
        members = set()
        if inspect.isclass(value) and issubclass(value, enum.Enum):
            members = set(value.__members__)
        elif inspect.isclass(value) and not issubclass(value, BaseException):
            members = {member for member in vars(value) if not member.startswith("_")}
        there[name] = members
    assert set(described) == set(there)
    for name, value in vars(_core).items():
        if name in there and not (inspect.isclass(value) and issubclass(value, BaseException)):
            assert described[name] == there[name], name


def test_everything_has_a_docstring() -> None:
    for name, value in vars(_core).items():
        if not name.startswith("_"):
            assert value.__doc__, name
