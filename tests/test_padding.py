"""Padded rows: what may be read beside B, and that nothing else passes for it."""

from __future__ import annotations

import copy

import pytest
import torch

from loraxs_kernels.padded import PaddedB
from loraxs_kernels.padding import padded_rows, readable_columns


@pytest.mark.parametrize(("r", "wide"), [(1, 16), (4, 16), (12, 16), (16, 16), (20, 32), (25, 32), (64, 64)])
def test_rows_are_padded_by_zeros(r, wide):
    B = torch.randn(5, r)
    padded = padded_rows(B)
    assert torch.equal(padded, B) and readable_columns(padded) == wide and readable_columns(B) == r
    assert (padded is B) == (r == wide)
    if r < wide:
        around = padded.as_strided((5, wide), (wide, 1))
        assert torch.equal(around[:, :r], B) and not around[:, r:].any()
    assert padded_rows(padded) is padded


def test_only_what_is_known_to_be_zero_is_read():
    padded = padded_rows(torch.randn(5, 12))
    assert readable_columns(padded.t().t()) == readable_columns(padded[1:3]) == 16
    for other in (padded[:, :3], padded[:, 1:], padded[::2], padded.as_strided((4, 12), (16, 1), 1)):
        assert readable_columns(other) == other.shape[1]
    for other in (padded.clone(), copy.deepcopy(padded), torch.full((5, 16), torch.nan)[:, :12]):
        assert readable_columns(other) == 12 and readable_columns(padded_rows(other)) == 16
    storage = padded.untyped_storage()
    storage.zeros = (12, storage.data_ptr() + 16)  # noted of other memory, which has been given back since
    assert readable_columns(padded) == 12


def test_a_module_keeps_its_B_padded():
    B = torch.randn(5, 12)
    module = PaddedB()
    module.register_buffer("A", torch.randn(12, 3))
    module.register_buffer("B", B)
    twin, moved, assigned = (copy.deepcopy(module) for _ in range(3))
    moved.double().float()
    assigned.load_state_dict({"A": module.A, "B": B.clone()}, assign=True)
    kept = module.B
    module.B.zero_()
    module.load_state_dict({"A": module.A, "B": B})
    assert module.B is kept and torch.equal(kept, B)
    for each in (module, twin, moved, assigned):
        assert torch.equal(each.B, B) and readable_columns(each.B) == 16 and each.A.stride() == (3, 1)
        assert each.state_dict()["B"].is_contiguous()
    module.B = B[:3]
    assert torch.equal(module.B, B[:3]) and readable_columns(module.B) == 16
