"""Matrices as int8: never further off than half a step, however they are shaped, and the error that is said is the error."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.engine


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), scale=st.floats(1e-4, 1e3), seed=st.integers(0, 2**31))
def test_a_rounded_weight_is_at_most_half_a_step_off(rows: int, columns: int, scale: float, seed: int) -> None:
    from core.chat.projection import quantise

    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale
    weight[0] = 0.0
    rounded, scales, error = quantise(weight)
    back = rounded.float() * scales[:, None]
    assert bool(((back - weight).abs() <= scales[:, None] * 0.5001).all())
    size = float(weight.norm())
    assert error == pytest.approx(float((back - weight).norm()) / size if size else 0.0, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("rows", [1, 8, 9, 40])
@pytest.mark.parametrize("layout", ["plain", "packed", "int8"])
def test_few_rows_and_many_and_an_adapter_are_multiplied_alike(rows: int, layout: Any) -> None:
    from core.chat.adapter import LowRank
    from core.chat.projection import can_pack, make_projection

    if layout == "packed" and not can_pack(torch.bfloat16, torch.device("cpu")):
        pytest.skip("oneDNN multiplies no bfloat16 here")
    random = torch.Generator().manual_seed(rows)
    weight, bias, a, b, x = (
        torch.randn(*shape, generator=random).bfloat16() for shape in ((96, 64), (96,), (4, 64), (96, 4), (rows, 64))
    )
    projection = make_projection(weight, bias, LowRank(a, b), layout)
    tuned = (torch.arange(rows) % 2).bfloat16()[:, None]
    got = projection.apply(x, tuned).float()
    expected = x.float() @ weight.float().T + bias.float() + (x.float() @ a.float().T * tuned.float()) @ b.float().T
    assert float((got - expected).norm() / expected.norm()) < 0.015
    assert bool((projection.apply(x[None], tuned[None])[0].float() == got).all())
