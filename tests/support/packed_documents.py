"""Documents that can be told apart, and packed rows taken apart again."""

from __future__ import annotations

PAD = 99


def document(number: int, length: int) -> dict:
    ids = [1000 * number + i for i in range(length)]
    return {"input_ids": ids, "labels": [-100, *[i + 1 for i in ids[1:]]] if length > 1 else [7]}


def unpacked(row: dict, size: int) -> list[dict]:
    """Rebuild the documents of a row."""
    documents, start = [], 0
    assert {len(row[key]) for key in ("input_ids", "labels", "position_ids")} == {size}
    for length in row["seq_lens"]:
        end = start + length
        documents.append({"input_ids": row["input_ids"][start:end], "labels": row["labels"][start:end]})
        assert row["position_ids"][start:end] == list(range(length))
        start = end
    assert row["input_ids"][start:] == [PAD] * (size - start)
    assert row["labels"][start:] == [-100] * (size - start)
    last = row["seq_lens"][-1]
    assert row["position_ids"][start:] == list(range(last, last + size - start))
    assert max(row["position_ids"]) < size
    assert row["seq_lens_padded"] == [*row["seq_lens"][:-1], last + size - start]
    return documents
