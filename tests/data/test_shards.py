import bz2
import gzip
import io
import json
import lzma

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from theodolite.core.errors import DataError, InputError, require
from theodolite.data.importance_resampling.output import join_parts, write_part
from theodolite.data.shards import Corpus, FileShard, MemoryShard

PACK = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: require("zstandard", "data").ZstdCompressor().compress(content),
}
TEXTS = ["first text", "second, longer than a block of sixteen bytes", "Größe 3", "x", "last one"]


def write_lines(path, texts, end="\n", last=True):
    whole = end.join(json.dumps({"text": text, "n": i}, ensure_ascii=False) for i, text in enumerate(texts))
    path.write_bytes((whole + (end if last else "")).encode())
    return path


def write_parquet(path, texts, group=2, **options):
    pq.write_table(pa.table({"n": range(len(texts)), "text": texts}), path, row_group_size=group, **options)
    return path


def read(*urls, **options):
    return list(Corpus.from_files([*urls], **options).texts())


# ---- every line once, wherever the borders are


@settings(max_examples=80, deadline=None)
@given(
    lines=st.lists(st.text("ab é", max_size=30), max_size=12),
    block=st.integers(1, 50),
    end=st.sampled_from(["\n", "\r\n"]),
    last=st.booleans(),
)
def test_every_line_is_read_once_by_the_block_it_starts_in(tmp_path_factory, lines, block, end, last):
    folder = tmp_path_factory.mktemp("lines")
    whole = end.join(lines) + (end if last else "")
    (folder / "a.txt").write_bytes(whole.encode())
    expected = [line for line in lines if line.strip()]
    if not whole:
        with pytest.raises(DataError, match="every file is empty"):
            Corpus.from_files(folder / "a.txt")
        return
    corpus = Corpus.from_files(folder / "a.txt", block_bytes=block)
    assert list(corpus.texts()) == expected
    starts = [shard.start for shard in corpus.shards]
    assert starts == list(range(0, len(whole.encode()), block))
    for shard in corpus.shards:  # and each part tells the same rows when it is asked for some
        own = list(shard.texts())
        some = np.arange(len(own))[::2]
        assert list(shard.texts(some)) == own[::2]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("block", [1, 7, 16, 64, 1 << 20])
def test_json_lines_at_any_block(tmp_path, end, last, block):
    path = write_lines(tmp_path / "a.jsonl", TEXTS, end, last)
    assert read(path, block_bytes=block) == TEXTS


def test_a_mark_of_byte_order_and_blank_lines_are_no_documents(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbffirst\n\n \t\nsecond\n")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "third"}\n\n')
    assert read(tmp_path / "a.txt", tmp_path / "b.jsonl") == ["first", "second", "third"]


# ---- every form


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_compressed_files_also_of_several_frames(tmp_path, suffix):
    parts = [json.dumps({"text": text}).encode() + b"\n" for text in TEXTS]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(b"".join(map(PACK[suffix], parts)))
    corpus = Corpus.from_files(path, block_bytes=8)
    assert len(corpus.shards) == 1
    assert list(corpus.texts()) == TEXTS


def test_parquet_a_shard_for_each_row_group(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", TEXTS)
    corpus = Corpus.from_files(path)
    assert [shard.group for shard in corpus.shards] == [0, 1, 2]
    assert list(corpus.texts()) == TEXTS
    assert list(corpus.shards[1].texts(np.array([1]))) == [TEXTS[3]]
    big = write_parquet(tmp_path / "b.parquet", [str(i) for i in range(5000)], group=5000)
    (shard,) = Corpus.from_files(big).shards
    assert list(shard.texts(np.array([0, 1023, 1024, 4999]))) == ["0", "1023", "1024", "4999"]


def test_patterns_addresses_and_repeated_names(tmp_path):
    for i, text in enumerate(TEXTS):
        write_lines(tmp_path / f"{i}.jsonl", [text])
    assert read(f"{tmp_path}/*.jsonl") == TEXTS
    assert read(f"{tmp_path}/*.jsonl", tmp_path / "0.jsonl") == TEXTS
    memory = fsspec.filesystem("memory")
    memory.pipe("/dsir/a.jsonl", b"".join(json.dumps({"text": t}).encode() + b"\n" for t in TEXTS))
    assert read("memory://dsir/a.jsonl", block_bytes=20) == TEXTS
    assert read("memory://dsir/*.jsonl") == TEXTS
    (tmp_path / "odd[1].jsonl").write_bytes(b'{"text": "odd"}\n')
    assert read(tmp_path / "odd[1].jsonl") == ["odd"]


def test_a_dataset_is_read_in_place():
    made = require("datasets", "language").Dataset.from_dict({"text": TEXTS, "n": list(range(5))})
    corpus = Corpus.of(made)
    assert list(corpus.texts()) == TEXTS
    assert list(corpus.shards[0].texts(np.array([1, 4]))) == [TEXTS[1], TEXTS[4]]
    file = io.BytesIO()
    corpus.shards[0].copy(np.array([2]), file, "jsonl")
    assert json.loads(file.getvalue()) == {"text": TEXTS[2], "n": 2}
    with pytest.raises(DataError, match="its columns are: text, n"):
        Corpus.from_dataset(made, "body")


def test_what_is_a_corpus():
    assert list(Corpus.of(("a", "b")).texts()) == ["a", "b"]
    assert list(Corpus.of(np.array(["a", "b"])).texts()) == ["a", "b"]
    assert list(Corpus.of(pd.Series(["a", "b"], index=[7, 3])).texts()) == ["a", "b"]
    corpus = Corpus.from_texts(["a"] * 25_000)
    assert [shard.first for shard in corpus.shards] == [0, 10_000, 20_000]
    assert Corpus.of(corpus) is corpus
    for wrong in ("one string", np.array("one string"), iter(["a"]), 3):
        with pytest.raises(InputError, match="a corpus is a list of strings"):
            Corpus.of(wrong)
    with pytest.raises(DataError, match="document 1 must be a string, it is a NoneType"):
        list(MemoryShard(["a", None], None, 0).texts())


# ---- what is wrong is told with its place


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "cut', "byte 15: the line is not JSON"),
        (b"[1, 2]", "must be an object, this is a list"),
        (b'{"body": "b", "id": 1}', "no field 'text'; the fields are: body, id"),
        (b'{"text": null}', "is not text, it is a NoneType"),
        (b'{"text": "\xff"}', "byte 15: the line is not JSON"),
        (b"[" * 3000, "byte 15: the line is not JSON"),
    ],
)
def test_bad_lines_name_file_and_byte_or_are_left_out(tmp_path, line, words):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "ok"}\n' + line + b'\n{"text": "end"}\n')
    for block in (10, 1 << 20):
        with pytest.raises(DataError, match=r"a\.jsonl") as error:
            read(path, block_bytes=block)
        assert words in str(error.value)
        shards = Corpus.from_files(path, block_bytes=block, on_error="skip").shards
        assert [text for shard in shards for text in shard.texts()] == ["ok", None, "end"]


def test_bad_text_and_parquet(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good\nb\xffd\n")
    with pytest.raises(DataError, match="byte 6: not UTF-8"):
        read(tmp_path / "a.txt")
    write_parquet(tmp_path / "a.parquet", ["a", None, "c"])
    with pytest.raises(DataError, match="row group 0, row 1"):
        read(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", on_error="skip") == ["a", "", "c"]
    with pytest.raises(DataError, match="its columns are: n, text"):
        read(tmp_path / "a.parquet", text_field="body")
    (tmp_path / "b.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read(tmp_path / "b.parquet")


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_broken_compressed_files(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(b"this is not compressed at all")
    with pytest.raises(DataError, match=r"broken|cannot read"):
        read(path)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_compressed_file_that_ends_too_early(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    text = np.random.default_rng(0).integers(65, 90, (1000, 60)).astype(np.uint8)
    text[:, -1] = 10
    whole = PACK[suffix](text.tobytes())
    path.write_bytes(whole)
    assert len(read(path)) == 1000
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="ends too early"):
        read(path)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match="there is no file"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="there is no file"):
        read(tmp_path / "*.jsonl")
    with pytest.raises(DataError, match="is a folder; name its files"):
        read(tmp_path)
    (tmp_path / "a.csv").write_text("a")
    with pytest.raises(DataError, match=r"a\.csv: a corpus is made of \.jsonl"):
        read(tmp_path / "a.csv")
    with pytest.raises(InputError, match="block_bytes"):
        read(tmp_path / "a.csv", block_bytes=0)


def test_places_and_identity(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", TEXTS)
    first, *_ = Corpus.from_files(path, block_bytes=1 << 20).shards
    assert isinstance(first, FileShard)
    offset = path.read_bytes().index(b'{"text": "x"')
    assert first.place(3) == f"{path}, byte {offset}"
    write_lines(path, [*TEXTS, "more"])
    assert Corpus.from_files(path).shards[0].identity != first.identity
    texts = [Corpus.from_texts(t).shards[0].identity for t in (["ab", "c"], ["a", "bc"], ["ab", "c"])]
    assert texts[0] == texts[2] != texts[1]


# ---- writing


def test_parts_are_copies_in_order(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", TEXTS, "\r\n", last=False)
    shard = Corpus.from_files(path).shards[0]
    write_part(shard, np.array([1, 4]), str(tmp_path), "part.jsonl", "jsonl")
    lines = path.read_bytes().split(b"\r\n")
    assert (tmp_path / "part.jsonl").read_bytes() == lines[1] + b"\n" + lines[4] + b"\n"
    assert not list(tmp_path.glob(".*unfinished"))


def test_parquet_keeps_its_columns_and_becomes_json(tmp_path):
    corpus = Corpus.from_files(write_parquet(tmp_path / "a.parquet", TEXTS))
    folder = tmp_path / "parts"
    folder.mkdir()
    names = [f"part-{i}.parquet" for i in range(3)]
    for shard, rows, name in zip(corpus.shards, ([0], [], [0]), names, strict=True):
        write_part(shard, np.array(rows, np.int64), str(folder), name, "parquet")
    join_parts(str(folder), names, str(tmp_path / "out.parquet"), "parquet")
    assert not folder.exists()
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == [{"n": i, "text": TEXTS[i]} for i in (0, 4)]
    file = io.BytesIO()
    corpus.shards[1].copy(np.array([1]), file, "jsonl")
    assert json.loads(file.getvalue()) == {"n": 3, "text": "x"}


def test_parquet_files_of_different_columns_do_not_go_into_one(tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    write_parquet(folder / "a.parquet", TEXTS)
    pq.write_table(pa.table({"text": TEXTS}), folder / "b.parquet")
    with pytest.raises(DataError, match="different columns"):
        join_parts(str(folder), ["a.parquet", "b.parquet"], str(tmp_path / "out.parquet"), "parquet")
    assert not (tmp_path / "out.parquet").exists()


def test_text_becomes_json_under_the_field(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    shard = Corpus.from_files(tmp_path / "a.txt").shards[0]
    file = io.BytesIO()
    shard.copy(np.array([1]), file, "jsonl")
    assert file.getvalue() == b'{"text": "two"}\n'
    half = Corpus.from_texts(["a \ud800"]).shards[0]
    file = io.BytesIO()
    half.copy(np.array([0]), file, "jsonl")
    assert json.loads(file.getvalue()) == {"text": "a \ud800"}
