import contextlib
import hashlib
import io
import resource
import socket
import struct
import tarfile
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from env.cifar import CIFAR10, Archive, find_archive, read_cifar10
from env.data import DataConfig, load_dataset
from env.errors import UserError

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BATCHES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
WIDTH = 3072
LABELS = [*range(10), 3, 7]  # 12 images in each batch


def integer(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def text(value: bytes) -> bytes:
    return b"U" + bytes([len(value)]) + value


def array(content: bytes, *shape: int, kind: bytes = b"u1", by_columns: bool = False) -> bytes:
    """An array as numpy under Python 2 pickles it: a constructor of numpy's, and a state with the raw bytes."""
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + integer(0) + b"\x85" + text(b"b") + b"\x87R"
    dtype = b"cnumpy\ndtype\n" + text(kind) + integer(0) + integer(1) + b"\x87R"
    dtype += b"(" + integer(3) + text(b"|") + b"NNN" + integer(-1) + integer(-1) + integer(0) + b"tb"
    size = b"(" + b"".join(map(integer, shape)) + b"t"
    order = b"\x88" if by_columns else b"\x89"
    raw = b"T" + struct.pack("<i", len(content)) + content
    return made + b"(" + integer(1) + size + dtype + order + raw + b"tb"


def batch(labels: list[int], data: bytes) -> bytes:
    """A batch as Python 2 wrote them: protocol 2, byte strings."""
    pairs = text(b"batch_label") + text(b"a batch") + text(b"labels") + b"](" + b"".join(map(integer, labels)) + b"e"
    return b"\x80\x02}(" + pairs + text(b"data") + data + b"u."


def meta(names: tuple[str, ...] = NAMES) -> bytes:
    """The names of the classes, in protocol 0."""
    listed = b"".join(f"S'{name}'\na".encode() for name in names)
    return b"(dp1\nS'num_cases_per_batch'\np2\nI10000\nsS'label_names'\np3\n(lp4\n" + listed + b"s."


def pixels(number: int) -> torch.Tensor:
    """The images of one batch: uint8 [12, 3, 32, 32], other ones in each."""
    generator = torch.Generator().manual_seed(number)
    return torch.randint(256, (len(LABELS), 3, 32, 32), dtype=torch.uint8, generator=generator)


def members() -> dict[str, bytes]:
    content = {
        name: batch(LABELS, array(pixels(number).numpy().tobytes(), len(LABELS), WIDTH))
        for number, name in enumerate(BATCHES)
    }
    return {**content, "batches.meta": meta()}


def write(path: Path, content: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, data in {"readme.html": b"read me", **content}.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def described(file: Path, url: str = "http://127.0.0.1:1/cifar-10-python.tar.gz") -> Archive:
    content = file.read_bytes()
    return Archive(url=url, md5=hashlib.md5(content).hexdigest(), size_bytes=len(content))


def silent(done: int, total: int) -> None:
    """For tests that do not look at the progress."""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "given").mkdir()
    return write(tmp_path / "given" / "cifar-10-python.tar.gz", members())


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


Serve = Callable[..., str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a server on this machine that answers each request with `body`, and gives its URL."""
    servers: list[ThreadingHTTPServer] = []

    def start(body: bytes, *, status: int = 200, said_bytes: int | None = None) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body) if said_bytes is None else said_bytes))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/cifar-10-python.tar.gz"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_the_official_archive_is_known_by_its_name_size_and_checksum() -> None:
    assert CIFAR10.name == "cifar-10-python.tar.gz"
    assert CIFAR10.url.startswith("https://")
    assert len(CIFAR10.md5) == 32
    assert CIFAR10.size_bytes == 170_498_071


def test_images_labels_and_names_are_those_of_the_batches_in_their_order(file: Path) -> None:
    classes, train, test = read_cifar10(file)
    assert classes == NAMES
    assert torch.equal(train.images, torch.cat([pixels(number) for number in range(5)]))
    assert train.labels.tolist() == LABELS * 5
    assert torch.equal(test.images, pixels(5))
    assert test.labels.tolist() == LABELS


def test_an_array_stored_by_columns_is_read_as_numpy_would(file: Path) -> None:
    rows = pixels(0).view(len(LABELS), WIDTH).numpy()
    turned = array(rows.tobytes(order="F"), len(LABELS), WIDTH, by_columns=True)
    write(file, {**members(), "data_batch_1": batch(LABELS, turned)})
    assert torch.equal(read_cifar10(file)[1].images[: len(LABELS)], pixels(0))


def test_the_source_is_split_by_seed_and_keeps_its_test_images(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("env.data.CIFAR10", described(file))
    data = load_dataset(DataConfig(source="cifar10", path=str(file), validation_share=0.2))
    assert data.image_shape == (3, 32, 32)
    assert data.classes == NAMES
    # 5 images of eight classes, 10 of two: a fifth is 1 and 2.
    assert data.validation.labels.bincount().tolist() == [1, 1, 1, 2, 1, 1, 1, 2, 1, 1]
    assert len(data.train) == 60 - 12
    assert sorted(data.test.labels.tolist()) == sorted(LABELS)
    assert load_dataset(DataConfig(source="cifar10", path=str(file), image_size=8)).image_shape == (3, 8, 8)


def test_chosen_classes_keep_their_test_images_and_any_number_of_training_images(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("env.data.CIFAR10", described(file))
    config = DataConfig(
        source="cifar10", path=str(file), validation_share=0.2, classes="horse,bird,cat", train_per_class=3
    )
    data = load_dataset(config)
    assert data.classes == ("horse", "bird", "cat")
    assert data.train.labels.bincount().tolist() == [3, 3, 3]
    assert data.validation.labels.bincount().tolist() == [2, 1, 2]
    assert data.test.labels.bincount().tolist() == [2, 1, 2]


def test_the_path_is_the_archive_or_its_folder(file: Path, tmp_path: Path) -> None:
    for path in (file, file.parent):
        found = find_archive(str(path), described(file), cache=tmp_path / "cache", progress=silent)
        assert found == file
    renamed = file.rename(file.with_name("mine.tgz"))
    assert find_archive(str(renamed), described(renamed), cache=tmp_path, progress=silent) == renamed
    assert not (tmp_path / "cache").exists()


def test_the_archive_is_downloaded_once_and_its_bytes_are_counted(file: Path, tmp_path: Path, serve: Serve) -> None:
    archive = described(file, serve(file.read_bytes()))
    calls: list[tuple[int, int]] = []
    cache = tmp_path / "new" / "cache"
    found = find_archive("", archive, cache=cache, progress=lambda done, total: calls.append((done, total)))
    assert found == cache / "cifar-10-python.tar.gz"
    assert found.read_bytes() == file.read_bytes()
    assert calls == sorted(calls)
    assert calls[-1] == (archive.size_bytes, archive.size_bytes)
    calls.clear()
    find_archive("", archive, cache=cache, progress=lambda done, total: calls.append((done, total)))
    assert calls == []


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda body: {"body": body[:-1], "said_bytes": len(body)}, "of"),
        (lambda body: {"body": body[: len(body) // 2]}, "of"),
        (lambda body: {"body": b""}, "0 of"),
        (lambda body: {"body": body + b"more"}, "more than"),
        (lambda body: {"body": body[:-1] + b"?"}, "is not kept"),
        (lambda body: {"body": b"<html>log in first</html>"}, "25 of"),
        (lambda body: {"body": b"no", "status": 404}, "HTTP Error 404"),
    ],
    ids=["cut off", "half", "nothing", "longer", "other content", "a web page", "404"],
)
def test_a_download_that_is_not_the_archive_is_told_and_not_kept(
    file: Path, tmp_path: Path, serve: Serve, answer: Callable[[bytes], dict[str, object]], words: str
) -> None:
    archive = described(file, serve(**answer(file.read_bytes())))
    with pytest.raises(UserError) as caught:
        find_archive("", archive, cache=tmp_path / "cache", progress=silent)
    line = str(caught.value)
    assert "\n" not in line
    for word in (words, archive.url, archive.md5, str(tmp_path / "cache" / archive.name)):
        assert word in line
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_more_is_fetched_than_there_should_be(file: Path, tmp_path: Path, serve: Serve) -> None:
    archive = described(file, serve(file.read_bytes() + bytes(5 * 2**20)))
    calls: list[int] = []
    with pytest.raises(UserError, match="more than"):
        find_archive("", archive, cache=tmp_path / "cache", progress=lambda done, _: calls.append(done))
    assert len(calls) <= archive.size_bytes / 2**20 + 2
    assert max(calls) == archive.size_bytes


def test_without_a_network_the_line_says_what_to_fetch_where_to_put_it_and_its_checksum(
    file: Path, tmp_path: Path
) -> None:
    with socket.socket() as taken:  # a port on which nobody listens
        taken.bind(("127.0.0.1", 0))
        archive = described(file, f"http://127.0.0.1:{taken.getsockname()[1]}/cifar-10-python.tar.gz")
        with pytest.raises(UserError) as caught:
            find_archive("", archive, cache=tmp_path / "cache", progress=silent)
    line = str(caught.value)
    assert "\n" not in line
    for word in ("refused", archive.url, archive.md5, str(tmp_path / "cache" / archive.name), "data.path"):
        assert word in line


def test_an_interrupted_download_leaves_nothing(file: Path, tmp_path: Path, serve: Serve) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_archive("", described(file, serve(file.read_bytes())), cache=tmp_path / "cache", progress=interrupt)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("path", ["given", ""])
def test_another_content_is_told_with_both_checksums(file: Path, path: str) -> None:
    archive = described(file)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError) as caught:
        find_archive(str(file) if path else "", archive, cache=file.parent, progress=silent)
    for word in (str(file), f"expected md5 {archive.md5}", f"got md5 {described(file).md5}", "remove it"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nowhere.tar.gz", "no file"),
        ("empty", "no file"),
        ("~nobody-of-this-name/x", "no file"),
        ("x" * 300, "name too long"),
    ],
)
def test_a_wrong_path_is_an_error_and_no_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, words: str
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        find_archive(path, CIFAR10, cache=tmp_path / "cache", progress=silent)
    assert words in str(caught.value)
    assert "data.path" in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"download of .* got .*(Not a directory|File exists)"):
        find_archive("", CIFAR10, cache=tmp_path / "file" / "cache", progress=silent)


def no_list() -> bytes:
    return b"\x80\x02}(" + text(b"data") + array(bytes(WIDTH), 1, WIDTH) + text(b"labels") + integer(1) + b"u."


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("data_batch_2", None, "the member data_batch_2, got none"),
        ("test_batch", None, "the member test_batch"),
        ("batches.meta", None, "the member batches.meta"),
        ("data_batch_4", batch([10], array(bytes(WIDTH), 1, WIDTH)), "labels from 0 to 9, got 10"),
        ("data_batch_4", batch([-1], array(bytes(WIDTH), 1, WIDTH)), "labels from 0 to 9, got -1"),
        ("test_batch", batch([1, 2], array(bytes(WIDTH), 1, WIDTH)), "1 labels, one an image, got 2 labels"),
        ("test_batch", no_list(), "no list of labels"),
        ("data_batch_1", batch([1], array(bytes(WIDTH - 1), 1, WIDTH - 1)), "(1, 3071)"),
        ("data_batch_1", batch([1], array(bytes(WIDTH), 2, WIDTH)), "(2, 3072)"),
        ("data_batch_1", batch([1], array(bytes(WIDTH), WIDTH)), "(3072,)"),
        ("data_batch_1", batch([1], array(bytes(WIDTH), 1, WIDTH, kind=b"i1")), "b'i1'"),
        ("data_batch_1", batch([], array(b"", 0, WIDTH)), "(0, 3072)"),
        ("data_batch_1", batch([1], text(b"pixels")), "no array"),
        ("data_batch_1", b"(dp1\n.", "no array"),
        ("data_batch_3", b"\x80\x02]q\x00.", "a dictionary, got list"),
        ("data_batch_3", b"", "EOFError"),
        ("data_batch_3", b"\x80\x02}(U", "a pickled batch"),
        ("batches.meta", meta(NAMES[:9]), "label_names, 10 of them"),
        ("batches.meta", b"(dp1\n.", "label_names, 10 of them, got None"),
    ],
)
def test_a_wrong_member_is_named_with_what_is_wrong(file: Path, name: str, content: bytes | None, words: str) -> None:
    spoilt = members()
    if content is None:
        del spoilt[name]
    else:
        spoilt[name] = content
    write(file, spoilt)
    with pytest.raises(UserError) as caught:
        read_cifar10(file)
    line = str(caught.value)
    assert "\n" not in line
    for word in (name, words, str(file)):
        assert word in line


@pytest.mark.parametrize(
    "construct",
    [
        b"cposix\nsystem\n(S'touch {marker}'\ntR.",
        b'c__builtin__\neval\n(S\'open("{marker}", "w")\'\ntR.',
        b"(ios\nsystem\nS'touch {marker}'\n.",
        b"cnumpy.core.multiarray\nos.system\n(S'touch {marker}'\ntR.",
    ],
)
def test_a_pickle_runs_no_code(file: Path, tmp_path: Path, construct: bytes) -> None:
    marker = tmp_path / "marker"
    attack = construct.replace(b"{marker}", str(marker).encode())
    write(file, {**members(), "data_batch_1": attack})
    with pytest.raises(UserError, match=r"data_batch_1 .*(UnpicklingError|pickled batch)"):
        read_cifar10(file)
    assert not marker.exists()


@pytest.mark.parametrize(
    "claim",
    [
        pytest.param(b"}r" + (2**26).to_bytes(4, "little"), id="LONG_BINPUT"),  # room for as many pointers: 1 GiB
        pytest.param(b"\x96" + (2**30).to_bytes(8, "little"), id="BYTEARRAY8"),
    ],
)
def test_a_pickle_that_claims_to_hold_much_takes_no_memory_for_it(file: Path, claim: bytes) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    write(file, {**members(), "data_batch_1": b"\x80\x02" + claim + b"."})
    with pytest.raises(UserError, match="data_batch_1"):
        read_cifar10(file)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB: 256 MiB


@settings(deadline=None, max_examples=60)
@given(position=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), cut=st.booleans())
def test_damage_anywhere_in_a_batch_gives_images_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, position: float, value: int, cut: bool
) -> None:
    content = bytearray(batch([1], array(b"\7" * WIDTH, 1, WIDTH)))
    # The interesting bytes stand before and after the pixels.
    where = int(position * (len(content) - WIDTH))
    content[where if where < content.index(b"\7" * 99) else where + WIDTH] = value
    file = write(
        tmp_path_factory.mktemp("damaged") / "archive.tar.gz",
        {**members(), "data_batch_1": bytes(content[:where] if cut else content)},
    )
    with contextlib.suppress(UserError):
        assert read_cifar10(file)[1].labels.max() <= 9


@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_archive_is_told(file: Path, part: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(part * len(content))])
    with pytest.raises(UserError, match=r"expected a whole \.tar\.gz"):
        read_cifar10(file)
