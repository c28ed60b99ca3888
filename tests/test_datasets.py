import dataclasses
import gzip
import hashlib
import http.server
import os
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from mcobjectives_examples import datasets, downloads, sources
from mcobjectives_examples.amat import parse_amat
from mcobjectives_examples.binarisation import MODES, binarise, test_set
from mcobjectives_examples.datasets import load
from mcobjectives_examples.downloads import data_dir
from mcobjectives_examples.errors import DataError, MissingDataError
from mcobjectives_examples.files import whole_file
from mcobjectives_examples.sources import DATASETS, Dataset

SIZES = (4, 3)
SHAPE = (2, 3)
GREY = np.random.RandomState(1).randint(1, 255, (sum(SIZES), 6)).astype(np.uint8)
BITS = (GREY > 100).astype(np.uint8)


@pytest.fixture(autouse=True)
def _own_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(downloads, "PAUSE_S", 0.0)
    for proxy in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
        monkeypatch.delenv(proxy.upper(), raising=False)


@pytest.fixture
def tiny(monkeypatch):
    """Shrinks a registry entry to images of 2 x 3 pixels, 4 train and 3 test, without official checksums."""

    def shrink(name, **changes):
        source = DATASETS[name]
        files = tuple(sources.SourceFile(file.path) for file in source.files)
        small = dataclasses.replace(source, shape=SHAPE, sizes=SIZES, files=files)
        monkeypatch.setitem(DATASETS, name, dataclasses.replace(small, **changes))
        return DATASETS[name]

    return shrink


def idx(images: np.ndarray, shape=SHAPE) -> bytes:
    return struct.pack(">4i", 0x803, len(images), *shape) + images.tobytes()


def amat(bits: np.ndarray) -> bytes:
    return b"".join(b" ".join(b"%d" % bit for bit in row) + b"\n" for row in bits)


def mat(path: Path, train: np.ndarray, test: np.ndarray) -> None:
    from scipy.io import savemat

    savemat(path, {"data": train.T, "testdata": test.T})


def put(folder: Path, source, *contents: bytes) -> None:
    for file, content in zip(source.files, contents, strict=True):
        path = folder / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def put_bits(folder: Path, source, bits: np.ndarray = BITS) -> None:
    put(folder, source, amat(bits[:4]), amat(bits[4:]))


def files_under(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# The registry and the folder


def test_registry_names_the_papers_sets():
    assert set(DATASETS) == {"digits", "mnist", "binarized_mnist", "omniglot", "fashion_mnist"}
    assert {name: datasets.default_binarisation(name) for name in DATASETS} == {
        name: "fixed" if name == "binarized_mnist" else "once" for name in DATASETS
    }
    assert not any(Path(file.path).is_absolute() for source in DATASETS.values() for file in source.files)


def test_unknown_name_is_told_with_the_nearest_one():
    with pytest.raises(DataError, match=r"'mnits'.*did you mean 'mnist'\?.*digits"):
        load("mnits")


def test_data_dir_takes_the_argument_then_the_variable_then_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MCOBJECTIVES_DATA", "/elsewhere")
    assert data_dir("/given") == Path("/given")
    assert data_dir() == Path("/elsewhere")
    monkeypatch.setenv("MCOBJECTIVES_DATA", "")
    assert data_dir().name == "mcobjectives"


@pytest.mark.parametrize("name", [name for name, source in DATASETS.items() if source.files])
def test_missing_files_name_the_folder_and_the_mend(name, tmp_path):
    with pytest.raises(MissingDataError) as caught:
        load(name, tmp_path)
    for part in (name, str(tmp_path), "--data-dir", "MCOBJECTIVES_DATA", "--download"):
        assert part in str(caught.value)


# Digits


def test_digits_are_scikit_learns_in_a_fixed_split():
    from sklearn.datasets import load_digits

    data, bundled = load("digits"), load_digits()
    assert (data.train.shape, data.test.shape, data.shape, data.binary) == ((1500, 64), (297, 64), (8, 8), False)
    together = torch.cat([data.train, data.test]).mul(16).numpy()
    assert np.array_equal(np.sort(together, axis=0), np.sort(bundled.data, axis=0))
    # Every class is in the test part, which the file's own order would not promise.
    classes = dict(zip(map(bytes, bundled.data.astype(np.uint8)), bundled.target, strict=True))
    test_classes = [classes[bytes(row)] for row in data.test.mul(16).to(torch.uint8).numpy()]
    assert min(np.bincount(test_classes, minlength=10)) >= 20
    assert data.checksum == "083ed6aae7ebbcbe2002c08a5022f66197899d4ee1620eae210501ea7005e8b7"
    assert torch.equal(load("digits").train, data.train)


# IDX files


def test_idx_pixels_are_scaled_and_the_checksum_covers_both_files(tiny, tmp_path):
    contents = idx(GREY[:4]), idx(GREY[4:])
    put(tmp_path, tiny("mnist"), *contents)
    data = load("mnist", tmp_path)
    assert torch.allclose(torch.cat([data.train, data.test]), torch.from_numpy(GREY) / 255.0, rtol=1e-7)
    digests = [hashlib.sha256(content).hexdigest() for content in contents]
    assert [file.sha256 for file in data.files] == digests
    assert data.files[0].path == "MNIST/raw/train-images-idx3-ubyte"
    assert data.checksum == hashlib.sha256("\n".join(digests).encode()).hexdigest()
    assert {file.verified for file in data.files} == {None}


def test_a_known_checksum_verifies_or_raises(tiny, tmp_path):
    contents = idx(GREY[:4]), idx(GREY[4:])
    source = tiny("mnist")
    files = tuple(
        dataclasses.replace(file, official=f"md5:{hashlib.md5(content).hexdigest()}")
        for file, content in zip(source.files, contents, strict=True)
    )
    put(tmp_path, tiny("mnist", files=files), *contents)
    assert {file.verified for file in load("mnist", tmp_path).files} == {True}
    put(tmp_path, source, idx(GREY[:4]), idx(GREY[4:] ^ 1))
    with pytest.raises(DataError, match=r"t10k-images.*has not the official checksum md5:.*--download"):
        load("mnist", tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"\0\0", idx(GREY[:4])[:-1], idx(GREY[:4]) + b"\0", idx(GREY[:3]), b"<html>not found</html>" * 9, amat(BITS)],
    ids=["empty", "two bytes", "short", "long", "an image too few", "html", "text"],
)
def test_truncated_and_foreign_idx_files_are_refused(tiny, tmp_path, content):
    put(tmp_path, tiny("fashion_mnist"), content, idx(GREY[4:]))
    with pytest.raises(DataError, match=r"truncated|IDX"):
        load("fashion_mnist", tmp_path)


def test_torchvisions_legacy_tensors_are_not_read_in_place_of_the_verified_files(tiny, tmp_path):
    put(tmp_path, tiny("mnist"), idx(GREY[:4]), idx(GREY[4:]))
    processed = tmp_path / "MNIST" / "processed"
    processed.mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save((torch.zeros(9, 2, 3, dtype=torch.uint8), torch.zeros(9)), processed / name)
    assert load("mnist", tmp_path).train.amax() > 0


# .amat text and its cache


@pytest.fixture
def parses(monkeypatch):
    calls = []
    counted = "mcobjectives_examples.amat.parse_amat"
    monkeypatch.setattr(counted, lambda path, *size: calls.append(path.name) or parse_amat(path, *size))
    return calls


def test_amat_is_parsed_once_and_then_served_from_the_cache(tiny, tmp_path, parses):
    folder = tmp_path / "data"
    put_bits(folder, tiny("binarized_mnist"))
    first, second = load("binarized_mnist", folder), load("binarized_mnist", folder)
    for data in (first, second):
        assert torch.equal(torch.cat([data.train, data.test]), torch.from_numpy(BITS).float())
        assert data.binary
    assert len(parses) == 2
    assert first.checksum == second.checksum
    assert [name for name in files_under(folder) if not name.endswith(".amat")] == [
        "binarized_mnist/binarized_mnist_test.npz",
        "binarized_mnist/binarized_mnist_train.npz",
    ]
    assert not (tmp_path / "cache").exists()


def test_a_changed_source_is_never_served_stale(tiny, tmp_path, parses):
    source = tiny("binarized_mnist")
    put_bits(tmp_path, source)
    load("binarized_mnist", tmp_path)
    times = [os.stat(tmp_path / file.path) for file in source.files]
    put_bits(tmp_path, source, 1 - BITS)
    for file, time in zip(source.files, times, strict=True):
        os.utime(tmp_path / file.path, ns=(time.st_atime_ns, time.st_mtime_ns))
    assert torch.equal(load("binarized_mnist", tmp_path).train, torch.from_numpy(1 - BITS[:4]).float())
    load("binarized_mnist", tmp_path)
    assert len(parses) == 4  # the rebuilt cache replaced the stale one


def flip(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


@pytest.mark.parametrize(
    "break_it",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: b"\x80\x04foreign",
        lambda content: flip(content, content.index(b"\x93NUMPY") + 128),
    ],
    ids=["empty", "half", "foreign", "a flipped byte of pixels"],
)
def test_a_corrupt_cache_is_rebuilt(tiny, tmp_path, parses, break_it):
    put_bits(tmp_path, tiny("binarized_mnist"))
    load("binarized_mnist", tmp_path)
    cache = tmp_path / "binarized_mnist" / "binarized_mnist_train.npz"
    cache.write_bytes(break_it(cache.read_bytes()))
    assert torch.equal(load("binarized_mnist", tmp_path).train, torch.from_numpy(BITS[:4]).float())
    assert parses.count("binarized_mnist_train.amat") == 2
    assert np.load(cache, allow_pickle=False)["packed"].shape == (4, 1)


def test_a_pickled_cache_is_not_unpickled(tiny, tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    put_bits(tmp_path, tiny("binarized_mnist"))
    cache = tmp_path / "binarized_mnist" / "binarized_mnist_train.npz"
    np.savez(cache, packed=np.array([Trap()], dtype=object), sha256=np.array("0"))
    load("binarized_mnist", tmp_path)


@pytest.mark.parametrize("write", [np.save, lambda file, array: np.savez(file, mine=array)])
def test_arrays_of_ones_own_by_the_caches_name_are_kept(tiny, tmp_path, parses, write):
    folder = tmp_path / "data"
    put_bits(folder, tiny("binarized_mnist"))
    mine = folder / "binarized_mnist" / "binarized_mnist_train.npz"
    with mine.open("wb") as file:
        write(file, np.arange(3))
    before = mine.read_bytes()
    for _ in range(2):
        assert torch.equal(load("binarized_mnist", folder).train, torch.from_numpy(BITS[:4]).float())
    assert mine.read_bytes() == before and len(parses) == 2  # the other cache serves
    assert files_under(tmp_path / "cache") == ["mcobjectives/binarized_mnist/binarized_mnist_train.npz"]


def test_a_folder_without_write_bits_is_left_alone(tiny, tmp_path, parses):
    folder = tmp_path / "data"
    put_bits(folder, tiny("binarized_mnist"))
    (folder / "binarized_mnist").chmod(0o555)
    try:
        load("binarized_mnist", folder)
        load("binarized_mnist", folder)
    finally:
        (folder / "binarized_mnist").chmod(0o755)
    assert len(parses) == 2
    assert not [name for name in files_under(folder) if name.endswith(".npz")]
    assert len(files_under(tmp_path / "cache")) == 2


def test_nowhere_to_cache_is_no_failure(tiny, tmp_path, monkeypatch):
    put_bits(tmp_path, tiny("binarized_mnist"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "binarized_mnist").chmod(0o555)
    try:
        assert len(load("binarized_mnist", tmp_path).train) == 4
    finally:
        (tmp_path / "binarized_mnist").chmod(0o755)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (amat(BITS[:3]), "has 3 lines, not 4: truncated"),
        (amat(BITS[:5]), "has 5 lines, not 4"),
        (amat(BITS[:4])[:-4], "line 4: 4 numbers, not 6: truncated"),
        (b"", "has 0 lines, not 4"),
        (amat(BITS[:4]).replace(b"\n", b" 1\n"), "line 1: 7 numbers, not 6"),
        (amat(BITS[:2]) + b"0 1 0 2 0 1\n" + amat(BITS[:1]), "line 3: b'2' is not 0 or 1"),
        (amat(BITS[:2]) + b"0 1 0 nan 0 1\n" + amat(BITS[:1]), "line 3: b'nan' is not 0 or 1"),
        (amat(BITS[:3]) + b"0 10 0 1 0\n", "line 4: b'10' is not 0 or 1"),
        (bytes(range(256)) * 4, "not 0 or 1"),
    ],
    ids=["line short", "line long", "cut", "empty", "wide", "two", "nan", "joined", "binary"],
)
def test_truncated_and_foreign_amat_files_are_refused_and_not_cached(tiny, tmp_path, content, message):
    put(tmp_path, tiny("binarized_mnist"), content, amat(BITS[4:]))
    with pytest.raises(DataError, match=message):
        load("binarized_mnist", tmp_path)
    assert not [name for name in files_under(tmp_path) if "train.npz" in name or name.endswith(".part")]


def test_amat_blocks_join_up(tmp_path):
    # Several blocks of 16 MiB, whose seams must fall between lines.
    bits = np.random.RandomState(2).randint(0, 2, (3000, 784)).astype(np.uint8)
    text = np.full((3000, 784, 2), ord(" "), np.uint8)
    text[:, :, 0] = bits + ord("0")
    text[:, -1, 1] = ord("\n")
    (tmp_path / "x.amat").write_bytes(text.tobytes() * 5)
    packed = parse_amat(tmp_path / "x.amat", 15000, 784)
    assert np.array_equal(np.unpackbits(packed, axis=1), np.tile(bits, (5, 1)))


# Omniglot


def test_git_blob_id_is_gits(tmp_path):
    (tmp_path / "x").write_bytes(b"hello\n")
    assert downloads.file_digest(tmp_path / "x", "git-blob") == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_bgs16s_omniglot_is_transposed_and_any_other_is_not(tiny, tmp_path):
    source = tiny("omniglot")
    path = tmp_path / source.files[0].path
    path.parent.mkdir()
    images = (GREY / 255).astype(np.float32)
    column_major = images.reshape(-1, *SHAPE).transpose(0, 2, 1).reshape(-1, 6)
    mat(path, column_major[:4], column_major[4:])

    other = load("omniglot", tmp_path)
    assert np.array_equal(other.train, column_major[:4])
    assert "not BGS16's own file" in other.source
    assert other.files[0].verified is None

    official = f"git-blob:{downloads.file_digest(path, 'git-blob')}"
    tiny("omniglot", files=(sources.SourceFile(source.files[0].path, official),))
    own = load("omniglot", tmp_path)
    assert np.array_equal(torch.cat([own.train, own.test]), images)
    assert own.source == "chardata.mat, BGS16's own file"
    assert own.files[0].verified is True
    assert own.checksum == other.checksum


@pytest.mark.parametrize(
    ("value", "message"),
    [(np.nan, "nan"), (-0.5, r"\[-0.5,"), (1.5, r", 1.5\]"), (np.inf, "inf")],
)
def test_pixels_outside_the_unit_interval_are_refused(tiny, tmp_path, value, message):
    path = tmp_path / tiny("omniglot").files[0].path
    path.parent.mkdir()
    images = GREY / 255.0
    images[5, 2] = value
    mat(path, images[:4], images[4:])
    with pytest.raises(DataError, match=rf"omniglot: test: pixels must be numbers in \[0, 1\].*{message}"):
        load("omniglot", tmp_path)


def test_truncated_and_foreign_mat_files_are_refused(tiny, tmp_path):
    from scipy.io import savemat

    path = tmp_path / tiny("omniglot").files[0].path
    path.parent.mkdir()
    mat(path, GREY[:4] / 255.0, GREY[4:] / 255.0)
    whole = path.read_bytes()
    for content in (whole[:-9], whole[:200], whole[:50], b"", b"<html>" * 99):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"chardata.mat is truncated or no .mat file"):
            load("omniglot", tmp_path)
    savemat(path, {"something": GREY})
    with pytest.raises(DataError, match=r"no .mat file with data and testdata"):
        load("omniglot", tmp_path)
    mat(path, GREY[:4] / 255.0 + 0.5j, GREY[4:] / 255.0)
    with pytest.raises(DataError, match=r"no .mat file with data and testdata of real numbers"):
        load("omniglot", tmp_path)
    mat(path, GREY[:3] / 255.0, GREY[4:] / 255.0)
    with pytest.raises(DataError, match="train is 3 images of 6 pixels, not 4 of 6"):
        load("omniglot", tmp_path)


def test_dataset_refuses_what_it_does_not_declare():
    good = torch.full((2, 6), 0.5)
    with pytest.raises(DataError, match="yet is declared binary"):
        Dataset("x", good, good, SHAPE, True, (), "")
    with pytest.raises(DataError, match="float64"):
        Dataset("x", good.double(), good, SHAPE, False, (), "")
    with pytest.raises(DataError, match=r"test is .*\(2, 5\)"):
        Dataset("x", good, good[:, 1:], SHAPE, False, (), "")


# Binarisation


def generator(seed: int, device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def test_fixed_passes_binary_pixels_and_refuses_grey_ones():
    bits = torch.from_numpy(BITS).float()
    assert binarise(bits, "fixed") is bits
    with pytest.raises(DataError, match="use 'once' or 'epoch'"):
        binarise(bits / 2, "fixed")


@pytest.mark.parametrize("mode", ["once", "epoch"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_draws_are_bernoulli_from_the_given_generator(mode, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    levels = torch.linspace(0, 1, 5, device=device)
    pixels = levels.repeat(20000, 1)
    source = generator(3, device)
    first, second = binarise(pixels, mode, source), binarise(pixels, mode, source)
    assert first.dtype == torch.float32
    assert set(first.unique().tolist()) == {0.0, 1.0}
    assert torch.allclose(first.mean(0), levels, atol=0.02)  # more than five standard errors
    assert not torch.equal(first, second)
    assert torch.equal(first, binarise(pixels, mode, generator(3, device)))


@pytest.mark.parametrize("mode", ["once", "epoch"])
def test_draws_on_binary_pixels_or_without_a_generator_are_refused(mode):
    with pytest.raises(DataError, match="use 'fixed'"):
        binarise(torch.from_numpy(BITS).float(), mode, generator(0))
    with pytest.raises(DataError, match=r"torch.Generator on cpu, was given none"):
        binarise(torch.full((2, 2), 0.5), mode)


@pytest.mark.parametrize("pixels", [torch.full((2, 2), torch.nan), torch.tensor([0.5, 7.0]), torch.empty(0, 4)])
@pytest.mark.parametrize("mode", MODES)
def test_binarise_refuses_what_is_no_probability(pixels, mode):
    with pytest.raises(DataError, match=r"\[0, 1\]|no pixels"):
        binarise(pixels, mode, generator(0))


def test_unknown_mode_is_refused():
    with pytest.raises(DataError, match="'twice': choose from fixed, once, epoch"):
        binarise(torch.zeros(1), "twice")


def test_the_test_set_is_the_same_images_in_every_run():
    data = load("digits")
    images = test_set(data.test, "once")
    torch.manual_seed(99)
    assert torch.equal(images, test_set(data.test, "epoch"))
    assert images.dtype == torch.float32
    assert set(images.unique().tolist()) == {0.0, 1.0}
    assert abs(images.mean() - data.test.mean()) < 0.01
    # Pinned: a release that draws other images would make results incomparable.
    digest = hashlib.sha256(np.packbits(images.numpy().astype(bool)).tobytes()).hexdigest()
    assert digest.startswith("65939cfc05f2781b")
    with pytest.raises(DataError, match="use 'once' or 'epoch'"):
        test_set(data.test, "fixed")


def test_the_test_set_of_binary_data_is_itself(tiny, tmp_path):
    put_bits(tmp_path, tiny("binarized_mnist"))
    data = load("binarized_mnist", tmp_path)
    assert test_set(data.test, "fixed") is data.test
    with pytest.raises(DataError, match="use 'fixed'"):
        test_set(data.test, "once")


# Status


def test_status_has_a_row_per_set_whatever_is_broken(tiny, tmp_path, monkeypatch):
    def explode(source, folder):
        raise ZeroDivisionError("inside a reader")

    put_bits(tmp_path, tiny("binarized_mnist"))
    put(tmp_path, tiny("mnist"), b"junk", b"junk")
    put(tmp_path, tiny("fashion_mnist", read=explode), b"x", b"x")
    rows = {row.name: row for row in datasets.status(tmp_path)}
    assert list(rows) == list(DATASETS)
    assert {name: row.present for name, row in rows.items()} == {name: name != "omniglot" for name in DATASETS}
    assert {name: row.verified for name, row in rows.items() if row.message} == {
        "mnist": False,
        "fashion_mnist": False,
        "omniglot": None,
    }
    assert "truncated or no IDX" in rows["mnist"].message
    assert "ZeroDivisionError: inside a reader" in rows["fashion_mnist"].message
    assert "--data-dir" in rows["omniglot"].message
    good = rows["binarized_mnist"]
    assert (good.message, good.train, good.test, good.shape, good.verified) == ("", 4, 3, SHAPE, None)
    assert good.pixel_mean == pytest.approx(BITS[:4].mean())
    assert good.checksum == load("binarized_mnist", tmp_path).checksum
    assert good.location == str(tmp_path / "binarized_mnist")


def test_status_of_a_folder_that_is_not_there(tmp_path):
    rows = datasets.status(tmp_path / "nowhere")
    assert [row.name for row in rows if row.present] == ["digits"]
    assert not (tmp_path / "nowhere").exists()


def test_status_of_named_sets_only(tmp_path):
    assert [row.name for row in datasets.status(tmp_path, ["omniglot", "digits"])] == ["omniglot", "digits"]
    with pytest.raises(DataError, match="did you mean 'mnist'"):
        datasets.status(tmp_path, ["digits", "mnits"])


# Downloads


class Server(http.server.ThreadingHTTPServer):
    """Serves `contents` by file name; `behaviour` says what goes wrong and how many times."""

    def __init__(self):
        self.contents: dict[str, bytes] = {}
        self.fault, self.times = "", 0
        self.requests: list[str] = []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        self.server.requests.append(name)
        content = self.server.contents.get(name)
        if content is None:
            return self.send_error(404)
        fault, self.server.times = self.server.fault if self.server.times else "", max(self.server.times - 1, 0)
        if fault == "503":
            return self.send_error(503)
        length = len(content) + (7 if fault == "promises more" else 0)
        self.send_response(200)
        if fault != "no length":
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if fault == "drops" else content)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def served(server, tiny):
    """binarized_mnist, tiny, with checksums, served from the loopback."""
    contents = amat(BITS[:4]), amat(BITS[4:])
    files = tuple(
        dataclasses.replace(file, official=f"sha256:{hashlib.sha256(content).hexdigest()}")
        for file, content in zip(DATASETS["binarized_mnist"].files, contents, strict=True)
    )
    server.contents = {Path(file.path).name: content for file, content in zip(files, contents, strict=True)}
    tiny("binarized_mnist", files=files, url=server.url)
    return server


def test_download_fetches_what_is_missing_and_only_that(served, tmp_path):
    data = load("binarized_mnist", tmp_path, download=True)
    assert torch.equal(data.train, torch.from_numpy(BITS[:4]).float())
    assert {file.verified for file in data.files} == {True}
    test = tmp_path / "binarized_mnist" / "binarized_mnist_test.amat"
    test.unlink()
    load("binarized_mnist", tmp_path, download=True)
    assert served.requests == ["binarized_mnist_train.amat", "binarized_mnist_test.amat", "binarized_mnist_test.amat"]
    assert not test.stat().st_mode & 0o111


def test_status_downloads_what_is_missing_and_goes_on_where_that_fails(served, tmp_path):
    served.contents.pop("binarized_mnist_test.amat")
    rows = datasets.status(tmp_path, ["binarized_mnist", "digits"], download=True)
    assert [(row.present, row.verified) for row in rows] == [(False, None), (True, None)]
    assert "answers 404" in rows[0].message and not rows[1].message
    served.contents["binarized_mnist_test.amat"] = amat(BITS[4:])
    [row] = datasets.status(tmp_path, ["binarized_mnist"], download=True)
    assert (row.present, row.verified, row.message) == (True, True, "")


def test_a_file_appears_only_when_it_is_whole(tmp_path):
    target = tmp_path / "file"
    with whole_file(target) as file:
        file.write(b"whole")
        file.flush()
        assert not target.exists()  # nor after a SIGKILL here
    with pytest.raises(ConnectionError), whole_file(target) as file:
        file.write(b"half")
        raise ConnectionError
    assert target.read_bytes() == b"whole" and files_under(tmp_path) == ["file"]


@pytest.mark.parametrize("fault", ["drops", "promises more", "503"])
def test_a_dropped_connection_is_tried_again(served, tmp_path, fault):
    served.fault, served.times = fault, 2
    load("binarized_mnist", tmp_path, download=True)
    assert served.requests.count("binarized_mnist_train.amat") == 3


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("drops", r"dropped after 24 of 48 bytes \(3 attempts\)"),
        ("promises more", r"dropped after 48 of 55"),
        ("503", "answers 503"),
    ],
)
def test_a_server_that_keeps_failing_leaves_nothing_behind(served, tmp_path, fault, message):
    served.fault, served.times = fault, 99
    with pytest.raises(DataError, match=message) as caught:
        load("binarized_mnist", tmp_path, download=True)
    assert "--data-dir" in str(caught.value) and "\n" not in str(caught.value)
    assert files_under(tmp_path) == []


def test_without_content_length_the_checksum_decides(served, tmp_path):
    served.fault, served.times = "no length", 99
    data = load("binarized_mnist", tmp_path, download=True)
    assert torch.equal(torch.cat([data.train, data.test]), torch.from_numpy(BITS).float())


def test_a_wrong_checksum_is_refused_and_leaves_nothing_behind(served, tmp_path):
    served.contents["binarized_mnist_train.amat"] = amat(1 - BITS[:4])
    with pytest.raises(DataError, match="has not the official checksum sha256:"):
        load("binarized_mnist", tmp_path, download=True)
    assert files_under(tmp_path) == []
    assert len(served.requests) == 1


def test_not_found_is_final(served, tmp_path):
    served.contents.clear()
    with pytest.raises(DataError, match=r"binarized_mnist_train.amat: the server answers 404"):
        load("binarized_mnist", tmp_path, download=True)
    assert files_under(tmp_path) == []
    assert len(served.requests) == 1


def test_no_server_at_all(served, tmp_path):
    source = DATASETS["binarized_mnist"]
    DATASETS["binarized_mnist"] = dataclasses.replace(source, url="http://127.0.0.1:9/")
    with pytest.raises(DataError, match="refused"):
        load("binarized_mnist", tmp_path, download=True)


def test_a_folder_that_cannot_be_written(served, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write .*choose another --data-dir"):
        load("binarized_mnist", tmp_path / "file", download=True)


def test_a_file_that_is_there_is_never_replaced(served, tmp_path):
    put(tmp_path, DATASETS["binarized_mnist"], amat(BITS[:3]), amat(BITS[4:]))
    with pytest.raises(DataError, match="has 3 lines"):
        load("binarized_mnist", tmp_path, download=True)
    assert served.requests == []


@pytest.fixture
def torchvision_mnist(server, tiny, monkeypatch):
    """torchvision's MNIST class pointed at the loopback with four tiny archives."""
    from torchvision.datasets import MNIST

    labels = struct.pack(">2i", 0x801, 4) + bytes(4)
    raw = {
        "train-images-idx3-ubyte": idx(GREY[:4]),
        "train-labels-idx1-ubyte": labels,
        "t10k-images-idx3-ubyte": idx(GREY[4:]),
        "t10k-labels-idx1-ubyte": labels,
    }
    server.contents = {f"{name}.gz": gzip.compress(content) for name, content in raw.items()}
    monkeypatch.setattr(MNIST, "mirrors", [server.url])
    archives = [(name, hashlib.md5(content).hexdigest()) for name, content in server.contents.items()]
    monkeypatch.setattr(MNIST, "resources", archives)
    tiny("mnist")
    return server


def test_torchvision_downloads_into_its_own_layout(torchvision_mnist, tmp_path):
    torchvision_mnist.fault, torchvision_mnist.times = "drops", 2
    data = load("mnist", tmp_path, download=True)
    assert torch.allclose(data.test * 255, torch.from_numpy(GREY[4:]).float())
    assert len(files_under(tmp_path / "MNIST" / "raw")) == 8
    assert {path.name for path in tmp_path.iterdir()} == {"MNIST"}


def test_torchvision_failing_leaves_nothing_behind(torchvision_mnist, tmp_path):
    torchvision_mnist.contents["t10k-images-idx3-ubyte.gz"] += b"x"  # a wrong checksum, after other files went well
    with pytest.raises(DataError, match=r"MNIST: torchvision: .*corrupted.*--data-dir") as caught:
        load("mnist", tmp_path, download=True)
    assert "\n" not in str(caught.value)
    assert files_under(tmp_path) == []


# The real files, where there are any


@pytest.fixture
def real(request, monkeypatch) -> Path:
    """The folder of real data; `request.param` names the set that must be there."""
    folder = Path(os.environ.get("MCOBJECTIVES_DATA") or Path(__file__).parents[2] / "shared" / "data")
    missing = [file.path for file in DATASETS[request.param].files if not (folder / file.path).is_file()]
    if missing:
        pytest.skip(f"no real data: {missing[0]} is neither in MCOBJECTIVES_DATA nor in ../shared/data")
    return folder


@pytest.mark.parametrize(
    ("real", "mean"), [("mnist", 0.13066), ("fashion_mnist", 0.28604)], indirect=["real"], ids=lambda value: str(value)
)
def test_real_idx_files(real, mean, request):
    name = request.node.callspec.params["real"]
    data = load(name, real)
    assert (data.train.shape, data.test.shape, data.shape) == ((60000, 784), (10000, 784), (28, 28))
    assert {file.verified for file in data.files} == {True}
    assert data.train.mean().item() == pytest.approx(mean, abs=1e-5)
    assert data.train[:1000].unique().numel() == 256


@pytest.mark.parametrize("real", ["binarized_mnist"], indirect=True)
def test_real_binarized_mnist(real, tmp_path, parses):
    # Through links, so that the cache is written beside them and never into the folder of real data.
    folder = tmp_path / "binarized_mnist"
    folder.mkdir()
    for path in (real / "binarized_mnist").glob("*.amat"):
        (folder / path.name).symlink_to(path.resolve())
    first, second = load("binarized_mnist", tmp_path), load("binarized_mnist", tmp_path)
    assert len(parses) == 2
    assert (first.train.shape, first.test.shape) == ((50000, 784), (10000, 784))
    assert {file.verified for file in first.files} == {True}
    assert first.train.mean().item() == pytest.approx(0.13056, abs=5e-6)
    assert first.test.mean().item() == pytest.approx(0.13251, abs=5e-6)
    assert torch.equal(first.train, second.train) and torch.equal(first.test, second.test)
    assert sum((folder / name).stat().st_size for name in files_under(folder) if name.endswith("npz")) < 6e6
    first_line = (folder / "binarized_mnist_train.amat").open("rb").readline()
    assert first.train[0].tolist() == [float(number) for number in first_line.split()]
    valid = folder / "binarized_mnist_valid.amat"
    if valid.exists():
        bits = np.unpackbits(parse_amat(valid, 10000, 784), axis=1)
        assert bits.mean() == pytest.approx(0.13113, abs=5e-6)


@pytest.mark.parametrize("real", ["omniglot"], indirect=True)
def test_real_omniglot(real):
    data = load("omniglot", real)
    assert (data.train.shape, data.test.shape) == ((24345, 784), (8070, 784))
    own = downloads.matches(real / "omniglot" / "chardata.mat", DATASETS["omniglot"].files[0].official)
    assert data.files[0].verified is (True if own else None)
    assert ("not BGS16's own file" in data.source) is not own
