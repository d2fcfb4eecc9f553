"""data.inert_pickle: rows as pickle would read them, and nothing ever runs."""

import builtins
import io
import os
import pickle
import random
import shutil
import struct
import time
from collections import OrderedDict

import numpy as np
import pytest
import torch

from megatron_cogview.configs.errors import DataError
from megatron_cogview.data import inert_pickle
from megatron_cogview.data.inert_pickle import loads

PROTOCOLS = range(6)
INTEGER_TYPES = ["i1", "u1", "<i2", ">i2", "<u2", "<i4", ">i4", "<u4", "<i8", ">i8", "<u8", ">u8"]
CODES = np.arange(1024, dtype=np.int64) * 7 % 8192
ROWS = {
    "array": CODES,
    "grid": CODES.reshape(32, 32).astype(np.int32),
    "fortran": np.asfortranarray(CODES.reshape(32, 32)),
    "text and codes": ("a 猫 on the mat\n\\u0041", CODES),
    "ids and codes": (CODES[:5].astype(">i4"), CODES.astype("<u2")),
    "shared": (CODES, CODES, [CODES, "x", "x"]),
    "list": list(range(8000, 9089)),
    "nested": [[1, -2], (3, [None, True, False]), (), [], (1, 2), (1, 2, 3), (1, 2, 3, 4)],
    "scalars": (np.int64(-5), np.uint8(7), np.int32(8)),
    "integers": [0, 1, -1, 255, 256, 65_536, -(2**31), 2**31, 2**62, -(2**63), 2**64 - 1],
    "empty": np.empty(0, dtype=np.int32),
    "bytes": (b"", b"\x00\xff", b"x" * 300),
    "text": "y" * 300,
}


def same(left, right):
    """Equal, with arrays equal in type (but for byte order), shape and content."""
    if isinstance(right, np.ndarray):
        return (
            isinstance(left, np.ndarray)
            and left.dtype.newbyteorder("=") == right.dtype.newbyteorder("=")
            and left.shape == right.shape
            and bool((left == right).all())
        )
    if isinstance(right, tuple | list):
        return (
            type(left) is type(right)
            and len(left) == len(right)
            and all(same(a, b) for a, b in zip(left, right, strict=True))
        )
    return bool(left == right)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", ROWS)
def test_reads_what_pickle_wrote(name, protocol):
    assert same(loads(pickle.dumps(ROWS[name], protocol)), ROWS[name])


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("code", INTEGER_TYPES)
def test_every_integer_type_and_byte_order(code, protocol):
    array = np.array([[0, 1, 100], [2, 3, 127]], dtype=code)
    assert same(loads(pickle.dumps(array, protocol)), array)
    assert loads(pickle.dumps(array, protocol)).dtype == array.dtype
    array.flags.writeable = False
    assert same(loads(pickle.dumps(array, protocol)), array)


def test_names_of_older_numpy_are_known():
    """NumPy before 2 wrote numpy.core, and before 1.20 the flags of a type as 0 and 1."""
    old = pickle.dumps(CODES, 2).replace(b"numpy._core", b"numpy.core")
    assert same(loads(old), CODES)
    older = old.replace(b"\x89\x88\x87", b"K\x00K\x01\x87")
    assert older != old
    assert same(loads(older), CODES)
    buffered = pickle.dumps(CODES, 5)
    renamed = buffered.replace(b"\x8c\x13numpy._core.numeric", b"\x8c\x12numpy.core.numeric")
    frame = struct.pack("<Q", len(renamed) - 11)
    assert same(loads(renamed[:3] + frame + renamed[11:]), CODES)


def test_hostile_rows_are_named_and_not_run(tmp_path):
    """Pickles that would make a file when read: the file is not there afterwards."""
    target = tmp_path / "made"
    command = f"touch {target}"

    class Payload:
        def __init__(self, *call):
            self.call = call

        def __reduce__(self):
            return self.call

    calls = {
        f"{os.system.__module__}.system": (os.system, (command,)),
        "builtins.eval": (builtins.eval, (f"open({str(target)!r}, 'w')",)),
        "builtins.exec": (builtins.exec, (f"open({str(target)!r}, 'w')",)),
        "io.open": (io.open, (str(target), "w")),
        "shutil.copy": (shutil.copy, (__file__, str(target))),
        "builtins.getattr": (getattr, ("text", "upper")),
    }
    for protocol in PROTOCOLS:
        for name, call in calls.items():
            for row in (Payload(*call), (CODES, Payload(*call)), ["x", [Payload(*call)]]):
                data = pickle.dumps(row, protocol)
                shown = name.replace("builtins.", "__builtin__.") if protocol < 3 else name
                with pytest.raises(DataError) as caught:
                    loads(data)
                assert shown in str(caught.value)
                assert "not run" in str(caught.value)
    assert not target.exists()


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"cos\nsystem\n(S'touch made'\ntR.", "os.system"),
        (b"(S'touch made'\nios\nsystem\n.", "Python 2"),
        (b"(ios\nsystem\n.", "os.system"),
        (b"cnumpy\nndarray\n(ios\nsystem\n.", "os.system"),
        (b"(cos\nsystem\nVtouch made\no.", "os.system"),
        (b"(cnumpy\nndarray\nVtouch made\no.", "OBJ"),
        (b"\x80\x02cnumpy\nndarray\n)\x81.", "NEWOBJ"),
        (b"\x80\x02ccopy_reg\n_reconstructor\n.", "copy_reg._reconstructor"),
        (b"\x80\x02c_codecs\nencode\n(Vabc\nVrot13\ntR.", "encode"),
        (b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x01a\x85R.", "posix.system"),
        (b"\x80\x04\x8c\x05numpy\x8c\x04load\x93.", "numpy.load"),
        (b"cnumpy\nndarray\n.", "the bare name ndarray"),
        (b"\x82\x01.", "registered number"),
        (b"Pname\n.", "another file"),
        (b"\x80\x05\x97.", "outside the pickle"),
        (b"\x80\x06N.", "protocol 6"),
        (b"\\x6eumpy\nndarray\n.", "damaged"),
        (b"c\\x6eumpy\nndarray\n.", "GLOBAL"),
        (b"", "damaged"),
        (b".", "damaged"),
        (b"N", "damaged"),
        (b"N.N", "after its end"),
        (b"(N.", "not one value"),
        (b"NN.", "not one value"),
        (b"I010\n.", "decimal"),
        (b"I1_0\n.", "decimal"),
        (b"L01\n.", "decimal"),
        (b"h\x05.", "unknown reference"),
        (b"Nr\xff\xff\xff\x00.", "impossible number"),
        (b"Np-1\n.", "impossible number"),
        (b"a.", "damaged"),
        (b"\x80\x04\x95\xff\x00\x00\x00\x00\x00\x00\x00N.", "do not end"),
        (b"\x80\x04\x95\x01\x00\x00\x00\x00\x00\x00\x00K\x01.", "inside an opcode"),
        (b"\x80\x04\x95\x01\x00\x00\x00\x00\x00\x00\x00M\x01\x01.", "inside an opcode"),
        (b"B\xff\xff\xff\x7fabc.", "damaged"),
        (b"\x8e\xff\xff\xff\xff\xff\xff\xff\xffabc.", "damaged"),
    ],
)
def test_what_is_found_is_named(data, found):
    with pytest.raises(DataError, match=found):
        loads(data)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        pytest.param(1 << 100_000, "integer of 100001 bits", id="large integer"),
        (torch.arange(3), r"torch tensor \(torch\._utils\._rebuild_tensor_v2\).*numpy\(\)"),
        ({"a": 1}, "a dict"),
        ({1}, "set"),
        (frozenset([1]), "set"),
        (1.5, "a float"),
        (OrderedDict(), "OrderedDict"),
        (np.array([1.0]), "NumPy type f8"),
        (np.array([1 + 2j]), "NumPy type c16"),
        (np.array([True]), "NumPy type b1"),
        (np.array(["a"]), "NumPy type U1"),
        (np.array([print], dtype=object), "NumPy type O8|print"),
        (np.zeros(2, dtype=[("a", "i4")]), "NumPy type V4"),
        (np.array(["2020"], dtype="M8[s]"), "NumPy type M8"),
        (np.zeros((1,) * 5, dtype=np.int8), "array shape"),
        (2**64, "integer of 65 bits"),
    ],
)
def test_other_values_are_refused_by_name(value, found):
    for protocol in (2, 4, 5):
        with pytest.raises(DataError, match=found):
            loads(pickle.dumps(value, protocol))


def test_array_size_must_fit_its_bytes():
    data = pickle.dumps(np.arange(3, dtype=np.int64), 4)
    wrong = data.replace(b"K\x03\x85", b"K\x04\x85")
    assert wrong != data
    with pytest.raises(DataError, match=r"shape \(4,\) and type <i8 with 24 bytes instead of 32"):
        loads(wrong)
    with pytest.raises(DataError, match="array shape"):
        loads(data.replace(b"K\x03\x85", b"J\xff\xff\xff\xff\x85"))


def deep(levels):
    return b"]" * levels + b"a" * (levels - 1) + b"."


BOUNDED = {
    "list in itself": b"\x80\x02]q\x00h\x00a.",
    "list in itself by a tuple": b"\x80\x02]q\x00h\x00h\x00h\x00\x87a.",
    "deep lists": deep(1_000),
    "deeper lists": deep(30_000),
    "deep tuples": b")" + b"\x85" * 60_000 + b".",
    "deep marks": b"(" * 32_000 + b"t" * 32_000 + b".",
    "opcodes": b"N" * 100_000 + b".",
    "one list many times": b"\x80\x02](NNe" + b"q\x00(" + b"h\x00" * 40_000 + b"l.",
    "one text encoded many times": b"X" + struct.pack("<I", 500_000) + b"a" * 500_000 + b"q\x00"
    b"c_codecs\nencode\nq\x01Vlatin1\nq\x02" + b"(h\x01h\x00h\x02tR" * 5_000 + b".",
    "size": b"B" + struct.pack("<I", inert_pickle.MAX_BYTES) + b"x" * inert_pickle.MAX_BYTES + b".",
    "decimal digits": b"L" + b"9" * 900_000 + b"L\n.",
    "integer": b"\x8b" + struct.pack("<i", 900_000) + b"\x7f" * 900_000 + b".",
}


@pytest.mark.parametrize("data", BOUNDED.values(), ids=BOUNDED.keys())
def test_bounded_in_depth_size_and_time(data):
    start = time.process_time()
    with pytest.raises(DataError):
        loads(data)
    assert time.process_time() - start < 2


def test_shared_lists_do_not_multiply():
    data = b"\x80\x02](" + b"N" * 10 + b"eq\x00"
    for level in range(1, 7):
        data += b"](" + (b"h" + bytes([level - 1])) * 10 + b"eq" + bytes([level])
    data = data.replace(b"\x80\x02", b"\x80\x02(", 1) + b"l."
    assert len(pickle.loads(data)) == 7
    with pytest.raises(DataError, match="65536 values"):
        loads(data)


def test_messages_show_foreign_names_short_and_plain():
    data = b"\x80\x04X" + struct.pack("<I", 5000) + b"\xe7\x8c\xab\n\x00" * 1000 + b"\x8c\x01a\x93."
    with pytest.raises(DataError) as caught:
        loads(data)
    assert len(str(caught.value)) < 2_000
    assert str(caught.value).isascii()
    assert str(caught.value).isprintable()


class Allowed(pickle.Unpickler):
    """The oracle; it is asked only about rows that the inert reader took for harmless."""

    def find_class(self, module, name):
        assert module.split(".")[0] in ("numpy", "_codecs", "builtins", "__builtin__")
        return super().find_class(module.replace("__builtin__", "builtins"), name)


def mutate(data, chance):
    data = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 5))):
        at = chance.randrange(len(data))
        kind = chance.randrange(5)
        if kind == 0:
            data[at] = chance.randrange(256)
        elif kind == 1:
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 2:
            del data[at : at + chance.randrange(1, 9)]
        elif kind == 3:
            data[at:at] = data[at - chance.randrange(9) : at]
        else:
            data[at] = chance.choice(
                b"(0123.FGIJKLNQRSTUVXabcdeghijlopqrstu}]\x80\x81\x85\x86\x93\x94"
            )
        if not data:
            return b""
    return bytes(data)


@pytest.mark.filterwarnings("ignore::numpy.exceptions.VisibleDeprecationWarning")
def test_fuzzed_rows_give_an_error_or_what_pickle_gives():
    chance = random.Random(20240607)
    small = np.arange(8, dtype=np.int32)
    rows = [small, ("a cat", small), (small[:3].astype(np.int64), small.reshape(2, 4)), [1, 2, 300]]
    seeds = [pickle.dumps(row, protocol) for row in rows for protocol in PROTOCOLS]
    read = refused = 0
    start = time.process_time()
    for _ in range(4_000):
        data = mutate(chance.choice(seeds), chance)
        try:
            value = loads(data)
        except DataError:
            refused += 1
            continue
        read += 1
        assert same(value, Allowed(io.BytesIO(data)).load()), data
    assert time.process_time() - start < 20
    assert read > 100
    assert refused > 1_000
