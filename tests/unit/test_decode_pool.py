"""data.decode_pool: pixels as decoded here; a picture that kills its decoder costs itself only."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_cogview.configs.errors import DataError
from megatron_cogview.data import decode_pool, images
from megatron_cogview.data.decode_pool import DecodePool, InlineDecoder

COMMAND = decode_pool.COMMAND

# The real worker, but some pictures are deadly.
DEADLY = """
import os, signal, sys, time
from megatron_cogview.data import decode_worker, images
from megatron_cogview.configs.errors import DataError
real = images.decode
def decode(data, size):
    if data == b"SEGV":
        os.kill(os.getpid(), signal.SIGSEGV)
    if data == b"EXIT":
        os._exit(3)
    if data == b"SLOW":
        while True:
            pass
    if data == b"KILL":
        os.kill(os.getpid(), signal.SIGKILL)
    if data == b"BIG":
        try:
            bytearray(2 << 30)
        except MemoryError:
            raise DataError("too big")
    return real(data, size)
images.decode = decode
decode_worker.CPU_SECONDS = 0.3
decode_worker.main()
"""


def png(seed, size=(24, 20)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def pool():
    """Two processes; pictures of 16 and 8 pixels, 3 a batch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_pool, "COMMAND", [sys.executable, "-c", DEADLY])
        pool = DecodePool(2, 3, [16, 8], 4)
        yield pool
        pool.close()


def test_pool_and_inline_decoder_give_what_decode_gives(pool):
    inline = InlineDecoder(3, [16, 8], 4)
    for decoder in (pool, inline):
        trays = [decoder.take_tray() for _ in range(4)]
        futures = [
            decoder.submit(png(3 * number + place), tray, place)
            for number, tray in enumerate(trays)
            for place in range(3)
        ]
        assert [future.result() for future in futures] == [""] * 12
        for number, tray in enumerate(trays):
            for place in range(3):
                expected = images.decode(png(3 * number + place), 16)
                assert (tray.pixels[0][place] == expected).all()
                assert (tray.pixels[1][place] == images.shrink(expected, 8)).all()
            decoder.give_back(tray)


def test_a_picture_that_kills_its_decoder_is_named_and_the_others_are_decoded(pool):
    tray = pool.take_tray()
    requests = [png(1), b"SEGV", png(2), b"EXIT", png(3), b"SLOW", b"no picture", b"BIG"]
    answers = [pool.submit(data, tray, place % 3).result() for place, data in enumerate(requests)]
    pool.give_back(tray)
    assert [answers[k] for k in (0, 2, 4)] == ["", "", ""]
    assert answers[1] == "cannot be decoded: the decoder died of SIGSEGV"
    assert answers[3] == "cannot be decoded: the decoder ended with exit code 3"
    assert "takes more than" in answers[5]
    assert answers[6] == "not a PNG, JPEG or WebP file"
    assert answers[7] == "too big"


def test_processes_killed_from_outside_are_not_the_pictures_fault(pool):
    tray = pool.take_tray()
    process = pool._idle.get()
    os.kill(process._popen.pid, signal.SIGKILL)
    pool._idle.put(process)
    # Two processes: the dead one is among the next two asked.
    assert [pool.submit(png(k), tray, k).result() for k in range(2)] == ["", ""]
    with pytest.raises(DataError, match=r"killed from outside \(SIGKILL\).*--decode-workers"):
        pool.submit(b"KILL", tray, 0).result()
    assert pool.submit(png(1), tray, 0).result() == ""
    pool.give_back(tray)


def test_processes_end_with_the_pool():
    pool = DecodePool(1, 1, [8], 1)
    tray = pool.take_tray()
    assert pool.submit(png(0), tray, 0).result() == ""
    process = pool._idle.get()
    pool._idle.put(process)
    pool.close()
    assert process._popen.returncode == 0


def test_a_process_that_cannot_start_is_an_error_and_not_a_rejection():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_pool, "COMMAND", [sys.executable, "-c", "raise SystemExit(7)"])
        pool = DecodePool(1, 1, [8], 1)
        with pytest.raises(DataError, match=r"exit code 7.*--decode-workers"):
            pool.submit(png(0), pool.take_tray(), 0).result()
        pool.close()


def test_a_picture_that_takes_too_long_is_tried_once(pool, monkeypatch):
    started = []
    start = pool._start
    monkeypatch.setattr(pool, "_start", lambda: started.append(1) or start())
    tray = pool.take_tray()
    assert "takes more than" in pool.submit(b"SLOW", tray, 0).result()
    assert len(started) == 1
    assert "SIGSEGV" in pool.submit(b"SEGV", tray, 0).result()
    assert len(started) == 3
    pool.give_back(tray)


@pytest.mark.parametrize("paths", [None, "", ".", "{elsewhere}:", ":{elsewhere}", "{elsewhere}::."])
def test_nothing_is_imported_from_the_current_folder(tmp_path, monkeypatch, paths):
    """Folders of pictures come from anywhere, and may hold files that are called like libraries."""
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(here)
    if paths is None:
        monkeypatch.delenv("PYTHONPATH", raising=False)
    else:
        monkeypatch.setenv("PYTHONPATH", paths.format(elsewhere=elsewhere))
    given = decode_pool._import_paths()
    assert all(Path(path).is_absolute() for path in given)
    assert (str(elsewhere) in given) == ("elsewhere" in (paths or ""))
    code = "import sys; print(*sys.path, sep=chr(10))"
    # The interpreter as the pool starts it, without what takes the worker two seconds to load.
    found = subprocess.run(
        [*COMMAND[:2], "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(given)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert str(Path(decode_pool.__file__).resolve().parents[2]) in found
    assert not {"", ".", str(here)} & set(found)


def test_a_library_of_the_current_folder_is_not_run(tmp_path, monkeypatch):
    (tmp_path / "simplejpeg.py").write_text("open('was_run', 'w')\nraise SystemExit(9)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")
    # That of the fixture may still be in place.
    monkeypatch.setattr(decode_pool, "COMMAND", COMMAND)
    pool = DecodePool(1, 1, [8], 1)
    assert pool.submit(png(0), pool.take_tray(), 0).result() == ""
    pool.close()
    assert not (tmp_path / "was_run").exists()
