"""A library hands every training a slice of its own, whoever else is running, has crashed, or has finished."""

import logging
import multiprocessing
import threading
import time

import pytest

from fusion.adapters.adapter import BaseInfo
from fusion.errors import FormatError, SliceConflict
from fusion.formats import adapter_file
from fusion.library.library_folder import Library
from fusion.spectral.slices import SpectralSlice

BASE = BaseInfo("sd1", "unnamed", "epsilon")


def reserve(folder, **options):
    return Library(folder).reserve(BASE, 4, **({"capacity": 32} | options))


@pytest.fixture
def filled(trained, tmp_path):
    """A library with `dog` on slice 0-3 and `cat` on 8-11."""
    import tiny  # not above: the processes below import this module, and need no diffusers

    for noun, token, k in [("dog", "<rex>", 0), ("cat", "<tom>", 2)]:
        adapter_file.save(trained(tiny.pipeline("sd1"), noun=noun, token=token, k=k), tmp_path / f"{noun}.safetensors")
    return tmp_path


def test_files_own_their_slices(filled):
    assert [entry.info.name for entry in Library(filled).adapters()] == ["cat", "dog"]
    assert Library(filled).slice_map(BASE) == [
        ("'cat' (<tom>)", SpectralSlice(8, 4)),
        ("'dog' (<rex>)", SpectralSlice(0, 4)),
    ]
    with reserve(filled) as one, reserve(filled) as two:
        assert (one.slice, two.slice) == (SpectralSlice(4, 4), SpectralSlice(12, 4))


def test_a_taken_slice_is_refused_by_its_owners_name(filled):
    with pytest.raises(SliceConflict, match=r"'cat' \(<tom>\) owns directions 8-11"):
        reserve(filled, wanted=SpectralSlice(9, 4))
    with reserve(filled, wanted=SpectralSlice(4, 4)), pytest.raises(SliceConflict, match="a training under way"):
        reserve(filled, wanted=SpectralSlice(5, 2))
    with reserve(filled, wanted=SpectralSlice(8, 4), replacing="<tom>") as again:
        assert again.slice == SpectralSlice(8, 4)
    with pytest.raises(SliceConflict, match="No free contiguous slice"):
        reserve(filled, capacity=4)


def test_other_bases_and_other_meanings_of_a_slice_do_not_count(filled):
    for base in (BaseInfo("sd1", "other", "epsilon"), BaseInfo("sdxl", "unnamed", "epsilon")):
        assert Library(filled).slice_map(base) == []
    with reserve(filled, slice_of="shared basis") as one, reserve(filled, slice_of="shared basis") as two:
        assert (one.slice.start, two.slice.start) == (0, 4)


def test_strided_and_contiguous_share_one_spectrum(filled):
    with reserve(filled, layout="strided", capacity=32) as one:
        assert one.slice == SpectralSlice.strided(4, 4, 8)  # 0-3 of the strided slots touch `dog`'s directions


def test_a_slice_is_given_back_once(tmp_path):
    held = reserve(tmp_path / "new")
    with reserve(tmp_path / "new") as other:
        held.release()
        held.release()
        assert (held.slice.start, other.slice.start) == (0, 4)
        with reserve(tmp_path / "new") as third:
            assert third.slice == held.slice
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [".library.lock"]


def test_another_thread_may_give_it_back(tmp_path):
    held = reserve(tmp_path)
    thread = threading.Thread(target=held.release)
    thread.start()
    thread.join()
    with reserve(tmp_path) as again:
        assert again.slice == held.slice


def test_other_files_are_left_out_with_a_warning(filled, caplog):
    (filled / "notes.safetensors").write_bytes(b"PK\x03\x04" + b"\0" * 99)
    (filled / "readme.txt").write_text("hello")
    with caplog.at_level(logging.WARNING):
        assert len(Library(filled).adapters()) == 2
    assert "Not part of the library" in caplog.text and "notes.safetensors" in caplog.text
    assert Library(filled / "nowhere").adapters() == [] and Library(filled / "nowhere").slice_map(BASE) == []


def processes():
    """Real processes, but torch is imported once for all of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _work(folder, start, results):
    start.wait()
    with reserve(folder) as held:
        results.put(held.slice.start)
        start.wait()  # hold it until everybody has one


def test_processes_side_by_side_get_slices_of_their_own(tmp_path):
    context = processes()
    start, results = context.Barrier(6), context.Queue()
    workers = [context.Process(target=_work, args=(tmp_path, start, results), daemon=True) for _ in range(6)]
    for worker in workers:
        worker.start()
    got = sorted(results.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join(60)
    assert got == [0, 4, 8, 12, 16, 20] and all(worker.exitcode == 0 for worker in workers)


def _hold(folder, ready):
    with reserve(folder):
        ready.set()
        time.sleep(600)


def test_the_slice_of_a_killed_process_is_free_again(tmp_path):
    context = processes()
    ready = context.Event()
    worker = context.Process(target=_hold, args=(tmp_path, ready), daemon=True)
    worker.start()
    assert ready.wait(120)
    with reserve(tmp_path) as beside:
        assert beside.slice.start == 4
    assert f"process {worker.pid})" in Library(tmp_path).slice_map(BASE)[0].who
    worker.kill()
    worker.join(60)
    with reserve(tmp_path) as again:
        assert again.slice.start == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [".library.lock"]


def test_an_unfinished_training_owns_its_slice_and_is_found_once_nobody_works_at_it(filled):
    library = Library(filled)
    place = library.workplace("rex")
    (filled / "dog.safetensors").rename(place.folder / "rex.safetensors")
    assert library.unfinished() == []
    assert ("'dog' (<rex>), unfinished", SpectralSlice(0, 4)) in library.slice_map(BASE)
    with reserve(filled) as other, reserve(filled, replacing="<rex>") as own:
        assert (other.slice, own.slice) == (SpectralSlice(4, 4), SpectralSlice(0, 4))
    place.leave()
    (found,) = library.unfinished()
    assert found.folder == place.folder and found.take() and not place.take() and library.unfinished() == []
    found.remove()
    assert library.unfinished() == [] and not place.folder.exists()
    (filled / "a file").write_text("")
    with pytest.raises(FormatError, match="cannot be a library folder"):
        Library(filled / "a file").workplace("rex")
