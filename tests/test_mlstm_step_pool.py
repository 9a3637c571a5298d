"""States in rows of a pool, read and written by index; results in storage that the caller gives."""

from __future__ import annotations

import pytest
import torch
from mlstm_cases import FLAGS, MLSTMCase
from mlstm_step_cases import EACH_BACKEND, EVERY_BACKEND, Tokens, halved, step_inputs, with_dtypes

import xlstm_kernels as xk
from xlstm_kernels.ops.mlstm_step import op

# Of a pool of 9 rows.
ROWS, PADDED = (7, 2, 4), (7, -1, 4)
INDEX_TYPES = pytest.mark.parametrize("index_type", [torch.int32, torch.int64])
HALF = pytest.mark.parametrize("half", [False, True])
CANARY = 7.0


def pooled(
    case: MLSTMCase, rows: tuple[int, ...], half: bool = False, gap: int = 0
) -> tuple[Tokens, xk.MLSTMState, xk.MLSTMState]:
    """Tokens, states, and a pool with these states in `rows`, canaries in the others and in `gap`
    elements between any two rows."""
    tokens, state = step_inputs(case, one=case.T == 1)
    state = halved(state) if half else state
    pool = []
    for part in state:
        row = torch.empty(part.shape[1:])
        wide = torch.full((9, row.numel() + gap), CANARY, dtype=part.dtype)
        view = wide.as_strided((9, *row.shape), (wide.stride(0), *row.stride()))
        for b, to in enumerate(rows):
            if to >= 0:
                view[to] = part[b]
        pool.append(view)
    return tokens, state, xk.MLSTMState(*pool)


def check_canaries(pool: xk.MLSTMState, written: set[int]) -> None:
    for part in pool:
        wide = part.as_strided((9, part.stride(0)), (part.stride(0), 1))
        assert (wide[:, part[0].numel() :] == CANARY).all()
        for row in set(range(9)) - written:
            assert (wide[row] == CANARY).all(), row


@HALF
@INDEX_TYPES
@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("rows", [ROWS, PADDED, (-1, -5, -1)])
@EVERY_BACKEND
def test_rows_of_a_pool(backend, rows, T, index_type, half):
    case = MLSTMCase(backend, B=3, T=T)
    tokens, state, pool = pooled(case, rows, half, gap=5)
    expected_h, expected = xk.mlstm_step(*tokens, state, backend=backend)
    index = torch.tensor(rows, dtype=index_type)
    before = [part.clone() for part in pool]
    h, after = xk.mlstm_step(*tokens, pool, state_index=index, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(pool, before, strict=True))
    in_place, same = xk.mlstm_step(*tokens, pool, state_index=index, inplace=True, backend=backend)
    assert all(x is y for x, y in zip(same, pool, strict=True))
    for b, row in enumerate(rows):
        for part, new, kept in zip(expected, after, pool, strict=True):
            if row < 0:
                assert not new[b].any()
            else:
                assert torch.equal(new[b], part[b]) and torch.equal(kept[row], part[b])
        for result in (h, in_place):
            assert torch.equal(result[b], expected_h[b] if row >= 0 else expected_h[b] * 0)
    check_canaries(pool, {row for row in rows if row >= 0})


@HALF
@INDEX_TYPES
@pytest.mark.parametrize("rows", [ROWS, PADDED])
@EVERY_BACKEND
def test_the_state_after_each_token_has_a_row(backend, rows, index_type, half):
    case = MLSTMCase(backend, B=3, T=3)
    tokens, state, pool = pooled(case, rows, half, gap=3)
    expected_h, expected = xk.mlstm_step(*tokens, state, all_states=True, backend=backend)
    # The first goes back to where it came from; not every state is kept.
    saved = ((7, 0, 1), (8, 3, 5), (-1, 6, 4))
    versions = [part._version for part in pool]
    h, _ = xk.mlstm_step(
        *tokens,
        pool,
        inplace=True,
        state_index=torch.tensor(rows, dtype=index_type),
        save_index=torch.tensor(saved, dtype=index_type),
        backend=backend,
    )
    assert all(part._version > v for part, v in zip(pool, versions, strict=True))
    written = {row for row in rows if row >= 0}
    for b, row in enumerate(rows):
        assert torch.equal(h[b], expected_h[b] if row >= 0 else expected_h[b] * 0)
        for t, to in enumerate(saved[b]):
            if row >= 0 and to >= 0:
                written.add(to)
                for part, new in zip(pool, expected, strict=True):
                    assert torch.equal(part[to], new[b, t])
    check_canaries(pool, written)


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: "-".join(flags.values()))
@EVERY_BACKEND
def test_all_states_from_a_pool(backend, flags):
    case = MLSTMCase(backend, B=3, T=3, **flags)
    tokens, state, pool = pooled(case, PADDED)
    how = {**flags, "all_states": True, "backend": backend}
    expected = xk.mlstm_step(*tokens, state, **how)
    got = xk.mlstm_step(*tokens, pool, state_index=torch.tensor(PADDED), **how)
    for x, y in zip((got[0], *got[1]), (expected[0], *expected[1]), strict=True):
        assert torch.equal(x[[0, 2]], y[[0, 2]]) and not x[1].any()


@EVERY_BACKEND
def test_padding_is_not_read(backend):
    """What stands in a padded sequence's tokens, NaN too, reaches nothing."""
    tokens, state, pool = pooled(MLSTMCase(backend, B=3, T=2), PADDED)
    expected = xk.mlstm_step(*tokens, state, backend=backend)
    for x in tokens:
        x[1] = torch.nan
    index = torch.tensor(PADDED)
    h, after = xk.mlstm_step(*tokens, pool, state_index=index, inplace=True, backend=backend)
    assert torch.equal(h[[0, 2]], expected[0][[0, 2]]) and not h[1].any()
    assert all(part[:9].isfinite().all() for part in after)


@pytest.mark.parametrize("B", [1, 0])
@EVERY_BACKEND
def test_large_heads_and_no_sequences(backend, B):
    tokens, state, pool = pooled(MLSTMCase(backend, B=B, T=2, H=1, K=130, V=520), ROWS[:B])
    expected_h, expected = xk.mlstm_step(*tokens, state, backend=backend)
    index = torch.tensor(ROWS[:B], dtype=torch.int64)
    h, _ = xk.mlstm_step(*tokens, pool, state_index=index, inplace=True, backend=backend)
    assert torch.equal(h, expected_h)
    for part, new in zip(pool, expected, strict=True):
        assert torch.equal(part[list(ROWS[:B])], new)


@HALF
@pytest.mark.parametrize("T", [1, 4])
@with_dtypes("cpu")
def test_nothing_is_allocated_in_place_with_out(backend, dtype, shape, T, half):
    B, H, K, V = shape
    case = MLSTMCase(backend, B=B, T=T, H=H, K=K, V=V, dtype=dtype)
    tokens, state, pool = pooled(case, ROWS, half and dtype != torch.float64)
    expected_h, _ = xk.mlstm_step(*tokens, state, backend=backend)
    tokens[3:] = [gate.to(dtype) for gate in tokens[3:]]  # as a layer's own projection gives them
    index, save = torch.tensor(ROWS), torch.tensor([[7, 2, 4]] * T).T.reshape(tokens[3].shape[:-1])
    save = torch.where(torch.arange(save.numel()).view(save.shape) % T == T - 1, save, -1)
    out = torch.empty_like(tokens[2])
    for how in ({}, {"save_index": save}):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            h, _ = xk.mlstm_step(
                *tokens, pool, state_index=index, inplace=True, out=out, backend=backend, **how
            )
        ran = {event.key for event in profile.key_averages()}
        # Reading the rows' numbers, which returns the index itself twice.
        reads = {"aten::resolve_conj", "aten::resolve_neg"}
        assert h is out and ran - reads == {"xlstm_kernels::mlstm_step_update"}
        assert out.isfinite().all() and out.shape == expected_h.shape


@pytest.mark.parametrize("inplace", [False, True])
@EVERY_BACKEND
def test_out_takes_h(backend, inplace):
    token, state = step_inputs(MLSTMCase(backend, T=1))
    expected, _ = xk.mlstm_step(*token, state, backend=backend)
    out = torch.empty_like(expected)
    version = out._version
    h, _ = xk.mlstm_step(*token, state, inplace=inplace, out=out, backend=backend)
    assert h is out and torch.equal(out, expected) and out._version > version


CASE = MLSTMCase("cpu", B=3, T=2)
WRONG = [
    ({"state_index": [0, 1, 2]}, TypeError, "state_index must be a tensor, got list"),
    (
        {"state_index": torch.zeros(2).long()},
        ValueError,
        r"state_index must be \(B,\) = \(3,\) int",
    ),
    ({"state_index": torch.zeros(3)}, ValueError, r"state_index must be .* int64, got .*float32"),
    (
        {"save_index": torch.zeros(3, 2).long()},
        ValueError,
        "save_index must be None without state_",
    ),
    (
        {"state_index": torch.arange(3), "save_index": torch.zeros(3, 2).long()},
        ValueError,
        "save_index must be None without state_index and inplace=True, which are given and False",
    ),
    (
        {"state_index": torch.arange(3), "save_index": torch.zeros(3).long(), "inplace": True},
        ValueError,
        r"save_index must be \(B, T\) = \(3, 2\) int32 or int64, got \(3,\) torch.int64",
    ),
    ({"inplace": True, "all_states": True}, ValueError, "all_states must be False with inplace"),
    (
        {"out": torch.empty(3, 2, 2, 41)},
        ValueError,
        r"out must be \(B, T, H, V\) = \(3, 2, 2, 40\)",
    ),
    ({"out": torch.empty(3, 2, 2, 40).half()}, TypeError, "out must have q's dtype torch.float32"),
    ({"out": torch.empty(3, 2, 40, 2).mT}, ValueError, "out must be contiguous, got strides"),
    ({"out": 1.0}, TypeError, "out must be a tensor, got float"),
]


@pytest.mark.parametrize(("changes", "error", "message"), WRONG)
def test_wrong_arguments_are_named(changes, error, message):
    tokens, state = step_inputs(CASE, one=False)
    with pytest.raises(error, match=f"^mlstm_step: {message}"):
        xk.mlstm_step(*tokens, state, **changes)


@EVERY_BACKEND
def test_wrong_pools_and_rows_are_named(backend):
    tokens, _, pool = pooled(CASE, ROWS)
    how = {"state_index": torch.tensor(ROWS), "backend": backend}

    def refused(error, message, state=pool, **changes):
        before = [part.clone() for part in state]
        with pytest.raises(error, match=f"^mlstm_step: {message}"):
            xk.mlstm_step(*tokens, state, **(how | changes))
        assert all(torch.equal(x, y) for x, y in zip(state, before, strict=True))

    refused(TypeError, "state.n must be torch.float32 with state_", pool._replace(n=pool.n.half()))
    refused(TypeError, r"state.c must be torch.float32 or", pool._replace(c=pool.c.half()))
    refused(
        ValueError, "state.c must have contiguous rows", pool._replace(c=pool.c.mT.contiguous().mT)
    )
    wide = pool.m[:1].expand(9, -1)
    refused(ValueError, "state.m must have contiguous rows that do not", pool._replace(m=wide))
    refused(ValueError, r"state.n must be \(P, H, K\) = \(9, 2, 24\)", pool._replace(n=pool.n[:8]))
    refused(
        ValueError,
        "state_index must be below the 9 rows of state, got 9",
        state_index=torch.tensor([1, 9, 2]),
    )
    own = "must give each state a row of its own with inplace=True, got"
    refused(
        ValueError,
        f"state_index {own} row 1 for sequences 0 and 2",
        state_index=torch.tensor([1, 3, 1]),
        inplace=True,
    )
    for save, got in (
        ([[0, 1], [2, 3], [1, 5]], "row 1 for sequences 0 and 2"),
        ([[0, 0], [2, 3], [4, 5]], "a row for two tokens of a sequence"),
        ([[0, 2], [-1, 3], [4, 5]], "row 2 of sequence 0, which sequence 1 reads"),
    ):
        refused(ValueError, f"save_index {own} {got}", inplace=True, save_index=torch.tensor(save))
    save = torch.tensor([[0, 1], [2, 3], [4, 9]])
    refused(ValueError, "save_index must be below the 9 rows", inplace=True, save_index=save)
    # Where nothing is written, sequences may share a row, as drafts of one prompt do.
    xk.mlstm_step(*tokens, pool, **(how | {"state_index": torch.tensor([7, 7, 7])}))


@pytest.mark.parametrize("name", ["state_index", "out"])
@EVERY_BACKEND
def test_no_gradient_through_pools_and_given_storage(backend, name):
    tokens, state = step_inputs(CASE, one=False)
    tokens[2].requires_grad_()
    how = {"state_index": torch.arange(3), "out": torch.empty(3, 2, 2, 40)}
    with pytest.raises(ValueError, match=f"^mlstm_step: {name} must be None where a gradient is"):
        xk.mlstm_step(*tokens, state, backend=backend, **{name: how[name]})


@pytest.mark.medium
@HALF
@pytest.mark.parametrize("backend", EACH_BACKEND)
def test_opcheck(backend, half):
    tokens, _, pool = pooled(MLSTMCase(backend, B=3, T=2), PADDED, half)
    index, save = torch.tensor(PADDED), torch.tensor([[0, 1], [2, 3], [-1, 4]])
    options = ("exp", "max", 0.5, 1e-6, backend)
    for all_states in (False, True):
        torch.library.opcheck(op.forward, (*tokens, *pool, index, all_states, *options))
    h = torch.zeros_like(tokens[2])
    for saved in (None, save):
        torch.library.opcheck(op.update, (*tokens, *pool, h, index, saved, *options))


@pytest.mark.medium
@pytest.mark.parametrize("how", [{}, {"inplace": True}, {"inplace": True, "save": True}])
@EVERY_BACKEND
def test_compiles_without_breaks(backend, how):
    torch.compiler.reset()
    compiled = torch.compile(xk.mlstm_step, fullgraph=True, backend="aot_eager")
    how = {**how, "state_index": torch.tensor(PADDED), "backend": backend}
    if how.pop("save", False):
        how["save_index"] = torch.tensor([[0, 1], [2, 3], [-1, 4]])
    results = []
    for step in (compiled, xk.mlstm_step):
        tokens, _, pool = pooled(MLSTMCase(backend, B=3, T=2), PADDED)
        h, after = step(*tokens, pool, out=torch.empty_like(tokens[2]), **how)
        results.append([h, *after, *pool])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@EVERY_BACKEND
def test_states_by_name_are_rows(backend):
    """A decoding loop with rows that come and go gives each sequence what it gets alone."""
    inputs, state = step_inputs(MLSTMCase(backend, B=4, T=6), one=False)
    pool = xk.MLSTMState(*(torch.zeros(5, *part.shape[1:]) for part in state))
    for part, new in zip(pool, state, strict=True):
        part[:4] = new
    expected_h, _ = xk.mlstm_step(*inputs, state, backend=backend)
    active = ((0, 1, 2, 3), (3, 1), (1, 3, 0), (2,), (0, 1), (3, 0, 1))
    done = dict.fromkeys(range(4), 0)
    for sequences in active:
        token = [torch.stack([x[s, done[s]] for s in sequences]) for x in inputs]
        index = torch.tensor(sequences)
        h, _ = xk.mlstm_step(*token, pool, state_index=index, inplace=True, backend=backend)
        for b, s in enumerate(sequences):
            assert torch.equal(h[b], expected_h[s, done[s]])
            done[s] += 1
