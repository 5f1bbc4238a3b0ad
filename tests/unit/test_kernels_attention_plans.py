"""How sparse_mla deals tiles to lanes: by a model of what was measured, without a GPU."""

from __future__ import annotations

from itertools import pairwise

import pytest

from tidepool.kernels.cuda_sparse_mla import Plan, cost_us, plans_of

TILES = 32


def chosen(batch: int, num_lanes: int, *, is_fp8: bool) -> tuple[Plan, float]:
    plans = [plan for plan in plans_of(batch, TILES, num_lanes) if plan.num_lanes <= num_lanes]
    plans += [Plan(batch)]
    costs = {plan: cost_us(plan, batch, TILES, num_lanes, is_fp8=is_fp8) for plan in plans}
    best = min(costs, key=costs.__getitem__)
    return best, costs[best]


@pytest.mark.parametrize("is_fp8", [True, False])
@pytest.mark.parametrize("num_lanes", [66, 132])
def test_one_request_more_never_costs_a_wave_more(num_lanes: int, is_fp8: bool) -> None:
    costs = [chosen(batch, num_lanes, is_fp8=is_fp8)[1] for batch in range(1, 513)]
    steps = [after / before for before, after in pairwise(costs)]
    assert max(steps) < 1.4  # with a lane a token: 2.0, at the 67th


@pytest.mark.parametrize("batch", [35, 40, 44, 67, 80, 96])
def test_between_full_waves_lanes_share_tokens(batch: int) -> None:
    assert chosen(batch, 66, is_fp8=True)[0] == Plan(66)


@pytest.mark.parametrize(("batch", "plan"), [(32, Plan(64, 2)), (64, Plan(64)), (128, Plan(128))])
def test_full_waves_give_each_token_lanes_of_its_own(batch: int, plan: Plan) -> None:
    assert chosen(batch, 66, is_fp8=True)[0] == plan


@pytest.mark.parametrize("batch", [1, 7, 33, 67, 500])
@pytest.mark.parametrize("tiles", [1, 2, 32, 500])
def test_no_lane_is_without_a_tile(batch: int, tiles: int) -> None:
    assert all(
        batch <= p.num_lanes <= batch * tiles or p.num_lanes == 66
        for p in plans_of(batch, tiles, 66)
    )
    assert all(p.num_lanes <= batch * tiles for p in plans_of(batch, tiles, 66))
