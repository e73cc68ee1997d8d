"""Arrays on a device, described where they lie, by each interface that there is."""

import ctypes
import gc
import sys
import types

import numpy as np
import pytest

from fastnorm import _cuda

pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
from . import libraries
from .capsules import Deleter, DLTensor, Exporter, new_capsule
from .libraries import BFLOAT16, Interface, Tensor, address, memory

TYPES = {"float32": np.float32, "float64": np.float64, "float16": np.float16, "bfloat16": BFLOAT16}


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch, driver):
    libraries.install(monkeypatch)


@pytest.fixture(params=sorted(libraries.KINDS))
def kind(request):
    return libraries.KINDS[request.param]


# ---- every kind ----


@pytest.mark.parametrize("dtype", TYPES)
def test_what_is_said_of_an_array(kind, dtype):
    array = memory((3, 5), TYPES[dtype])
    found = _cuda.describe("x", kind(array))
    assert found.name == "x"
    assert found.address == address(array)
    assert (found.shape, found.strides, found.ndim, found.size) == ((3, 5), None, 2, 15)
    assert (found.dtype, found.itemsize) == (dtype, array.itemsize)
    assert found.nbytes == array.nbytes
    assert (found.device, found.readonly, found.alignment) == (0, False, 16)
    assert found.owner.memory is array


def test_kinds_and_which_can_make_results(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba.cuda", types.ModuleType("numba.cuda"))
    array = memory((2,), np.float32)
    said = {name: _cuda.describe("x", kind(array)) for name, kind in libraries.KINDS.items()}
    assert {name: found.kind for name, found in said.items()} == {
        "torch": "torch", "cupy": "cupy", "numba": "numba", "interface": "cai", "dlpack": "dlpack",
    }  # fmt: skip
    assert [name for name, found in said.items() if found.can_make] == ["torch", "cupy", "numba"]


@pytest.mark.parametrize(
    ("key", "strides"),
    [
        (np.s_[::2], (16, 1)),
        (np.s_[:, 1:5], (8, 1)),
        (np.s_[:, ::3], (8, 3)),
        (np.s_[1:2, ::2], (8, 2)),
        (np.s_[1:2, 2:6], None),  # one row: its distance to the next counts for nothing
        (np.s_[:0, ::2], None),
        (np.s_[3:], None),
    ],
)
def test_strides_are_in_elements(kind, key, strides):
    array = memory((6, 8), np.float16)[key]
    found = _cuda.describe("x", kind(array))
    assert found.shape == array.shape
    assert found.strides == strides
    assert found.address == address(array)


@pytest.mark.parametrize("kind", [Interface, libraries.ndarray])
def test_strides_may_be_negative(kind):
    array = memory((6, 8), np.float32)[::-1]
    assert _cuda.describe("x", kind(array)).strides == (-8, 1)


@pytest.mark.parametrize("offset", range(9))
def test_alignment(kind, offset):
    array = memory((4,), np.float16, offset)
    found = _cuda.describe("x", kind(array))
    assert found.alignment == np.gcd(16, address(array) % 16 or 16)


def test_scalars_and_many_dimensions(kind):
    assert _cuda.describe("x", kind(memory((), np.float32))).shape == ()
    assert _cuda.describe("x", kind(memory((1,) * 16, np.float32))).ndim == 16
    with pytest.raises(TypeError, match=r"^x: got 17 dimensions, wanted at most 16"):
        _cuda.describe("x", kind(memory((1,) * 17, np.float32)))


def test_other_types_are_refused(kind):
    with pytest.raises(TypeError, match=r"^weight: got .*wanted float32, float64, float16 or bf"):
        _cuda.describe("weight", kind(memory((3,), np.int64)))


def test_bits(kind):
    """uint16 may be bfloat16, if the call says so; torch calls it otherwise."""
    if kind is Tensor:
        pytest.skip("the stand-in for torch has no uint16")
    assert _cuda.describe("x", kind(memory((3,), np.uint16))).dtype == "uint16"


def test_nothing_is_kept_of_a_described_array(kind):
    value = kind(memory((3, 5), np.float32))
    _cuda.describe("x", value)
    before = sys.getrefcount(value), sys.getrefcount(value.memory)
    for _ in range(100):
        _cuda.describe("x", value)
    assert (sys.getrefcount(value), sys.getrefcount(value.memory)) == before


def test_only_arrays_on_a_device_are_device_arrays(kind):
    assert _cuda.is_device_array(kind(memory((3,), np.float32)))
    others = (None, True, 1, 1.0, "x", (1,), [1], np.ones(3), np.float32(1), np.dtype("f4"))
    more = (object(), memoryview(b"abc"), libraries.CPUTensor(memory((3,), np.float32)))
    for other in (*others, *more):
        assert not _cuda.is_device_array(other)


@pytest.mark.parametrize("value", [None, 3, np.ones(3), [1.0], "x"])
def test_what_is_no_device_array(value):
    with pytest.raises(TypeError, match=r"^x: got .*wanted an array on a CUDA device"):
        _cuda.describe("x", value)


def test_types_without_end_are_not_all_kept():
    """A type in the table would live for ever: there is a bound."""
    import weakref

    made = []
    for _ in range(200):
        new = type("Array", (Interface,), {})
        assert _cuda.is_device_array(new(memory((2,), np.float32)))
        made.append(weakref.ref(new))
    del new
    gc.collect()
    assert sum(ref() is not None for ref in made) <= 64


# ---- overlap ----


def relation(a, b):
    return _cuda.overlap(_cuda.describe("a", Interface(a)), _cuda.describe("b", Interface(b)))


def test_overlap():
    array = memory((8, 8), np.float32)
    assert relation(array, array) == "same"
    assert relation(array[:4], array[4:]) == "apart"
    assert relation(array[:5], array[4:]) == "overlap"
    assert relation(array[::2], array[1::2]) == "overlap"  # as far as the ends tell
    assert relation(array[::-1], array) == "overlap"
    assert relation(array[:4], array[3::-1]) == "overlap"
    assert relation(array[4:], array[3::-1]) == "apart"
    assert relation(array, array.reshape(64)) == "overlap"
    assert relation(array, array.view(np.uint16)) == "overlap"
    assert relation(array[:0], array) == "apart"
    assert relation(array[:1, ::2], array[:1, ::2]) == "same"


# ---- torch ----


def test_tensors_that_have_no_place_here():
    def refused(words, **attributes):
        tensor = type("Sub", (Tensor,), attributes)(memory((3,), np.float32))
        with pytest.raises(TypeError, match=words):
            _cuda.describe("x", tensor)

    refused("^x: got a tensor that requires grad, wanted x.detach", requires_grad=True)
    refused(
        r"^x: got a tensor that is a lazy view, wanted x.resolve_neg\(\)", is_neg=lambda s: True
    )
    refused("^x: got a tensor that is nested, wanted a dense one", is_nested=True)
    refused("^x: got a tensor that is sparse, wanted a dense one", layout="sparse")
    refused("^x: got a Sub on device cpu, wanted one on a CUDA device", is_cuda=False, device="cpu")

    def fail(self):
        raise RuntimeError("it has no storage\nat file.cpp")

    refused(r"^x: got a Sub .* has no plain memory.*\(it has no storage\)$", data_ptr=fail)


def test_current_streams_of_torch_and_cupy():
    for kind in (Tensor, libraries.ndarray):
        libraries.STREAMS.update({0: 7, 1: 9})
        assert _cuda.describe("x", kind(memory((3,), np.float32), device=0)).stream == 7
        assert _cuda.describe("x", kind(memory((3,), np.float32), device=1)).stream == 9
        assert _cuda.describe("x", kind(memory((3,), np.float32), device=1)).device == 1
        libraries.STREAMS[0] = 1  # another name of the default stream
        assert _cuda.describe("x", kind(memory((3,), np.float32))).stream == 0


def test_torch_without_its_short_way_to_the_stream(monkeypatch):
    torch = types.ModuleType("torch")
    torch.Tensor = type("Tensor", (Tensor,), {"dtype": "f4"})
    torch.strided, torch.float32 = "strided", "f4"
    torch.cuda = types.SimpleNamespace(
        current_stream=lambda device: types.SimpleNamespace(cuda_stream=40 + device)
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert _cuda.describe("x", torch.Tensor(memory((3,), np.float32), 1)).stream == 41


# ---- __cuda_array_interface__ ----


class Described:
    """An array that says of itself what a test wants."""

    def __init__(self, array, **changed):
        said = libraries._interface(array) | changed
        self.memory = array
        self.__cuda_array_interface__ = {k: v for k, v in said.items() if v != "missing"}


def test_versions_and_what_may_be_missing():
    array = memory((3, 5), np.float32)
    assert _cuda.describe("x", Described(array, version=2, stream="missing")).stream is None
    assert _cuda.describe("x", Described(array, strides=None)).strides is None
    assert _cuda.describe("x", Described(array, strides="missing")).strides is None
    for version in (0, 1, "missing"):
        with pytest.raises(TypeError, match=r"^x: got version .* wanted 2 or later"):
            _cuda.describe("x", Described(array, version=version))


@pytest.mark.parametrize(("stream", "known"), [(None, None), (1, 0), (2, 2), (4096, 4096)])
def test_streams(stream, known):
    array = Described(memory((3,), np.float32), stream=stream)
    assert _cuda.describe("x", array).stream == known


@pytest.mark.parametrize("stream", [0, -1])
def test_streams_that_could_be_two(stream):
    with pytest.raises(ValueError, match=rf"^x: got stream {stream} .*wanted None, 1"):
        _cuda.describe("x", Described(memory((3,), np.float32), stream=stream))


def test_what_an_interface_may_not_say():
    array = memory((3, 5), np.float32)
    with pytest.raises(TypeError, match=r"^x: got a masked array"):
        _cuda.describe("x", Described(array, mask=1))
    with pytest.raises(ValueError, match=r"^x: got a stride of 6 bytes, wanted a multiple of 4"):
        _cuda.describe("x", Described(array, strides=(20, 6)))
    with pytest.raises(ValueError, match=r"^x: got 1 strides for 2 dimensions"):
        _cuda.describe("x", Described(array, strides=(20,)))
    with pytest.raises(ValueError, match=r"^x: got a length of -3"):
        _cuda.describe("x", Described(array, shape=(-3, 5)))
    with pytest.raises(ValueError, match=r"^x: got an array without memory"):
        _cuda.describe("x", Described(array, data=(0, False)))
    for typestr in (">f4", "<c8", "|V2", "<V2", "<i4"):
        with pytest.raises(TypeError, match=r"^x: got an array of type .*wanted float32"):
            _cuda.describe("x", Described(array, typestr=typestr))


def test_readonly_and_empty():
    array = memory((3, 5), np.float32)
    assert _cuda.describe("x", Described(array, data=(address(array), True))).readonly
    empty = _cuda.describe("x", Described(array, shape=(0, 5), strides=None, data=(0, False)))
    assert (empty.size, empty.address, empty.alignment) == (0, 0, 16)


def test_the_device_of_memory_that_comes_without_one(driver):
    array = memory((3,), np.float32)
    assert _cuda.describe("x", Interface(array)).device == 0
    driver.place(address(array), 1)
    assert _cuda.describe("x", Interface(array)).device == 1
    driver.place(address(array), -1)
    with pytest.raises(ValueError, match=r"^x: got the address 0x.*does not know as memory of"):
        _cuda.describe("x", Interface(array))


# ---- DLPack ----


@pytest.mark.parametrize("versioned", [False, True])
def test_capsules_are_given_back_once(versioned):
    array = memory((3, 5), np.float32)
    owner = Exporter(array, versioned=versioned)
    found = _cuda.describe("x", owner)
    assert (found.address, found.shape, found.strides) == (address(array), (3, 5), None)
    assert (owner.exported, owner.deleted) == (1, 0)
    del found
    assert (owner.exported, owner.deleted) == (1, 1)
    assert owner.streams == [1]  # the default stream: there is no other here


@pytest.mark.parametrize("versioned", [False, True])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"code": 0}, "got dtype DLPack type code 0, 32 bits"),
        ({"bits": 8}, "got dtype DLPack type code 2, 8 bits"),
        ({"lanes": 4}, "got dtype DLPack type code 2, 32 bits, 4 lanes"),
        ({"code": 4}, "got dtype DLPack type code 4, 32 bits"),
        ({"ndim": 17}, "got 17 dimensions"),
        ({"device": 1}, "got a Exporter on a device of DLPack|got a Exporter on device"),
        ({"data": 0}, "got an array without memory"),
    ],
)
def test_capsules_are_given_back_after_an_error(versioned, change, words):
    owner = Exporter(memory((3, 5), np.float32), versioned=versioned)
    where = owner.struct.tensor
    for name, value in change.items():
        setattr(where, name, value)
    del owner.device
    type(owner).device = (2, 0)  # what __dlpack_device__ says, and what others see
    try:
        with pytest.raises((TypeError, ValueError), match=f"^x: ({words})"):
            _cuda.describe("x", owner)
    finally:
        del type(owner).device
    assert (owner.exported, owner.deleted) == (1, 1)


def test_a_newer_layout_is_given_back_unread():
    owner = Exporter(memory((3,), np.float32), major=2)
    with pytest.raises(TypeError, match=r"^x: got a Exporter that exports DLPack 2.0, wanted 1"):
        _cuda.describe("x", owner)
    assert (owner.exported, owner.deleted) == (1, 1)


def test_what_a_capsule_says():
    array = memory((6, 8), np.float16)
    assert _cuda.describe("x", Exporter(array[:, ::2])).strides == (8, 2)
    null = Exporter(array)
    null.struct.tensor.strides = None
    assert _cuda.describe("x", null).strides is None
    assert _cuda.describe("x", Exporter(array, offset=64)).address == address(array) + 64
    assert _cuda.describe("x", Exporter(array, flags=1)).readonly
    assert not _cuda.describe("x", Exporter(array, flags=2)).readonly  # a copy, which is no matter
    assert _cuda.describe("x", Exporter(array, code=4)).dtype == "bfloat16"
    assert _cuda.describe("x", Exporter(array, code=1)).dtype == "uint16"
    assert _cuda.describe("x", Exporter(array, device=(13, 1))).device == 1


def test_no_deleter():
    owner = Exporter(memory((3,), np.float32))
    owner.struct.deleter = Deleter()
    del owner.deleter
    assert _cuda.describe("x", owner).size == 3


def test_exports_that_fail():
    class Failing(Exporter):
        def __dlpack__(self, **options):
            raise BufferError("it is busy")

    with pytest.raises(TypeError, match=r"^x: got a Failing that does not export .*it is busy"):
        _cuda.describe("x", Failing(memory((3,), np.float32)))

    class Used(Exporter):
        def __dlpack__(self, **options):
            return new_capsule(1, b"used_dltensor", None)

    class Odd(Exporter):
        def __dlpack__(self, **options):
            return 3

    for kind in (Used, Odd):
        with pytest.raises(TypeError, match=r"^x: got a .* no fresh DLPack capsule"):
            _cuda.describe("x", kind(memory((3,), np.float32)))

    class Unknown(Exporter):
        def __dlpack__(self, **options):
            raise OSError("not an error of DLPack's")

    with pytest.raises(OSError, match="not an error"):
        _cuda.describe("x", Unknown(memory((3,), np.float32)))


def test_exporters_from_before_versions_are_asked_once_without():
    asked = []

    class Old(Exporter):
        def __dlpack__(self, **options):
            asked.append(sorted(options))
            if "max_version" in options:
                raise TypeError("unexpected keyword")
            return super().__dlpack__(max_version=0, **options)

    owner = Old(memory((3,), np.float32), versioned=False)
    for _ in range(3):
        _cuda.describe("x", owner)
    assert asked == [["max_version", "stream"], ["stream"], ["stream"], ["stream"]]
    assert owner.settled()


# ---- the exchange of DLPack 1.2: functions in C, and no capsule ----


def exchanging(tensor_of, stream=77, major=1, base=object):
    """A type that offers the table; `tensor_of(object)` fills a DLTensor."""
    from_object = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(DLTensor))
    current = ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.c_int, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p)
    )

    class Table(ctypes.Structure):
        _fields_ = (
            ("major", ctypes.c_uint32),
            ("minor", ctypes.c_uint32),
            ("previous", ctypes.c_void_p),
            ("unused", ctypes.c_void_p * 3),
            ("tensor", from_object),
            ("stream", current),
        )

    def fill(value, into):
        into[0] = tensor_of(value)
        return 0

    def current_stream(kind, ordinal, into):
        assert kind == 2
        into[0] = stream + ordinal
        return 0

    table = Table(
        major, 3, None, (ctypes.c_void_p * 3)(), from_object(fill), current(current_stream)
    )
    capsule = new_capsule(ctypes.addressof(table), b"dlpack_exchange_api", None)
    return type("Exchanging", (base,), {"__dlpack_c_exchange_api__": capsule, "table": table})


class _Owner(Exporter):
    def __dlpack__(self, **options):
        raise AssertionError("the table was there")


def test_the_exchange_table_is_preferred():
    kind = exchanging(lambda owner: owner.struct.tensor, base=_Owner)
    array = memory((3, 5), np.float32)
    found = _cuda.describe("x", kind(array, device=(2, 1)))
    assert (found.address, found.shape, found.device) == (address(array), (3, 5), 1)
    assert found.stream == 78
    with pytest.raises(TypeError, match=r"^x: got dtype"):
        _cuda.describe("x", kind(array, code=0))


def test_tables_of_another_version_are_left_alone():
    kind = exchanging(None, major=2, base=Exporter)
    owner = kind(memory((3,), np.float32))
    _cuda.describe("x", owner)
    assert owner.exported == owner.deleted == 1


def test_subclasses_are_asked_by_their_methods():
    kind = type("Sub", (exchanging(None, base=Exporter),), {})
    owner = kind(memory((3,), np.float32))
    _cuda.describe("x", owner)
    assert owner.exported == owner.deleted == 1


def test_the_table_of_torch_itself():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if isinstance(torch, types.ModuleType) and torch is libraries.MODULES["torch"]:
        pytest.skip("torch is not installed")
    tensor = torch.ones(3)
    assert not _cuda.is_device_array(tensor)
    with pytest.raises(TypeError, match=r"^x: got a Tensor on device cpu, wanted one on a CUDA"):
        _cuda.describe("x", tensor)
