"""Files that stay on the disk: their rows in parts, in blocks, and as the training rows of a data set."""

import sys

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
import torch

from pyflowkern.data import (
    Batches,
    Columns,
    Conditioned,
    DataError,
    Moments,
    load,
    open_blocks,
    read,
    read_parts,
    streamed_set,
)

ROWS = 1500
#: Numbers of float32 that are in memory: two blocks of 128 rows, and a bit.
BUFFER = 900


def table(rows=ROWS):
    """Rows whose first number says which row it is, with a class and a number of another scale."""
    random = np.random.default_rng(0)
    numbers = 1e6 + random.normal(size=rows)
    return np.stack([np.arange(rows), random.integers(3, 6, rows), numbers], 1)


def write_parquet(path, rows, groups=128, names="abcdefgh"):
    columns = dict(zip(names, rows.T, strict=False))
    parquet.write_table(pyarrow.table(columns), path, row_group_size=groups)


@pytest.fixture(params=["npy", "parquet", "columns first"])
def path(request, tmp_path):
    """A table in a file: an array by rows or by columns, or Parquet."""
    if request.param == "parquet":
        write_parquet(tmp_path / "t.parquet", table())
        return tmp_path / "t.parquet"
    rows = table() if request.param == "npy" else np.asfortranarray(table())
    np.save(tmp_path / "t.npy", rows.astype(">f8"))
    return tmp_path / "t.npy"


def streamed(path, seed=0, context=None, buffer=BUFFER):
    file = open_blocks(path)
    if path.suffix == ".npy":
        assert type(file)(path, 3 * 128).counts == [*[128] * 11, 92]
        file = type(file)(path, 3 * 128)
    return streamed_set(file, seed, context, buffer)


def pass_of(data, seed=0, pass_=0, size=50):
    """Return the rows of a pass in their order."""
    batches, steps = Batches(data, size, seed), len(data.train) // size
    rows = [batches.batch(pass_ * steps + i) for i in range(steps)]
    return torch.cat([getattr(r, "rows", r) for r in rows])


def test_every_row_is_held_out_or_comes_once_a_pass(path):
    data = streamed(path)
    numbers = pass_of(data)[:, 0].long()
    held_out = data.validation[:, 0].long()
    assert (len(data.train), len(held_out)) == (1350, 150)  # a tenth
    assert sorted([*numbers.tolist(), *held_out.tolist()]) == [*range(ROWS)]
    assert held_out.unique().numel() == 150
    assert torch.bincount(held_out // 150, minlength=10).min() > 8  # from everywhere
    assert not torch.equal(numbers, pass_of(data, pass_=1)[:, 0].long())
    # a batch has rows of two blocks at least, and neighbours are no neighbours in the file
    assert all((part // 128).unique().numel() > 1 for part in numbers.split(50))
    assert (numbers.diff().abs() == 1).float().mean() < 0.05


def test_a_batch_follows_from_seed_and_step_and_a_pass_reads_each_block_once(path, monkeypatch):
    data, again = streamed(path), streamed(path)
    assert torch.equal(data.validation, again.validation)
    assert data.fingerprint() == again.fingerprint()
    batches, later = Batches(data, 50, seed=3), Batches(again, 50, seed=3)
    wanted = [batches.batch(step) for step in range(60)]
    for step in (59, 13, 31, 14, 0):  # what a run asks that goes on there
        assert torch.equal(later.batch(step), wanted[step])
    assert not torch.equal(Batches(data, 50, seed=4).batch(0), wanted[0])
    assert not torch.equal(streamed(path, seed=1).validation, data.validation)
    file, counted = data.train._file, []
    original = type(file).read
    monkeypatch.setattr(type(file), "read", lambda f, b: counted.append(b) or original(f, b))
    pass_of(data, seed=9)
    assert sorted(counted) == [*range(12)]


def test_statistics_are_those_of_the_training_rows(path):
    data = streamed(path)
    rows = np.delete(table(), data.validation[:, 0].long().numpy(), 0).astype(np.float32)
    np.testing.assert_array_equal(data.mean.numpy(), rows.mean(0, np.float64).astype(np.float32))
    std = rows.astype(np.float64).std(0).astype(np.float32)
    np.testing.assert_allclose(data.std.numpy(), std, rtol=1e-7)
    assert data.columns == (["a", "b", "c"] if path.suffix == ".parquet" else [])


def test_moments_of_parts_are_those_of_all():
    """Of numbers whose squares have no digits left for their spread."""
    rows = torch.randn(1000, 2, dtype=torch.float64) + 1e9
    moments = Moments()
    for part in (rows[:1], rows[1:1], rows[1:600], rows[600:]):
        moments.update(part)
    torch.testing.assert_close(moments.mean, rows.mean(0), rtol=1e-15, atol=0)
    torch.testing.assert_close(moments.std, rows.std(0, correction=0), rtol=1e-7, atol=0)
    assert moments.count == 1000


@pytest.mark.parametrize("values", [[np.inf, 1, 2], [1, np.inf, 2], [1, 2, -np.inf]])
def test_moments_of_parts_are_infinite_where_a_number_is(values):
    moments, rows = Moments(), torch.tensor(values, dtype=torch.float64)
    for row in rows:
        moments.update(row[None])
    assert moments.mean == rows.mean()
    assert moments.std.isnan()


@pytest.mark.parametrize("classes", [False, True])
def test_contexts_and_classes(path, classes):
    name = "b" if path.suffix == ".parquet" else "2"
    data = streamed(path, context=Columns([name], classes))
    batch = Batches(data, 50, seed=0).batch(7)
    assert isinstance(batch, Conditioned)
    assert batch.rows.shape == (50, 2)
    wanted = torch.from_numpy(table()[batch.rows[:, 0].long().numpy(), 1])
    if classes:
        assert data.condition.classes == [3, 4, 5]
        assert torch.equal(batch.context, wanted.long() - 3)
    else:
        assert torch.equal(batch.context, wanted.float()[:, None])
        kept = np.delete(table()[:, 1], data.validation.rows[:, 0].long().numpy())
        torch.testing.assert_close(data.condition.mean, torch.tensor([kept.mean()]).float())
    assert data.validation.context.shape[0] == 150
    assert data.mean.shape == (2,)


def test_images_stay_in_their_file(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (300, 4, 4, 3), dtype=np.uint8)
    np.save(tmp_path / "i.npy", images)
    data = load(tmp_path / "i.npy", stream=True)
    assert (data.shape, data.bits, data.mean) == ((3, 4, 4), 8, None)
    found = torch.cat([pass_of(data, size=27), data.validation]).flatten(1)
    assert sorted(found.tolist()) == sorted(images.transpose(0, 3, 1, 2).reshape(300, -1).tolist())


def test_parts_are_what_is_read_at_once(path, tmp_path):
    wanted, header = read(path)
    parts, total = read_parts(path, numbers=3 * 128)
    parts = [*parts]
    assert torch.equal(torch.cat([rows for rows, _ in parts]), wanted)
    assert all(names == header for _, names in parts)
    assert (total, len(parts)) == (ROWS, 12)
    lines = "\n".join(",".join(map(str, row)) for row in table().tolist())
    (tmp_path / "t.csv").write_text("x,y,z\n" + lines)
    parts = [*read_parts(tmp_path / "t.csv", numbers=300).parts]
    assert len(parts) == 15
    assert torch.equal(torch.cat([rows for rows, _ in parts]), wanted)
    assert {tuple(names) for _, names in parts} == {("x", "y", "z")}


def _numbers(value):
    def write(path):
        rows = table()
        rows[700, 2] = value
        (write_parquet if path.suffix == ".parquet" else np.save)(path, rows)

    return write


def _columns(**columns):
    return lambda path: parquet.write_table(pyarrow.table(columns), path, row_group_size=2)


def _cut(path):
    write_parquet(path, table())
    path.write_bytes(path.read_bytes()[:-200])


def _damaged(path):
    write_parquet(path, table())
    data = bytearray(path.read_bytes())
    data[2000:6000] = b"\xff" * 4000
    path.write_bytes(data)


BAD = {
    "nan": ("t.npy", _numbers(np.nan), "t.npy, row 701, column 3: holds NaN"),
    "nan in a group": ("t.parquet", _numbers(np.nan), "t.parquet, row 701, column 3 (c): holds NaN"),
    "too large": ("t.parquet", _numbers(1e39), "row 701, column 3 (c): holds 1e+39, which"),
    "null": ("t.parquet", _columns(a=[1, 2, 3, None, 5.0]), "t.parquet, row 4, column 1 (a): is empty"),
    "text": ("t.parquet", _columns(a=[1.0, 2], b=["x", "y"]), "column 'b' holds values of type string"),
    "truth": ("t.parquet", _columns(a=[True, False]), "column 'a' holds values of type bool"),
    "lists": ("t.parquet", _columns(a=[[1.0], [2.0]]), "column 'a' holds values of type list"),
    "no rows": ("t.parquet", _columns(a=pyarrow.array([], "float")), "holds no rows of numbers"),
    "no columns": ("t.parquet", _columns(), "t.parquet: holds no rows of numbers"),
    "one row": ("t.parquet", _columns(a=[1.0]), "t.parquet: needs 2 rows at least, has 1"),
    "constant": ("t.parquet", _columns(a=[1.0] * 5), "t.parquet, column 1 (a): constant"),
    "cut": ("t.parquet", _cut, "t.parquet: not a readable Parquet file"),
    "damaged": ("t.parquet", _damaged, "t.parquet: not a readable Parquet file"),
    "empty": ("t.parquet", lambda path: path.touch(), "t.parquet: not a readable Parquet file"),
    "missing": ("t.parquet", lambda path: None, "t.parquet: no such file"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_files_are_one_line(tmp_path, case, stream):
    name, write, message = BAD[case]
    write(tmp_path / name)
    with pytest.raises(DataError) as caught:
        load(tmp_path / name, stream=stream)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_other_errors(path, tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"only \.npy and \.parquet files can be read in blocks"):
        load(tmp_path / "t.csv", stream=True)
    with pytest.raises(
        DataError, match=r"column 3( \(c\))?: holds .* but classes are whole numbers"
    ):
        streamed(path, context=Columns(["3"], True))
    file = open_blocks(path)
    if path.suffix == ".npy":
        np.save(path, table(200))
        with pytest.raises(DataError, match=r"t\.npy: has changed while it was read"):
            file.read(0)
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(DataError, match=r"t\.npy: not a readable \.npy file"):
            file.read(0)
    else:
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(DataError, match=r"need pyarrow: pip install 'pyflowkern\[parquet\]'"):
            load(path)
