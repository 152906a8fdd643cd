"""Named data sets, files of the user, and the rows of each step."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from pyflowkern.data import Batches, Columns, DataError, DataSet, load, photos, step_seed
from pyflowkern.data.dataset import column_at, repeated_columns
from pyflowkern.data.photos import HELD_OUT_PHOTOS, TRAIN_PHOTOS, Crops, grid_patches


@pytest.fixture(scope="module")
def photo_set():
    return load("photos")


def test_photos_are_split_by_photograph(photo_set):
    assert not set(TRAIN_PHOTOS) & set(HELD_OUT_PHOTOS)
    held_out = torch.cat([grid_patches(photos._bundled(*p), 32) for p in HELD_OUT_PHOTOS])
    assert torch.equal(photo_set.validation, held_out)
    # training crops cover the training photographs up to their first and last pixels
    windows = [photos._bundled(*p) for p in TRAIN_PHOTOS]
    crops = photo_set.train[torch.tensor([0, len(photo_set.train) - 1])]
    assert torch.equal(crops[0], windows[0][:, :32, :32])
    assert torch.equal(crops[1], windows[-1][:, -32:, -32:])


def test_every_crop_has_one_number():
    pictures = [torch.randint(0, 256, (3, 5, 6)), torch.randint(0, 256, (3, 4, 4))]
    crops = Crops(pictures, 3)
    expected = [
        p[:, y : y + 3, x : x + 3]
        for p in pictures
        for y in range(p.shape[1] - 2)
        for x in range(p.shape[2] - 2)
    ]
    assert len(crops) == len(expected)
    assert torch.equal(crops[torch.arange(len(crops))], torch.stack(expected))


def test_digits_use_17_of_32_levels():
    digits = load("digits")
    assert digits.shape == (1, 8, 8)
    assert digits.bits == 5
    assert int(digits.train.max()) == digits.levels - 1 == 16
    assert len(digits.train) + len(digits.validation) == 1797


def test_a_pass_holds_each_row_once_and_a_batch_follows_from_seed_and_step():
    data = DataSet("rows", torch.arange(10.0)[:, None], torch.zeros(1, 1))
    first = Batches(data, 5, seed=1)
    both = torch.cat([first.batch(0), first.batch(1)]).flatten()
    assert sorted(both.tolist()) == list(range(10))
    second = Batches(data, 5, seed=1)
    assert torch.equal(second.batch(7), first.batch(7))  # without drawing the batches before it
    orders = {tuple(torch.cat([first.batch(2 * p), first.batch(2 * p + 1)])) for p in range(5)}
    assert len(orders) == 5
    assert not torch.equal(Batches(data, 5, seed=2).batch(0), first.batch(0))


def test_a_batch_larger_than_the_data_is_all_of_it():
    data = DataSet("rows", torch.arange(3.0)[:, None], torch.zeros(1, 1))
    assert sorted(Batches(data, 64, seed=0).batch(4).flatten().tolist()) == [0, 1, 2]


@pytest.mark.parametrize("rows", [3, 10])
def test_processes_share_a_batch_and_its_mirroring(rows):
    images = torch.arange(2 * rows, dtype=torch.uint8).view(rows, 1, 1, 2)
    data = DataSet("two pixels", images, images[:1], bits=8, flip=True)
    for step in range(3):
        parts = [Batches(data, 7, 0, rank=rank, ranks=3).batch(step) for rank in range(3)]
        assert [len(part) for part in parts] == ([1, 1, 1] if rows == 3 else [2, 2, 3])
        assert torch.equal(torch.cat(parts), Batches(data, 7, 0).batch(step))


def test_each_rank_has_a_seed_of_its_own():
    seeds = [step_seed(seed, step, rank) for seed in (0, 1) for step in (0, 1) for rank in (0, 1)]
    assert len(set(seeds)) == 8
    assert step_seed(3, 4, 0) == step_seed(3, 4)


def test_about_half_of_the_photos_are_mirrored():
    images = torch.arange(2, dtype=torch.uint8).view(1, 1, 1, 2).expand(1000, 1, 1, 2)
    batch = Batches(DataSet("two pixels", images, images[:1], bits=8, flip=True), 1000, 0).batch(0)
    mirrored = (batch[:, 0, 0, 0] == 1).sum()
    assert 400 < mirrored < 600  # 6 standard deviations
    assert torch.equal(batch.sum((1, 2, 3)), torch.ones(1000, dtype=torch.long))


@pytest.mark.parametrize("header", ["", "length,width\n"])
def test_table_with_and_without_header(tmp_path, header):
    rows = np.arange(40.0).reshape(20, 2) ** 2
    path = tmp_path / "t.csv"
    path.write_text(header + "\n".join(f"{a},{b}" for a, b in rows) + "\n\n")
    data = load(path)
    assert data.columns == (["length", "width"] if header else [])
    both = torch.cat([data.train, data.validation])
    assert sorted(both[:, 0].tolist()) == rows[:, 0].tolist()
    torch.testing.assert_close(data.mean, data.train.mean(0))
    torch.testing.assert_close(data.std, data.train.std(0, correction=0))


def test_array_of_images_in_either_layout(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
    np.save(tmp_path / "last.npy", images)
    np.save(tmp_path / "first.npy", images.transpose(0, 3, 1, 2))
    last, first = load(tmp_path / "last.npy"), load(tmp_path / "first.npy")
    assert last.shape == (3, 8, 8)
    assert torch.equal(last.validation, first.validation)
    assert last.fingerprint() == first.fingerprint()


def test_folder_of_images_is_split_by_file(tmp_path):
    (tmp_path / "deeper").mkdir()
    for i in range(10):
        name = f"deeper/{i}.png" if i % 2 else f"{i}.jpg"
        Image.new("RGB", (20 + i, 16), (25 * i, 0, 0)).save(tmp_path / name)
    data = load(tmp_path, size=16)
    assert data.shape == (3, 16, 16)
    assert (len(data.train), len(data.validation)) == (9, 1)


def test_fingerprint_tells_data_apart(tmp_path):
    rows = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    np.save(tmp_path / "a.npy", rows)
    rows[7, 1] += 1
    np.save(tmp_path / "b.npy", rows)
    assert load(tmp_path / "a.npy").fingerprint() != load(tmp_path / "b.npy").fingerprint()


def test_columns_whose_values_repeat_are_named():
    """Five numbers in 100 rows have no density; 11 might be rounded, and images are integers in any case."""
    rows = torch.randn(100, 4)
    rows[:, 1], rows[:, 2] = torch.arange(100) % 5, torch.arange(100) % 11
    named = DataSet("t.csv", rows, rows, columns=["a", "hits", "c", "d"])
    (line,) = repeated_columns(named)
    assert line.startswith("t.csv, column 2 (hits): 5 values in 100 held-out rows; ")
    assert len(repeated_columns(DataSet("t.npy", rows, rows[:, 1:2]))) == 1
    images = torch.zeros(100, 1, 2, 2, dtype=torch.uint8)
    assert repeated_columns(DataSet("images", images, images, bits=8)) == []


@pytest.mark.parametrize("context", [Columns(["1"], classes=False), Columns(["2"], classes=True)])
@pytest.mark.parametrize(("name", "stream"), [("t.npy", False), ("t.npy", True), ("t.csv", False)])
def test_a_column_has_its_number_in_the_file_beside_contexts(name, stream, context, tmp_path):
    rows = np.random.default_rng(0).normal(size=(400, 3))
    rows[:, 1], rows[:, 2] = np.arange(400) % 20, np.arange(400) % 3
    if name == "t.npy":
        np.save(tmp_path / name, rows)
    else:
        np.savetxt(tmp_path / name, rows, delimiter=",", header="a,b,c", comments="")
    line = repeated_columns(load(tmp_path / name, context=context, stream=stream))[-1]
    column = "column 3 (c)" if name == "t.csv" else "column 3"
    assert f"{name}, {column}: 3 values in 40 held-out rows; " in line


def test_a_column_without_a_name_is_called_by_its_number():
    """As the first one of a table that pandas wrote with its index."""
    assert column_at(0, ["", "b"]) == column_at(0, []) == "column 1"


def _write_image(path):
    path.mkdir()
    Image.new("RGB", (64, 64)).save(path / "good.png")
    (path / "bad.png").write_bytes(b"no image")


def _write_small_image(path):
    path.mkdir()
    Image.new("RGB", (8, 64)).save(path / "thin.png")


def _save(array):
    return lambda path: np.save(path, array)


def _text(text):
    return lambda path: path.write_text(text)


def _pipe_in_folder(path):
    path.mkdir()
    os.mkfifo(path / "x.png")


def _petabyte(path, shape=(10**14, 2)):
    """A header that declares 728 TiB, without data."""
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)


def _sparse(path):
    """A sparse file as long as its header declares, which takes no space on the disk."""
    _petabyte(path, (10**12, 2))
    os.truncate(path, path.stat().st_size + 8 * 10**12)


NAN = np.ones((5, 2))
NAN[3, 1] = np.nan

#: name of the file, how to write it, what the one line must say
BAD_DATA = {
    "missing": ("none.csv", lambda path: None, "none.csv: no such file"),
    "suffix": ("t.txt", _text("1,2"), "t.txt: wants a .csv, .npy or .parquet file"),
    "empty csv": ("t.csv", _text(""), "t.csv: holds no rows"),
    "header alone": ("t.csv", _text("a,b\n"), "t.csv: holds no rows"),
    "word": (
        "t.csv",
        _text("a,b\n1,2\n3,four\n"),
        "t.csv, row 3, column 2 (b): 'four' is not a number",
    ),
    "short row": ("t.csv", _text("1,2\n3\n"), "t.csv, row 2: 1 columns instead of 2"),
    "nan": ("t.csv", _text("1,2\n3,4\n5,nan\n"), "t.csv, row 3, column 2: holds NaN or inf"),
    "too large": (
        "t.csv",
        _text("1,2\n1e39,4\n"),
        "t.csv, row 2, column 1: holds 1e39, which is too large for float32 (3.4e+38 at most)",
    ),
    "beyond float64": (
        "t.csv",
        _text("1,2\n-1e999,4\n"),
        "row 2, column 1: holds -1e999, which is too",
    ),
    "inf": ("t.csv", _text("1,2\n3,-inf\n"), "t.csv, row 2, column 2: holds NaN or inf"),
    "array too large": (
        "a.npy",
        _save(np.array([[1.0], [-1e39]])),
        "row 2, column 1: holds -1e+39",
    ),
    "array inf": (
        "a.npy",
        _save(np.array([[1.0], [np.inf]])),
        "a.npy, row 2, column 1: holds NaN",
    ),
    "narrow": (
        "t.csv",
        _text("1,0\n2,1e-44\n3,0\n4,2e-44\n"),
        "t.csv, column 2: its spread of",
    ),
    "named pipe": ("t.csv", os.mkfifo, "t.csv: is not a regular file"),
    "pipe of an array": ("a.npy", os.mkfifo, "a.npy: is not a regular file"),
    "pipe of an image": ("folder", _pipe_in_folder, "x.png: is not a regular file"),
    "petabyte": ("a.npy", _petabyte, "a.npy: not a readable .npy file"),
    "sparse petabyte": ("a.npy", _sparse, "values are more than memory holds"),
    "damaged archive": (
        "a.npy",
        lambda path: path.write_bytes(b"PK\x03\x04" + b"x" * 50),
        "a.npy: not a readable",
    ),
    "one row": ("t.csv", _text("1,2\n"), "t.csv: needs 2 rows"),
    "semicolons": (
        "t.csv",
        _text("a;b\n1;2\n"),
        "t.csv, row 2: numbers are separated by semicolons",
    ),
    "tabs": ("t.csv", _text("1\t2\n3\t4\n"), "t.csv, row 2: numbers are separated by tabs"),
    "two lines": (
        "t.csv",
        _text('"a\nb",c\n1,2\nx,2\n'),
        "row 3, column 1 (a b): 'x' is not a number",
    ),
    "last comma": ("t.csv", _text("a,b\n1,2,\n"), "t.csv, row 2: 3 columns instead of 2"),
    "gap": (
        "t.csv",
        _text("a,b\n1,2\n ,4\n"),
        "t.csv, row 3, column 1 (a): is empty, wants a number",
    ),
    "constant name": ("t.csv", _text("a,b\n1,2\n3,2\n4,2\n"), "t.csv, column 2 (b): constant"),
    "constant": ("t.csv", _text("1,2\n1,3\n1,4\n"), "t.csv, column 1: constant"),
    "binary csv": (
        "t.csv",
        lambda path: path.write_bytes(b"\xff\xfe\x00"),
        "t.csv: not a readable",
    ),
    "no array": ("a.npy", _text("no array"), "a.npy: not a readable"),
    "empty array": ("a.npy", _save(np.zeros((0, 3))), "a.npy: is empty"),
    "array axes": ("a.npy", _save(np.zeros((4, 3, 2))), "a.npy: wants real [N, D]"),
    "array dtype": ("a.npy", _save(np.array([["x"]])), "a.npy: wants real [N, D]"),
    "array nan": ("a.npy", _save(NAN), "a.npy, row 4, column 2: holds NaN or inf"),
    "pickle": ("a.npy", _save(np.array([[None]], dtype=object)), "a.npy: not a readable"),
    "empty folder": ("folder", lambda path: path.mkdir(), "folder: holds no images"),
    "broken image": ("folder", _write_image, "bad.png: not a readable image"),
    "small image": ("folder", _write_small_image, "thin.png: 8x64 pixels, smaller than 32x32"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_one_line(tmp_path, case):
    name, write, message = BAD_DATA[case]
    write(tmp_path / name)
    with pytest.raises(DataError) as caught:
        load(tmp_path / name)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
