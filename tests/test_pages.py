"""Pages of handwriting: real digits, no overlap, disjoint splits, and the same page whoever asks for it."""

from __future__ import annotations

import pytest
import torch

from lrcnn_lightning.cli.pages import PAPER, ClassRounds, PagesDataModule, _digits, parse_size
from lrcnn_lightning.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "size"),
    [
        (512, (512, 512)),
        ("512", (512, 512)),
        ("512x768", (512, 768)),
        (" 512 X 768 ", (512, 768)),
        ([512, 768], (512, 768)),
    ],
)
def test_sizes(given: object, size: tuple[int, int]) -> None:
    assert parse_size(given) == size  # type: ignore[arg-type]


@pytest.mark.parametrize("given", ["abc", "", "512x", "x512", "1x2x3", 0, -5, "0", 3.5, True, None, [1], [1, "2"]])
def test_what_is_no_size_says_what_is(given: object) -> None:
    with pytest.raises(ConfigError, match=r"data\.size: .* 512x768 \(height x width\)"):
        parse_size(given)  # type: ignore[arg-type]


def quiet(**options: object) -> PagesDataModule:
    """Small pages without noise, where every pixel above the paper's grey is ink."""
    return PagesDataModule(**{"size": 96, "scale": 2, "noise": 0.0, "train_pages": 20, **options})  # type: ignore[arg-type]


def test_shapes_and_ranges() -> None:
    data = PagesDataModule("96x128", train_pages=7, val_pages=3, batch_size=4)
    pages, labels = next(iter(data.train_dataloader()))
    assert pages.shape == data.example_shape == (4, 3, 96, 128)
    assert pages.dtype == torch.float32
    assert labels.shape == (4,)
    assert len(data.dataset("train")) == 7
    assert len(data.dataset("val")) == 3
    assert torch.equal(pages[:, 0], pages[:, 2])


def test_a_page_depends_on_its_index_alone() -> None:
    first, second = quiet().dataset("train"), quiet().dataset("train")
    backwards = [second[index] for index in reversed(range(20))][::-1]
    for index in range(20):
        assert torch.equal(first[index][0], backwards[index][0])
        assert torch.equal(first[index][1], backwards[index][1])


def test_workers_make_the_same_pages() -> None:
    alone = list(PagesDataModule(64, val_pages=4, scale=2, batch_size=2).val_dataloader())
    helped = list(PagesDataModule(64, val_pages=4, scale=2, batch_size=2, num_workers=2).val_dataloader())
    for one, other in zip(alone, helped, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_pages_differ_between_indices_seeds_and_splits() -> None:
    page = quiet().dataset("train")[0][0]
    assert not torch.equal(page, quiet().dataset("train")[10][0])
    assert not torch.equal(page, quiet(seed=1).dataset("train")[0][0])
    assert not torch.equal(page, quiet().dataset("val")[0][0])


def test_splits_share_no_digit_image() -> None:
    images = {split: _digits(split, 10, seed=0)[0] for split in ("train", "val", "test")}  # type: ignore[arg-type]
    sets = {split: {image.numpy().tobytes() for image in stack} for split, stack in images.items()}
    assert sum(len(stack) for stack in images.values()) == 1797
    assert not sets["train"] & sets["val"]
    assert not sets["train"] & sets["test"]
    assert not sets["val"] & sets["test"]


def test_every_split_has_every_class() -> None:
    for split in ("train", "val", "test"):
        labels = _digits(split, 10, seed=0)[1]  # type: ignore[arg-type]
        assert labels.unique().tolist() == list(range(10))


def test_digits_do_not_overlap_and_none_is_lost() -> None:
    data = quiet(glyphs=25)
    pages = data.dataset("train")
    for index in range(10):
        page = pages[index][0][0]
        # overlapping digits would overwrite each other, so the ink would be less than that of whole digits
        cells = page.unfold(0, pages.cell, pages.cell).unfold(1, pages.cell, pages.cell).flatten(0, 1)
        inked = (cells > PAPER + 1e-6).flatten(1).any(1)
        assert int(inked.sum()) == 25


def test_label_is_the_most_frequent_digit() -> None:
    data = quiet(glyphs=20, dominance=0.5)
    pages = data.dataset("train")
    known = {digit.tobytes(): int(label) for digit, label in zip(pages.digits, pages.labels, strict=True)}
    side = pages.digits.shape[-1]
    page, label = pages[3]
    # undo the page: every place where a known digit image fits exactly
    ink = ((page[0] - PAPER) / (1 - PAPER)).clamp(min=0)
    windows = ink.unfold(0, side, 1).unfold(1, side, 1).flatten(0, 1)
    stack = torch.from_numpy(pages.digits)
    distances = torch.cdist(windows.flatten(1), stack.flatten(1))
    found = [pages.labels[int(row.argmin())] for row in distances if float(row.min()) < 1e-2]
    assert len(found) == 20
    assert len(known) == len(stack)
    assert found.count(int(label)) == 10
    assert max(set(found), key=found.count) == int(label)


def test_classes_are_equally_frequent() -> None:
    labels = [int(label) for _, label in quiet(classes=4).dataset("train")]
    assert [labels.count(label) for label in range(4)] == [5, 5, 5, 5]


@pytest.mark.parametrize("pages", [3, 20, 27])
def test_training_order_shows_each_class_once_a_round(pages: int) -> None:
    order = list(ClassRounds(pages, classes=4))
    assert sorted(order) == list(range(pages))
    for start in range(0, pages - pages % 4, 4):
        assert sorted(index % 4 for index in order[start : start + 4]) == [0, 1, 2, 3]
    if pages > 3:
        assert order != list(ClassRounds(pages, classes=4))


def test_digits_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.glyphs: 37 digits of 16 x 16 pixels .* at most 36 do; lower"):
        quiet(glyphs=37)
    assert quiet(glyphs=36).dataset("train")[0][0].shape == (3, 96, 96)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train_pages": 0}, r"data\.train_pages: 0"),
        ({"batch_size": "x"}, r"data\.batch_size: 'x'"),
        ({"num_workers": -1}, r"data\.num_workers: -1"),
        ({"classes": 11}, r"data\.classes: 11 .* from 2 to 10"),
        ({"dominance": 0.05}, r"data\.dominance: 0\.05 .* above 0\.10"),
        ({"dominance": "much"}, r"data\.dominance: 'much'"),
        ({"noise": -0.1}, r"data\.noise: -0\.1"),
        ({"glyphs": "many"}, r"data\.glyphs: 'many'"),
        ({"glyphs": 0}, r"data\.glyphs: 0"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        quiet(**options)
