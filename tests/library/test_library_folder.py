"""A library hands every training a slice of its own, whoever else is running, has crashed, or has finished."""

import logging
import multiprocessing
import threading
import time

import pytest
import torch
from safetensors import safe_open

from fusion.adapters.adapter import Adapter, AdapterInfo, BaseInfo, Branch, Concept
from fusion.adapters.core import SingularValuesLayer
from fusion.errors import FormatError, SliceConflict, UnknownName
from fusion.formats import adapter_file, safetensors_file
from fusion.library.library_folder import Library
from fusion.library.locks import library_lock
from fusion.library.training_folders import all_training_folders
from fusion.spectral.slices import SpectralSlice
from fusion.spectral.spectrum import Spectrum

BASE = BaseInfo("sd1", "unnamed", "epsilon")


def reserve(folder, rank=4, **options):
    return Library(folder).reserve(BASE, rank, **({"capacity": 32} | options))


def small(name, directions, token="<rex>", value=0.0):
    """An adapter of one layer, which owns a slice; `value` tells it from others."""
    rank = directions.rank
    layer = SingularValuesLayer(Spectrum(torch.zeros(512, rank), torch.zeros(rank), torch.zeros(600, rank)))
    with torch.no_grad():
        layer.dS.fill_(value)
    branch = Branch(name, "singular_values", {"unet.mid_block": layer}, (directions,), gate=(token,))
    row = torch.zeros(1, 4)
    return Adapter(AdapterInfo(name, BASE, (Concept(token, name),)), (branch,), {token: {"text_encoder": row}})


@pytest.fixture
def filled(tmp_path):
    """A library with `dog` on slice 0-3 and `cat` on 8-11."""
    for name, token, k in [("dog", "<rex>", 0), ("cat", "<tom>", 2)]:
        adapter_file.save(small(name, SpectralSlice(4 * k, 4), token), tmp_path / f"{name}.safetensors")
    return tmp_path


def test_files_own_their_slices(filled):
    assert [entry.info.name for entry in Library(filled).adapters()] == ["cat", "dog"]
    assert Library(filled).slice_map(BASE) == [
        ("'cat' (<tom>)", SpectralSlice(8, 4), True),
        ("'dog' (<rex>)", SpectralSlice(0, 4), True),
    ]
    with reserve(filled) as one, reserve(filled) as two:
        assert (one.slice, two.slice) == (SpectralSlice(4, 4), SpectralSlice(12, 4))


def test_a_taken_slice_is_refused_by_its_owners_name(filled):
    with pytest.raises(SliceConflict, match=r"'cat' \(<tom>\) owns directions 8-11"):
        reserve(filled, directions=SpectralSlice(9, 4))
    with reserve(filled, directions=SpectralSlice(4, 4)), pytest.raises(SliceConflict, match="a training under way"):
        reserve(filled, directions=SpectralSlice(5, 2))
    with reserve(filled, directions=SpectralSlice(8, 4), replacing="<tom>") as again:
        assert again.slice == SpectralSlice(8, 4)
    with pytest.raises(SliceConflict, match="No free contiguous slice"):
        reserve(filled, capacity=4)


def test_where_no_slice_is_free_gated_adapters_share_the_least_shared_one(filled):
    shared = {"capacity": 12, "gated": True, "share": True}
    with reserve(filled, **shared) as free, reserve(filled, **shared) as one, reserve(filled, **shared) as two:
        assert (free.slice, free.sharers) == (SpectralSlice(4, 4), ())
        assert (one.slice, one.sharers) == (SpectralSlice(0, 4), ("'dog' (<rex>)",))
        assert two.slice == SpectralSlice(4, 4) and "a training under way" in two.sharers[0]
        for exclusive in ({"share": False}, {"gated": False}):
            with pytest.raises(SliceConflict, match="No free"):
                reserve(filled, **(shared | exclusive))
    with reserve(filled), pytest.raises(SliceConflict, match="owns directions 4-7"):  # ungated: nobody shares it
        reserve(filled, directions=SpectralSlice(4, 4), **shared)
    with reserve(filled), reserve(filled, **shared) as other:
        assert other.slice == SpectralSlice(0, 4)


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


def test_a_slice_is_released_even_while_its_thread_holds_the_librarys_lock(tmp_path):
    """As when Python collects an abandoned training in the middle of another reservation."""
    reserved, entered = reserve(tmp_path), threading.Event()

    def lock_too():
        with library_lock(tmp_path):
            entered.set()

    thread = threading.Thread(target=lock_too, daemon=True)
    with library_lock(tmp_path):
        reserved.release()
        thread.start()
        assert not entered.wait(0.2)  # another thread has to wait
    assert entered.wait(10)
    assert Library(tmp_path).slice_map(BASE) == []


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


def test_a_file_is_opened_once_to_be_loaded(filled, monkeypatch):
    opened = []
    monkeypatch.setattr(
        safetensors_file, "safe_open", lambda path, **options: opened.append(path.name) or safe_open(path, **options)
    )
    adapter_file.load(filled / "dog.safetensors")
    Library(filled).add(filled / "dog.safetensors", "copy")
    Library(filled).rename("copy", "pet", {"<rex>": "<max>"})
    assert opened == ["dog.safetensors", "dog.safetensors", "copy.safetensors"]
    assert [entry.path.stem for entry in Library(filled).adapters()] == ["cat", "dog", "pet"]


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


def run_side_by_side(work, *args, count=8):
    """Run `work(number, start, *args)` in as many processes, which all begin at `start.wait()`."""
    context = processes()
    start = context.Barrier(count)
    workers = [context.Process(target=work, args=(number, start, *args), daemon=True) for number in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0] * count


def _reserve_and_save(number, start, folder):
    library = Library(folder)
    start.wait()
    for i in range(12):
        with reserve(folder, rank=1, capacity=256) as reserved:
            if i % 2:
                adapter_file.save(small("rex", reserved.slice), folder / f"{number}-{i}.safetensors")
            else:  # as a training does that may be interrupted
                training = library.new_training_folder("rex")
                adapter_file.save(small("rex", reserved.slice), training.folder / "rex.safetensors")
                library.add(training.folder / "rex.safetensors")
                training.delete()


def test_no_slice_is_booked_twice_while_some_trainings_begin_and_others_end(tmp_path):
    run_side_by_side(_reserve_and_save, tmp_path)
    slices = [directions for entry in Library(tmp_path).adapters() for directions in entry.slices]
    assert len(slices) == 96 == len(set(slices))
    assert len(Library(tmp_path).slice_map(BASE)) == 96  # no reservation is left


def _add_and_rename(number, start, folder, source):
    library = Library(folder)
    start.wait()
    for _ in range(6):
        library.add(source / f"{number}.safetensors", "rex")
    for name in (f"own-{number}-{i}" for i in range(3)):
        library.save(small(name, SpectralSlice(number, 1), value=number), name, "float32")
        library.rename(name, "tom")


def test_processes_that_add_and_rename_lose_no_adapter(tmp_path):
    for number in range(8):
        adapter_file.save(small("rex", SpectralSlice(number, 1)), tmp_path / f"sources/{number}.safetensors")
    run_side_by_side(_add_and_rename, tmp_path / "library", tmp_path / "sources")
    entries = Library(tmp_path / "library").adapters()
    names = {word: {word, *(f"{word}-{i}" for i in range(2, count + 1))} for word, count in (("rex", 48), ("tom", 24))}
    assert {entry.path.stem for entry in entries} == names["rex"] | names["tom"]
    for word, count in (("rex", 6), ("tom", 3)):
        starts = [entry.slices[0].start for entry in entries if entry.path.stem in names[word]]
        assert sorted(starts) == sorted([*range(8)] * count)
    assert all(entry.info.name == entry.path.stem for entry in entries)


def _rename_the_same(number, start, folder, results):
    start.wait()
    try:
        results.put(Library(folder).rename("dog", f"pet-{number}").stem)
    except UnknownName:
        results.put(None)


def test_of_processes_that_rename_the_same_adapter_one_does(filled):
    results = processes().Queue()
    (filled / "dog.png").write_bytes(b"picture")
    run_side_by_side(_rename_the_same, filled, results, count=4)
    (name,) = {results.get() for _ in range(4)} - {None}
    assert {path.name for path in filled.glob("[!.]*")} == {f"{name}.safetensors", f"{name}.png", "cat.safetensors"}


def _acquire_or_list(number, start, folder, refused):
    library = Library(folder)
    training = library.new_training_folder("rex") if number < 4 else None
    start.wait()
    if training is None:
        while all_training_folders(folder):
            library.unfinished()
        return
    training.release()
    count = 0
    for _ in range(500):
        count += not training.acquire()
        training.release()
    refused.put(count)
    training.delete()


def test_listing_unfinished_trainings_refuses_nobody_who_resumes_one(tmp_path):
    refused = processes().Queue()
    run_side_by_side(_acquire_or_list, tmp_path, refused, count=6)
    assert [refused.get() for _ in range(4)] == [0] * 4


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
    assert f"process {worker.pid})" in Library(tmp_path).slice_map(BASE)[0].owner
    assert Library(tmp_path).unfinished() == []
    assert len(list(tmp_path.glob(".*.reserved"))) == 1  # of a process that lives
    worker.kill()
    worker.join(60)
    with reserve(tmp_path) as again:
        assert again.slice.start == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [".library.lock"]


def test_what_a_killed_process_had_reserved_is_deleted_when_unfinished_trainings_are_listed(tmp_path):
    library, kinds = Library(tmp_path), ("spectrum", "shared basis")
    for kind in kinds:
        with reserve(tmp_path, slice_of=kind):
            (left,) = (path.name for path in tmp_path.glob(".*.reserved"))
        (tmp_path / left).touch()  # as SIGKILL leaves it: unlocked
        with reserve(tmp_path, rank=2, slice_of=kind):
            (tmp_path / left).touch()
            assert library.unfinished() == [] and len(list(tmp_path.glob(".*.reserved"))) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [".library.lock"]


def test_an_unfinished_training_owns_its_slice_and_is_found_once_nobody_works_at_it(filled):
    library = Library(filled)
    place = library.new_training_folder("rex")
    (filled / "dog.safetensors").rename(place.folder / "rex.safetensors")
    assert library.unfinished() == []
    assert ("'dog' (<rex>), unfinished", SpectralSlice(0, 4), True) in library.slice_map(BASE)
    with reserve(filled) as other, reserve(filled, replacing="<rex>") as own:
        assert (other.slice, own.slice) == (SpectralSlice(4, 4), SpectralSlice(0, 4))
    place.release()
    (found,) = library.unfinished()
    assert found.folder == place.folder and found.acquire() and not place.acquire() and library.unfinished() == []
    found.delete()
    assert library.unfinished() == [] and not place.folder.exists()
    (filled / "a file").write_text("")
    with pytest.raises(FormatError, match="it is a file, not a folder"):
        Library(filled / "a file").new_training_folder("rex")
