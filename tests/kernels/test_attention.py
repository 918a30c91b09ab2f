"""Which positions see which: the rule against a plain loop, and both forms that kernels read against the rule."""

from __future__ import annotations

import random

import pytest
import torch
from support.packed import varlen_by_loop
from torch.nn.attention.flex_attention import create_mask
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention

from nemo_automodel.kernels import attention
from nemo_automodel.kernels.attention import (
    BLOCK,
    PackedLayout,
    additive_mask,
    attention_rule,
    block_mask,
    document_borders,
    document_numbers,
    flex_attention,
    packed_mask,
)

SETTINGS = [{}, {"window": 3}, {"chunk": 4}]


def make_layout(rows: list[list[list[int]]], seq_len: int) -> PackedLayout:
    """Return the layout of rows of documents; a document is the length of its prefix and of its branches."""
    lengths = [[sum(document) for document in row] for row in rows]
    most = max(map(len, lengths))
    seq_lens = torch.tensor([row + [-1000] * (most - len(row)) for row in lengths])
    positions, branches = torch.zeros(len(rows), seq_len, dtype=torch.long), torch.zeros(len(rows), seq_len).long()
    for row, documents in enumerate(rows):
        place = 0
        for prefix, *parts in documents:
            for branch, length in enumerate((prefix, *parts)):
                start = prefix if branch else 0
                positions[row, place : place + length] = torch.arange(start, start + length)
                branches[row, place : place + length] = branch
                place += length
        positions[row, place:] = torch.arange(seq_len - place)
    return PackedLayout(document_numbers(seq_lens, seq_len), positions, branches)


def allowed(rows: list[list[list[int]]], row: int, query: int, key: int, window=None, chunk=None) -> bool:
    """Say by looking up both places in the nested lists whether the query may see the key."""

    def place(index: int) -> tuple[int, int, int]:
        for number, document in enumerate(rows[row]):
            for branch, length in enumerate(document):
                if index < length:
                    return number, branch, index + (document[0] if branch else 0)
                index -= length
        return -1, 0, 0  # padding

    (query_document, query_branch, query_position), (key_document, key_branch, key_position) = place(query), place(key)
    if query_document != key_document or key > query:
        return False
    if query_document == -1:
        return True
    if key_branch not in (0, query_branch):
        return False
    if window is not None and query_position - key_position >= window:
        return False
    return chunk is None or query_position // chunk == key_position // chunk


ROWS = [[[5, 3, 4], [4], [1, 2, 2]], [[21]], [[2, 1, 1, 1], [13]]]


def test_document_numbers():
    documents = document_numbers(torch.tensor([[2, 3, -1000], [6, -1000, -1000]]), 6)
    assert documents.tolist() == [[0, 0, 1, 1, 1, 3], [0] * 6]


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_mask_allows_what_a_loop_allows(settings):
    layout = make_layout(ROWS, 24)
    mask = packed_mask(layout, **settings)
    for row, query, key in torch.cartesian_prod(torch.arange(3), torch.arange(24), torch.arange(24)).tolist():
        if query >= sum(map(sum, ROWS[row])) and settings:
            continue  # what padding sees of padding is of no interest
        assert mask[row, 0, query, key] == allowed(ROWS, row, query, key, **settings), (row, query, key)
    assert mask.any(dim=-1).all(), "a position that sees nothing makes NaN"
    numbers = additive_mask(mask, torch.bfloat16)
    assert numbers.dtype == torch.bfloat16
    assert torch.equal(numbers == 0, mask)
    assert numbers.isfinite().all()


@pytest.mark.parametrize("settings", SETTINGS)
def test_flex_attention_reads_the_rule_as_the_mask_does(settings):
    layout = make_layout(ROWS, 24)
    rule = attention_rule(layout, **settings)
    assert torch.equal(create_mask(rule, 3, 1, 24, 24, device="cpu"), packed_mask(layout, **settings))


def random_rows(rng: random.Random, num_rows: int, seq_len: int) -> list[list[list[int]]]:
    rows = []
    for _ in range(num_rows):
        row, left = [], seq_len - rng.randrange(60)
        while left > 5:
            document = [rng.randrange(1, rng.choice([20, 200, 500]))]
            document += [rng.randrange(1, rng.choice([10, 300])) for _ in range(rng.choice([0, 0, 2, 4]))]
            if sum(document) <= left:
                row.append(document)
            left -= sum(document)
        rows.append(row or [[seq_len]])
    return rows


@pytest.mark.parametrize("has_branches", [False, True])
@pytest.mark.parametrize("settings", [{}, {"window": 100}, {"window": 300}, {"chunk": 150}])
def test_blocks_left_out_hold_nothing_and_full_blocks_all(settings, has_branches):
    rng = random.Random(0)
    num_skipped = num_full = 0
    for seq_len in (640, 700, 90):
        rows = random_rows(rng, 2, seq_len)
        if not has_branches:
            rows = [[[sum(document)] for document in row] for row in rows]
        layout = make_layout(rows, seq_len)
        if not has_branches:
            layout = PackedLayout(layout.documents_BS, layout.positions_BS)
        mask, blocks = packed_mask(layout, **settings), block_mask(layout, **settings)
        num_blocks = -(-seq_len // BLOCK)
        for row in range(2):
            for query in range(num_blocks):
                asked = blocks.kv_indices[row, 0, query][: blocks.kv_num_blocks[row, 0, query]].tolist()
                full = blocks.full_kv_indices[row, 0, query][: blocks.full_kv_num_blocks[row, 0, query]].tolist()
                assert not set(asked) & set(full)
                for key in range(num_blocks):
                    pairs = mask[row, 0, query * BLOCK : (query + 1) * BLOCK, key * BLOCK : (key + 1) * BLOCK]
                    if key in full:
                        assert pairs.all()
                        num_full += 1
                    elif key not in asked:
                        assert not pairs.any()
                        num_skipped += key <= query
    assert num_skipped or has_branches
    assert num_full or "chunk" in settings or settings.get("window") == 100


def test_flex_attention_computes_what_the_mask_says():
    """On the CPU FlexAttention runs uncompiled and forward only, through the same blocks and rule."""
    generator = torch.Generator().manual_seed(0)
    layout = make_layout(random_rows(random.Random(1), 2, 300), 300)
    q = torch.randn(2, 4, 300, 16, generator=generator)
    k, v = (torch.randn(2, 2, 300, 16, generator=generator) for _ in range(2))
    for settings in ({}, {"window": 50}):
        found = flex_attention(q, k, v, block_mask(layout, **settings), 0.3)
        expected = torch.nn.functional.scaled_dot_product_attention(
            q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), packed_mask(layout, **settings), scale=0.3
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_new_documents_compile_nothing_new():
    """Shapes, windows and the presence of branches do; Dynamo is asked, without a compiler behind it."""
    num_graphs = 0

    def count(graph, example_inputs):
        nonlocal num_graphs
        num_graphs += 1
        return graph.forward

    compiled = torch.compile(torch_flex_attention, dynamic=False, backend=count)
    rng = random.Random(0)

    def graphs_after(num_rows: int, has_branches: bool = True, **settings: int) -> int:
        layout = make_layout(random_rows(rng, num_rows, 256), 256)
        if not has_branches:
            layout = PackedLayout(layout.documents_BS, layout.positions_BS)
        q, k = torch.randn(num_rows, 4, 256, 16), torch.randn(num_rows, 2, 256, 16)
        with torch.no_grad():
            compiled(q, k, k, block_mask=block_mask(layout, **settings), scale=0.3, enable_gqa=True)
        return num_graphs

    torch.compiler.reset()
    assert [graphs_after(2) for _ in range(3)] == [1, 1, 1]
    assert [graphs_after(2, has_branches=False) for _ in range(2)] == [2, 2]
    assert [graphs_after(2, window=50) for _ in range(2)] == [3, 3]
    assert [graphs_after(1) for _ in range(2)] == [4, 4]
    assert graphs_after(2) == 4


def test_borders_of_documents():
    seq_lens = torch.tensor([[3, 4, -1000], [10, -1000, -1000], [2, 2, 5]])
    borders, longest = document_borders(seq_lens, 10)
    assert borders.dtype == torch.int32
    assert len(borders) == attention._SEGMENTS_AT_ONCE + 1
    assert borders[:9].tolist() == [0, 3, 7, 10, 20, 22, 24, 29, 30]
    assert set(borders[8:].tolist()) == {30}, "empty documents fill up"
    assert longest == 10
    assert document_borders(torch.tensor([[300, 100]]), 4096)[1] == 4096, "the padding is the longest document"
    assert document_borders(torch.tensor([[300, 200]] * 2), 512)[1] == 512
    assert document_borders(torch.tensor([[100] * 10]), 1024)[1] == 128


def test_varlen_attention_computes_each_document_alone(monkeypatch):
    """The kernel runs on a GPU alone; here a plain loop over the borders stands for it."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_loop)
    attention._varlen_arguments.cache_clear()
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 20, 8, generator=generator)
    k, v = (torch.randn(2, 2, 20, 8, generator=generator) for _ in range(2))
    seq_lens = torch.tensor([[5, 9], [20, -1000]])
    found = attention.varlen_attention(q, k, v, *document_borders(seq_lens, 20), 0.2)
    mask = packed_mask(PackedLayout(document_numbers(seq_lens, 20), torch.zeros(2, 20).long()))
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), mask, scale=0.2
    )
    attention._varlen_arguments.cache_clear()
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-5, atol=1e-6)
