import torch

from harmonylib.models.colour_map import TERMS, apply_inside, apply_map, fit_map, monomials


def draws(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_monomials_by_hand():
    colour = torch.tensor([[[0.5], [-1.0], [0.2]]])
    third = 1 / 3
    expected = [1, 0.5, -1, 0.2, 0.25 - third, 1 - third, 0.04 - third, -0.5, -0.2, 0.1]
    torch.testing.assert_close(monomials(colour)[0, :, 0], torch.tensor(expected))


def test_a_map_applies_at_any_size_and_zero_is_the_identity():
    colour_map, image = 0.2 * draws(2, TERMS, 3), draws(2, 3, 5, 7, seed=1)
    changed = apply_map(colour_map, image)
    assert torch.equal(apply_map(torch.zeros(2, TERMS, 3), image), image)
    torch.testing.assert_close(changed[1, :, 2, 3], apply_map(colour_map[1:], image[1:, :, 2, 3, None])[0, :, 0])
    by_hand = image[0, 1, 4, 6] + (colour_map[0, :, 1] * monomials(image[:1, :, 4, 6, None])[0, :, 0]).sum()
    torch.testing.assert_close(changed[0, 1, 4, 6], by_hand)
    assert apply_map(colour_map.bfloat16(), image.bfloat16()).dtype == torch.float32
    for mask in (draws(2, 1, 5, 7, seed=2) > 0, torch.zeros(2, 1, 5, 7), torch.ones(2, 1, 5, 7)):
        inside = apply_inside(colour_map, image, mask.float())
        torch.testing.assert_close(inside, torch.where(mask > 0, changed, image))


def test_a_known_map_is_recovered_whatever_the_prior():
    known, before = 0.3 * draws(2, TERMS, 3), draws(2, 3, 200, seed=1)
    prior, ridge = draws(2, TERMS, 3, seed=2), torch.tensor(1e-4)
    found = fit_map(before, apply_map(known, before), torch.ones(2, 200), prior, ridge)
    torch.testing.assert_close(found, known, atol=1e-3, rtol=0)


def test_weights_choose_the_pairs_and_without_any_the_prior_stays():
    known, before, prior = 0.3 * draws(1, TERMS, 3), draws(1, 3, 200, seed=1), draws(1, TERMS, 3, seed=2)
    after, ridge, weights = apply_map(known, before), torch.full((1, TERMS), 1e-4), torch.zeros(1, 200)
    assert torch.equal(fit_map(before, after, weights, prior, ridge), prior)
    weights[:, :100] = 1
    after[..., 100:] = 9
    torch.testing.assert_close(fit_map(before, after, weights, prior, ridge), known, atol=1e-3, rtol=0)
    firm = fit_map(before, after, weights, prior, torch.full((1, TERMS), 1e6))
    torch.testing.assert_close(firm, prior, atol=1e-3, rtol=0)
