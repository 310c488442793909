"""Records in files: whole ones, whatever happened to the writer."""
import os
import resource
import signal
import tempfile
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mmsinger.models.teachers.record_files as record_files
from mmsinger.models.teachers.record_files import ENTRY, RecordFolder

SIZE = 24


def key(n):
    return n.to_bytes(16, 'big')


def record(n, size=SIZE):
    return np.random.default_rng(n).integers(0, 256, size, dtype=np.uint8)


def filled(folder, count, size=SIZE):
    records = RecordFolder(str(folder), size)
    for n in range(count):
        records.add(key(n), record(n, size))
    return records


def found(records, count, size=SIZE):
    """Numbers whose record is there, and right."""
    numbers = []
    for n in range(count):
        content = records.get(key(n))
        if content is not None:
            assert np.array_equal(content, record(n, size))
            numbers.append(n)
    return numbers


def path_of(folder, extension):
    path, = [os.path.join(folder, name) for name in os.listdir(folder)
             if name.endswith(extension)]
    return path


def test_what_was_added_is_found(tmp_path):
    records = filled(tmp_path, 5)
    for folder in (records, RecordFolder(str(tmp_path), SIZE)):
        assert len(folder) == 5
        assert found(folder, 6) == [0, 1, 2, 3, 4]
    assert len(os.listdir(tmp_path)) == 2
    assert os.path.getsize(path_of(tmp_path, '.records')) == 5 * SIZE


def test_reading_writes_nothing(tmp_path):
    records = RecordFolder(str(tmp_path / 'none'), SIZE)
    records.refresh()
    assert records.get(key(0)) is None and len(records) == 0
    assert not os.listdir(tmp_path)


def test_a_record_is_a_copy(tmp_path):
    records = filled(tmp_path, 1)
    records.get(key(0))[:] = 0
    assert found(records, 1) == [0]


def test_processes_share(tmp_path):
    """Each writes its own files, and sees the others' when it looks."""
    first, second = (RecordFolder(str(tmp_path), SIZE) for _ in range(2))
    first.add(key(0), record(0))
    second.add(key(1), record(1))
    first.add(key(2), record(2))
    assert found(second, 3) == [1]
    second.refresh()
    first.add(key(3), record(3))
    assert found(second, 4) == [0, 1, 2]
    for folder in (first, second):
        folder.refresh()
        folder.refresh()
        assert found(folder, 4) == [0, 1, 2, 3]
        assert len(folder) == 4
    assert len(os.listdir(tmp_path)) == 4


@given(st.integers(1, 5), st.data())
def test_files_may_end_anywhere(count, data):
    """Of what is cut, the records before the cut are left, and no others."""
    with tempfile.TemporaryDirectory() as folder:
        filled(folder, count)
        cuts = []
        for extension, size in (('.index', ENTRY), ('.records', SIZE)):
            path = path_of(folder, extension)
            cut = data.draw(st.integers(0, count * size))
            os.truncate(path, cut)
            cuts.append(cut // size)
        records = RecordFolder(folder, SIZE)
        assert len(records) == min(cuts)
        assert found(records, count) == list(range(min(cuts)))
        for n in range(count):  # and the rest can be added again
            if records.get(key(n)) is None:
                records.add(key(n), record(n))
        assert found(RecordFolder(folder, SIZE), count) == list(range(count))


@pytest.mark.parametrize('damage', ['zeros', 'bit', 'cut'])
def test_damaged_records_are_not_given(tmp_path, damage):
    filled(tmp_path, 4)
    path = path_of(tmp_path, '.records')
    with open(path, 'r+b') as file:
        file.seek(SIZE)
        if damage == 'zeros':  # a machine that crashed before it wrote them
            file.write(bytes(SIZE))
        elif damage == 'bit':
            byte = file.read(1)
            file.seek(SIZE)
            file.write(bytes([byte[0] ^ 4]))
        else:
            reader = RecordFolder(str(tmp_path), SIZE)
            file.truncate(SIZE)  # after it was looked at
            assert found(reader, 4) == [0]
            return
    reader = RecordFolder(str(tmp_path), SIZE)
    assert found(reader, 4) == [0, 2, 3]
    assert len(reader) == 3
    reader.add(key(1), record(1))
    assert found(reader, 4) == [0, 1, 2, 3]
    # What was added last counts
    assert found(RecordFolder(str(tmp_path), SIZE), 4) == [0, 1, 2, 3]


def test_an_attempt_that_was_interrupted_is_overwritten(tmp_path,
                                                        monkeypatch):
    records = filled(tmp_path, 2)
    write = record_files._write

    def half(file, offset, content):
        write(file, offset, bytes(content)[:len(content) // 2])
        raise KeyboardInterrupt

    for victim in ('.records', '.index'):

        def interrupted(file, offset, content):
            (half if file.name.endswith(victim) else write)(
                file, offset, content)

        with monkeypatch.context() as patch:
            patch.setattr(record_files, '_write', interrupted)
            with pytest.raises(KeyboardInterrupt):
                records.add(key(7), record(7))
        for folder in (records, RecordFolder(str(tmp_path), SIZE)):
            assert found(folder, 8) == [0, 1]
    for n in (2, 3):
        records.add(key(n), record(n))
    for folder in (records, RecordFolder(str(tmp_path), SIZE)):
        assert found(folder, 8) == [0, 1, 2, 3]


def in_fork(work):
    """Run it in a child process; its exit status."""
    child = os.fork()
    if not child:
        try:
            os._exit(work())
        except BaseException:
            os._exit(99)
    return child


def status(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_writer_that_is_killed(tmp_path):
    size, count = 300_000, 100_000

    def write():
        filled(tmp_path, count, size)

    child = in_fork(write)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (
            os.listdir(tmp_path) and len(RecordFolder(str(tmp_path), size))):
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    assert status(child) == -signal.SIGKILL
    records = RecordFolder(str(tmp_path), size)
    numbers = found(records, len(records) + 5, size)
    assert numbers == list(range(len(records))) and numbers


def test_a_full_disk(tmp_path):
    """Here: a limit to the size of files. The last write is cut short."""
    size, fitting = 50_000, 3

    def write():
        resource.setrlimit(resource.RLIMIT_FSIZE, (
            fitting * size + 1000, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            filled(tmp_path, fitting + 1, size)
        except OSError:
            return 5

    assert status(in_fork(write)) == 5
    assert os.path.getsize(path_of(tmp_path, '.records')) > fitting * size
    assert found(RecordFolder(str(tmp_path), size), 9, size) == [0, 1, 2]


def test_other_sizes_are_refused(tmp_path):
    records = RecordFolder(str(tmp_path), SIZE)
    for bad_key, content in ((key(0), record(0, SIZE + 1)),
                             (b'short', record(0))):
        with pytest.raises(ValueError, match='24'):
            records.add(bad_key, content)
