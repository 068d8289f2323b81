import numpy as np
import pandas as pd
import pytest

from harmonylib.data.iharmony4_statistics import GENUINE, LEVELS, beside, draw


@pytest.mark.parametrize("subset", GENUINE)
@pytest.mark.parametrize("figure", ("fmse", "share"))
def test_draws_have_the_tables_quantiles(subset, figure):
    values = getattr(GENUINE[subset], figure)
    drawn = draw(values, np.random.default_rng(0), 40_000)
    np.testing.assert_allclose(np.quantile(drawn, LEVELS), values, rtol=0.05)
    assert (drawn > 0).all() and drawn.max() < 5 * values[-1]
    assert isinstance(float(draw(values, np.random.default_rng(0))), float)


def test_a_set_is_put_beside_the_genuine_one():
    fmse, share = GENUINE["HFlickr"].fmse, GENUINE["HFlickr"].share
    frame = pd.DataFrame({"subset": "HFlickr", "fmse": [2 * fmse[2]] * 4, "share": [share[2], 1.0, share[2], 0.0]})
    other = pd.DataFrame({"subset": ["mine"], "fmse": [1.0], "share": [0.5]})
    table = beside(pd.concat([other, frame]))
    assert list(table.index) == [("HFlickr", level) for level in LEVELS]
    middle = table.loc[("HFlickr", 0.5)]
    assert middle["fmse"].tolist() == [2 * fmse[2], fmse[2], 2.0] and middle["share", "ratio"] == pytest.approx(1)
    np.testing.assert_allclose(table["fmse", "genuine"], fmse)
    np.testing.assert_allclose(table["fmse", "ratio"], 2 * fmse[2] / np.array(fmse))
