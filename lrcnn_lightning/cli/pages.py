"""Pages of handwriting: large images made of real digits, without a download.

scikit-learn ships 1,797 handwritten digits of 8 x 8 pixels (the test part of the UCI set of Alpaydin and Kaynak).
A page is a large grey image on which a few hundred of them are scattered without overlap.  Most of them show the
same digit, which is the page's label; the others are drawn at random.  No small part of a page tells the label for
certain, so a network gains from seeing it whole.

Training, validation and test pages are made of disjoint digit images.  A page depends on the seed, its split and its
index, and on nothing else: not on the number of workers, not on the order in which pages are asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Literal, cast

import numpy
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lrcnn_lightning.errors import ConfigError

__all__ = ["Pages", "PagesDataModule", "parse_size"]

Split = Literal["train", "val", "test"]

GLYPH = 8
"""Height and width of a digit image in pixels, before scaling."""

SHARES: dict[Split, float] = {"train": 0.6, "val": 0.2, "test": 0.2}
"""Each split's share of the digit images of every class."""

PAPER = 0.1
"""Grey level of the empty page; ink is 1."""


def parse_size(size: int | str | Sequence[int]) -> tuple[int, int]:
    """Read a page size.

    Args:
        size: ``512`` or ``"512"`` for a square, ``"512x768"`` or ``[512, 768]`` for height and width, in pixels.

    Returns:
        Height and width in pixels.

    Raises:
        ConfigError: if ``size`` is none of these or not positive.
    """
    numbers: list[int] = []
    if isinstance(size, int) and not isinstance(size, bool):
        numbers = [size, size]
    elif isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+)\s*(?:[xX]\s*(\d+)\s*)?", size)
        if match:
            numbers = [int(match[1]), int(match[2] or match[1])]
    elif isinstance(size, Sequence) and len(size) == 2 and all(isinstance(number, int) for number in size):
        numbers = [int(number) for number in size]
    if not numbers or min(numbers) <= 0:
        raise ConfigError(
            f"data.size: {size!r} is not the size of a page; give pixels as 512 (a square), "
            "512x768 (height x width) or [512,768]"
        )
    return numbers[0], numbers[1]


class Pages(Dataset[tuple[Tensor, Tensor]]):
    """Pages of one split, each made when it is asked for.

    Args:
        digits: digit images, ``D 8 8``, float from 0 (paper) to 1 (ink).
        labels: the digit that each shows, ``D``, from 0 to ``classes - 1``; every class must occur.
        pages: number of pages.
        size: height and width of a page in pixels.
        glyphs: digits on a page.
        scale: factor by which a digit image is enlarged.
        dominance: share of a page's digits that show its label.
        noise: standard deviation of the grey noise, where ink is 1 and paper 0.1.
        channels: channels of a page; the grey page is repeated.
        seed: any tuple of non-negative integers; pages of different seeds are independent.

    Raises:
        ConfigError: if the digits do not fit on the page without overlap.
    """

    def __init__(
        self,
        digits: Tensor,
        labels: Tensor,
        *,
        pages: int,
        size: tuple[int, int],
        glyphs: int,
        scale: int,
        dominance: float,
        noise: float,
        channels: int,
        seed: tuple[int, ...],
    ) -> None:
        enlarged = digits.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)
        self.digits = enlarged.numpy()
        self.labels = labels.numpy()
        self.members = [numpy.flatnonzero(self.labels == label) for label in range(int(labels.max()) + 1)]
        self.pages = pages
        self.size = size
        self.glyphs = glyphs
        self.dominance = dominance
        self.noise = noise
        self.channels = channels
        self.seed = seed
        self.cell = _cell(size, glyphs, GLYPH * scale)

    def __len__(self) -> int:
        """Return the number of pages."""
        return self.pages

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Make page ``index``.

        Returns:
            The page, ``channels H W``, float32, and its label, a whole number without dimensions.
        """
        if not 0 <= index < self.pages:
            raise IndexError(f"page {index} of {self.pages}")
        random = numpy.random.default_rng((*self.seed, index))
        classes = len(self.members)
        label = index % classes  # every class equally often
        majority = round(self.dominance * self.glyphs)
        shown = numpy.full(self.glyphs, label)
        # the rest are spread over the other classes, so that the label stays the most frequent digit
        others = (label + 1 + random.permutation(self.glyphs - majority) % max(1, classes - 1)) % classes
        shown[majority:] = others
        chosen = [random.choice(self.members[digit]) for digit in shown]

        height, width = self.size
        page = random.standard_normal((height, width), dtype=numpy.float32)
        page *= self.noise
        page += PAPER
        side = self.digits.shape[-1]
        columns = width // self.cell
        cells = random.permutation((height // self.cell) * columns)[: self.glyphs]
        shifts = random.integers(0, self.cell - side + 1, size=(self.glyphs, 2))
        tops = cells // columns * self.cell + shifts[:, 0]
        lefts = cells % columns * self.cell + shifts[:, 1]
        for digit, top, left in zip(chosen, tops, lefts, strict=True):
            page[top : top + side, left : left + side] += self.digits[digit] * (1 - PAPER)
        image = torch.from_numpy(page).unsqueeze(0).expand(self.channels, -1, -1)
        return image.contiguous(), torch.tensor(label)


def _cell(size: tuple[int, int], glyphs: int, side: int) -> int:
    """Side of the square cells, as large as possible, of which the page holds at least ``glyphs``.

    Each digit moves freely inside a cell of its own: that is what keeps digits from overlapping.
    """
    height, width = size
    for cell in range(min(height, width), side - 1, -1):
        if (height // cell) * (width // cell) >= glyphs:
            return cell
    most = (height // side) * (width // side)
    raise ConfigError(
        f"data.glyphs: {glyphs} digits of {side} x {side} pixels do not fit on a page of {height} x {width} without "
        f"overlap, at most {most} do; lower data.glyphs or data.scale, or raise data.size"
    )


class ClassRounds(Sampler[int]):
    """Random order of the pages in which every round of consecutive pages shows each class once.

    A batch is small, because pages are large.  If its labels were left to chance, they would differ from batch to
    batch by more than the network's answers do at the start, and learning would take many times as long to set in.

    Args:
        pages: number of pages; page ``i`` shows class ``i % classes``.
        classes: number of classes.
    """

    def __init__(self, pages: int, classes: int) -> None:
        self.pages = pages
        self.classes = classes

    def __len__(self) -> int:
        """Return the number of pages."""
        return self.pages

    def __iter__(self) -> Iterator[int]:
        """Give every page's index once; a last round that is not full comes last."""
        rounds = self.pages // self.classes
        order = torch.stack([torch.randperm(rounds) for _ in range(self.classes)], dim=1) if rounds else ()
        for turns in order:
            for label in torch.randperm(self.classes).tolist():
                yield int(turns[label]) * self.classes + label
        first = rounds * self.classes
        yield from (first + torch.randperm(self.pages - first)).tolist()


class PagesDataModule(LightningDataModule):
    """Pages of handwriting for training, validation and test; see the module's docstring.

    Args:
        size: ``512`` or ``"512"`` for square pages, ``"512x768"`` or ``[512, 768]`` for height and width in pixels.
        train_pages: number of training pages.
        val_pages: number of validation pages.
        test_pages: number of test pages.
        glyphs: digits on a page; ``"auto"`` covers about a third of the page.
        scale: factor by which an 8 x 8 digit image is enlarged.
        dominance: share of a page's digits that show its label, above ``1 / classes`` and at most 1.
        noise: standard deviation of the grey noise, where ink is 1 and paper 0.1.
        classes: how many of the ten digits occur, from 2 to 10.
        channels: channels of a page; the grey page is repeated, 3 suits networks made for photographs.
        batch_size: pages in a batch.
        num_workers: processes that make pages; 0 makes them in the training process.
        seed: pages of different seeds are independent.

    Raises:
        ConfigError: for a value that is not allowed, or if the digits do not fit on a page.
    """

    def __init__(
        self,
        size: int | str | Sequence[int] = 512,
        *,
        train_pages: int = 300,
        val_pages: int = 100,
        test_pages: int = 100,
        glyphs: int | Literal["auto"] = "auto",
        scale: int = 4,
        dominance: float = 0.9,
        noise: float = 0.05,
        classes: int = 10,
        channels: int = 3,
        batch_size: int = 5,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.height, self.width = parse_size(size)
        _at_least("train_pages", train_pages, 1)
        _at_least("val_pages", val_pages, 1)
        _at_least("test_pages", test_pages, 1)
        _at_least("scale", scale, 1)
        _at_least("channels", channels, 1)
        _at_least("batch_size", batch_size, 1)
        _at_least("num_workers", num_workers, 0)
        _at_least("seed", seed, 0)
        if not isinstance(classes, int) or not 2 <= classes <= 10:
            raise ConfigError(f"data.classes: {classes!r} is not a number of digits; give a whole number from 2 to 10")
        if not isinstance(dominance, int | float) or not 1 / classes < dominance <= 1:
            raise ConfigError(
                f"data.dominance: {dominance!r} is not a share that makes one of {classes} digits the most frequent; "
                f"give a number above {1 / classes:.2f} and at most 1"
            )
        if not isinstance(noise, int | float) or noise < 0:
            raise ConfigError(f"data.noise: {noise!r} is not a standard deviation; give a number of at least 0")
        side = GLYPH * scale
        if glyphs == "auto":
            glyphs = max(1, self.height * self.width // (3 * side * side))
        if not isinstance(glyphs, int) or isinstance(glyphs, bool) or glyphs < 1:
            raise ConfigError(f"data.glyphs: {glyphs!r} is not a number of digits; give a positive int or auto")
        _cell((self.height, self.width), glyphs, side)
        self.pages: dict[Split, int] = {"train": train_pages, "val": val_pages, "test": test_pages}
        self.glyphs = glyphs
        self.scale = scale
        self.dominance = dominance
        self.noise = noise
        self.classes = classes
        self.channels = channels
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed

    @property
    def example_shape(self) -> tuple[int, int, int, int]:
        """Shape of a batch of pages, ``N C H W``."""
        return self.batch_size, self.channels, self.height, self.width

    def dataset(self, split: Split) -> Pages:
        """Make the pages of one split."""
        digits, labels = _digits(split, self.classes, self.seed)
        return Pages(
            digits,
            labels,
            pages=self.pages[split],
            size=(self.height, self.width),
            glyphs=self.glyphs,
            scale=self.scale,
            dominance=self.dominance,
            noise=self.noise,
            channels=self.channels,
            seed=(self.seed, list(SHARES).index(split)),
        )

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Batches of training pages in random order: pages ``N C H W`` and labels ``N``."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Batches of validation pages: pages ``N C H W`` and labels ``N``."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Batches of test pages: pages ``N C H W`` and labels ``N``."""
        return self._loader("test")

    def _loader(self, split: Split) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(
            self.dataset(split),
            batch_size=self.batch_size,
            sampler=ClassRounds(self.pages[split], self.classes) if split == "train" else None,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )


def _digits(split: Split, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """The digit images of a split, ``D 8 8`` from 0 to 1, and their labels ``D``; splits share no image."""
    from sklearn.datasets import load_digits  # imported late: it takes a second

    bundle = load_digits()
    images = torch.from_numpy(cast("numpy.ndarray", bundle.images)).float() / 16
    labels = torch.from_numpy(cast("numpy.ndarray", bundle.target)).long()
    position = list(SHARES).index(split)
    bounds = [0.0, *numpy.cumsum(list(SHARES.values())).tolist()]
    random = numpy.random.default_rng(seed)
    selected = []
    for label in range(classes):
        members = random.permutation(numpy.flatnonzero(labels.numpy() == label))
        low, high = (round(len(members) * bound) for bound in bounds[position : position + 2])
        selected.append(torch.from_numpy(members[low:high]))
    chosen = torch.cat(selected)
    return images[chosen], labels[chosen]


def _at_least(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"data.{name}: {value!r} is not allowed; give a whole number of at least {least}")
