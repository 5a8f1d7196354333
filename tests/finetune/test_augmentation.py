"""Augmentation: masks, and photos as a phone might take them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pomona.finetune import augmentation  # noqa: E402


def discs(n: int = 6) -> Any:
    """Red discs on white, with a white gleam inside."""
    side = 48
    y, x = np.mgrid[:side, :side]
    far = np.hypot(x - side / 2, y - side / 2)
    photo = np.full((side, side, 3), 255, np.uint8)
    photo[far < 16] = (200, 20, 30)
    photo[far < 4] = 255
    return torch.from_numpy(np.repeat(photo[None], n, axis=0)), far


def test_the_mask_is_the_fruit_gleam_and_all() -> None:
    photos, far = discs()
    mask = augmentation.foreground_masks(photos.numpy())[0]
    assert (mask[far < 14] == 255).all() and (mask[far > 17] == 0).all()


def test_a_photo_that_is_not_on_white_is_all_foreground() -> None:
    photos, _ = discs()
    dark = photos // 2
    assert (augmentation.foreground_masks(dark.numpy()) == 255).all()


def drawn(n: int, seed: int = 0) -> augmentation.Draws:
    return augmentation.draw(n, 48, torch.Generator().manual_seed(seed))


def with_mask(photos: Any) -> Any:
    return torch.cat(
        [photos, torch.from_numpy(augmentation.foreground_masks(photos.numpy()))[..., None]], dim=3
    )


def test_each_process_s_part_is_that_of_the_whole() -> None:
    photos, _ = discs(6)
    planes = with_mask(photos)
    whole = augmentation.apply(planes, drawn(6))
    for rank in range(2):
        part = augmentation.apply(planes[rank::2], drawn(6).part(rank, 2))
        assert torch.equal(part, whole[rank::2])
    assert whole.shape == (6, 3, 48, 48) and float(whole.min()) >= 0 and float(whole.max()) <= 1
    assert not torch.equal(whole, augmentation.apply(planes, drawn(6, seed=1)))


def test_background_is_replaced_and_fruit_stays() -> None:
    photos, _ = discs(32)
    draws = drawn(32)
    straight = torch.eye(2, 3).repeat(32, 1, 1)
    plain = torch.eye(3, 4).repeat(32, 1, 1)
    draws = draws._replace(
        matrix=straight,
        colour=plain,
        blur=torch.zeros(32),
        noise=torch.zeros(32),
        replace=(torch.arange(32) % 2).float(),
    )
    got = augmentation.apply(with_mask(photos), draws)
    wanted = photos.permute(0, 3, 1, 2) / 255
    assert torch.allclose(got[::2], wanted[::2], atol=1e-5)  # nothing drawn: the photo itself
    centre = (slice(None), slice(None), slice(20, 28), slice(20, 28))
    assert torch.allclose(got[1::2][centre], wanted[1::2][centre], atol=1e-5)
    corner = got[1::2, :, :6, :6]
    assert float((corner < 0.99).float().mean()) > 0.7
    assert float(corner.flatten(1).mean(dim=1).std()) > 0.05  # each one another


def test_beyond_the_edge_of_a_photo_that_is_not_on_white_it_goes_on() -> None:
    photos, _ = discs(8)
    dark = photos // 2
    draws = drawn(8)
    draws = draws._replace(
        colour=torch.eye(3, 4).repeat(8, 1, 1),
        blur=torch.zeros(8),
        noise=torch.zeros(8),
        matrix=2 * torch.eye(2, 3).repeat(8, 1, 1),
    )
    assert float(augmentation.apply(with_mask(dark), draws).max()) <= 0.5 + 1e-4
    assert (
        float(augmentation.apply(with_mask(photos), draws._replace(replace=torch.zeros(8))).max())
        == 1
    )


def test_colours_are_turned_about_grey() -> None:
    draws = drawn(200)
    grey = torch.full((200, 3, 1), 0.5)
    turned = draws.colour[:, :, :3] @ grey + draws.colour[:, :, 3:]
    assert float((turned.amax(dim=1) - turned.amin(dim=1)).max()) <= 2 * augmentation.TINT + 1e-5
